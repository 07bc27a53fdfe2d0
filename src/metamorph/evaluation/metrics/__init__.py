"""Metrics of benchmarks.

What is a metric, and which are there?    `base.py`
"""
