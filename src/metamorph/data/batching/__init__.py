"""From samples to batches.

How long is each sample?                 `lengths.py`
Which samples share a row and a batch?   `packing.py`, and how the data loader gets them
How do examples become tensors?          `collation.py`
"""
