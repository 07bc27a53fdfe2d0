"""What people see of a run.

Log lines: speed, memory, gradients      `monitor.py`; tokens and FLOPs `throughput.py`
Answers to fixed prompts                 `samples.py`
TensorBoard, W&B, trackio                `trackers.py`
The card of the result                   `model_card.py`
"""
