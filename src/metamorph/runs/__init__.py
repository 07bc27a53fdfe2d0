"""What all training runs do with their folder and processes.

What surrounds a run from beginning to end?             `open_run.py`
How is a checkpoint written completely or not at all?   `checkpoint_files.py`
Which checkpoint does a run resume from?                `find_checkpoint.py`
Which flags may differ when a run resumes?              `flag_changes.py`
How does a signal stop a run without loss?              `preemption.py`
What keeps two runs out of one folder?                  `lock.py`
How is progress shown, and by which process?            `progress.py`, `ranks.py`
How does the same seed give the same result?            `determinism.py`
What do the model cards of all results share?           `cards.py`
"""
