"""Benchmarks: a spec says what is asked and how answers are judged.

What is a sample, and what an answer?     `samples.py`
"""
