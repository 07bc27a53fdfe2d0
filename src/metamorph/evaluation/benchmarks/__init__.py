"""Benchmarks: a spec says what is asked and how answers are judged.

What is in a spec?                         `spec.py`
Old place of samples                      `samples.py`
"""
