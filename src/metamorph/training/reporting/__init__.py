"""What people see of a run.

Bar, lines, time left                    `progress.py`
Log entries: speed, memory, gradients    `monitor.py`; tokens and FLOPs `throughput.py`
Answers to fixed prompts                 `samples.py`
TensorBoard, W&B, trackio                `trackers.py`
The card of the result                   `model_card.py`
"""
