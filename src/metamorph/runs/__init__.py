"""What every training run does with its folder and its processes, whatever it trains.

What surrounds a run from beginning to end?          `open_run.py`
How is a checkpoint written whole, or not at all?    `checkpoint_files.py`
Which one does a run resume from?                    `find_checkpoint.py`
How does a signal stop a run without loss?           `preemption.py`
How is one run kept out of the folder of another?    `lock.py`
Which flags may differ when a run resumes?           `flag_changes.py`
What is seen while it lasts?                         `progress.py`; by which process: `ranks.py`
How does one seed give one result?                   `determinism.py`
What do the model cards of all results share?        `cards.py`
"""
