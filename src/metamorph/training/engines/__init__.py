"""How the work is divided among GPUs and made faster, without changing what is learned.

Which engine shards what?                        `prepare.py`; full weights and the frozen tower: `weights.py`
Which attention, and is packing safe with it?    `attention.py`
What is recomputed and compiled?                 `speed.py`
"""
