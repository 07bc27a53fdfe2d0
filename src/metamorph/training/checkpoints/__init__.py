"""Saving and resuming.

How does a resume find its checkpoint and its sample?    `resume.py`
What does the trainer save, and when?                    `RunTrainer`, in the package above
Which flags may differ from the checkpoint's?            `resume_flags.py`
How are weights read back?                               `weights.py`
"""
