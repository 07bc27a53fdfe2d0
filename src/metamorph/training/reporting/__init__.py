"""Progress, log entries, samples and the model card of a run.

Progress bar, log lines, time left              `progress.py`
Log entries: speed, memory, gradient norms      `monitor.py`; tokens and FLOPs: `throughput.py`
Answers to fixed prompts                        `samples.py`
Benchmarks during training                      `benchmarks.py`
Texts and images in TensorBoard, W&B, trackio   `trackers.py`
Model card of the result                        `model_card.py`
"""
