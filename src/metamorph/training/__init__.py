"""How the model learns: `run.py` is the narrative, from flags to the result.

What is frozen in which stage?                `stages.py`
Where are rates, schedule and groups?         `optimizer.py`
What do both trainers share?                  `base_trainer.py`
How is a step normalised?                     `trainer.py`; what is logged of it: `metrics.py`
How do flags become model and data?           `build.py`; LoRA and 4 bits: `lora.py`
Which flags are there?                        `arguments/`
How does a resume find its sample?            `checkpoints/resume.py`
How do several GPUs share the work?           `engines/`
What will a run need, and what will it do?    `costs/`, `dry_run/`
What is logged and shown?                     `reporting/`
When does a run stop early?                   `callbacks.py`
How is a feature cache made?                  `features.py`
"""
