"""Training of the visualizer; `run.py` is the narrative, from flags to the pipeline folder.

Which flags are there?                     `arguments.py`
What is it made of?                        `build.py`
What happens in a step?                    `denoising.py`; the trainer around it `trainer.py`
Which images, in which order?              `dataset.py`, `images/`
What is the learning rate?                 `trainer.py`: `log_warmup_linear_decay`
What is averaged and saved?                `average.py`; the result and its card `export.py`
How does a run resume?                     `resume.py`
What does FSDP2 shard?                     `fsdp2.py`
"""
