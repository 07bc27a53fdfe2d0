"""Saving and resuming.

How does a resume find its checkpoint and its sample?    `resume.py`
Which flags may differ from those of the checkpoint?     `resume_flags.py`
How are weights loaded?                                  `weights.py`
What is saved, and when?                                 `saving.py`
What do checkpoints of sharded models hold?              `shards.py`
"""
