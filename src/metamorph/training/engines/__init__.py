"""How the work is divided and made faster, without changing what is learnt.

Which engine shards what?                        `prepare.py`; whole weights and the frozen tower `weights.py`
Which attention, and is packing safe with it?    `attention.py`
What is recomputed and compiled?                 `speed.py`
"""
