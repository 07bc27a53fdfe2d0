"""Training of the model. Start with `run.py`, which goes from flags to the result.

Which flags are there?                          `arguments/`
What is checked before weights are loaded?      `prepare.py`
How do flags become model and data?             `build.py`; LoRA and 4 bits: `lora.py`
Which process reads the weights?                `load.py`
What is frozen in which stage?                  `stages.py`
Learning rates, schedule, parameter groups?     `optimizer.py`
How is a step normalised?                       `trainer.py`; what is logged of it: `metrics.py`
What do both trainers share?                    `base_trainer.py`
How does a resume find its sample?              `checkpoints/resume.py`
How do several GPUs share the work?             `engines/`
What does a run need, and what will it do?      `costs/`, `dry_run/`
What is logged and shown?                       `reporting/`
When does a run stop early?                     `callbacks.py`
How is a feature cache written?                 `features.py`
"""
