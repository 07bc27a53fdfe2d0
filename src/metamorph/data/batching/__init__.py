"""From samples to batches.

How long is each sample?                 `lengths.py`
Which samples share a row and a batch?   `packing.py`
How do batches reach the data loader?    `sampler.py`
How do examples become tensors?          `collation.py`
"""
