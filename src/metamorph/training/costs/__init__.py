"""What a run costs: memory on each GPU (`memory.py`) and arithmetic in each step (`flops.py`)."""
