"""How the visualizer learns: `run.py` is the narrative, from flags to the pipeline folder.

Which flags are there?                     `arguments.py`
What is it made of?                        `build.py`
What happens in a step?                    `denoising.py`; the loop around it `trainer.py`
Which images, in which order?              `dataset.py`, `pictures/`
What is the learning rate?                 `schedule.py`
What is saved, and how is it resumed?      `checkpoints.py`, `resume_flags.py`; the result `export.py`
How do processes share the work?           `processes.py`, `fsdp2.py`
What is logged?                            `monitor.py`; the card of the result `model_card.py`
What may the projector start from?         `alignment.py`
"""
