"""The network: images become visual tokens, one sequence holds both kinds of token, two heads predict them.

What can be configured?                       `configuration_metamorph.py`
How does a forward pass go?                   `modeling_metamorph.py`, and `backbone.py` below the heads
Where is the visual loss?                     `losses.py`; text loss without all logits: `text_head.py`
Where do I add a vision tower?                `vision_tower.py`: a row of its table
Which language models are supported?          `families.py`: each is compared with its own logits
How are models of others loaded?              `pretrained.py`: weights complete, no remote code
What are connector and vision head?           `projectors.py`; the connector's file `connector.py`
How does the model draw?                      `generation.py`
How do a prompt and images become tensors?    `processing_metamorph.py`, `conversation_processor.py`, `sequence/`
Which arguments does the processor take?      `processing_kwargs.py`; which files: `processing_files.py`
In which forms are images given?              `image_inputs.py`; how they become pixels: `image_processing.py`
How is an image file read, and why not?       `image_files.py`
How are rows of new tokens trained?           `embeddings.py`
What does a forward pass return?              `outputs.py`; where in a batch things are: `batch_indices.py`
How are adapters stored?                      `adapters.py`; what their files may hold: `adapter_files.py`
How are checkpoints of the original read?     `original.py`
"""
