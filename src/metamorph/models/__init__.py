"""The network: images become visual tokens, one sequence holds both kinds of token, two heads predict them.

What can be configured?                       `configuration_metamorph.py`
How does a forward pass go?                   `modeling_metamorph.py`, and `backbone.py` below the heads
Where is the visual loss?                     `losses.py`; text loss without all logits: `text_head.py`
Where do I add a vision tower?                `vision_tower.py`: a row of its table
Which language models are supported?          `families.py`: each is compared with its own logits
How are untrusted models loaded?              `pretrained.py`: complete weights, no remote code
What are connector and vision head?           `projectors.py`; the connector's file `connector.py`
How are images generated?                    `generation.py`
How do a prompt and images become tensors?    `processing_metamorph.py`, `sequence/`
Which arguments does the processor take?      `processing_kwargs.py`
Which forms of images are accepted?           `image_inputs.py`; how they become pixels: `image_processing.py`
How is an image file read?                    `image_files.py`
How are the rows of new tokens trained?       `embeddings.py`
What does a forward pass return?              `outputs.py`; indices of images and targets: `batch_indices.py`
How are packed samples kept apart?            `packed_attention.py`
How are adapters saved and loaded?            `adapters.py`
How are original checkpoints converted?       `original.py`
"""
