"""Benchmarks: a spec says what is asked and how answers are judged.

What is in a spec?                        `spec.py`
From prompts to a result?                 `run.py`
What is in `result.json`?                 `result.py`
Confidence intervals?                     `intervals.py`
Which of two results is better?           `compare.py`
Plots?                                    `plots.py`
"""
