"""Loaders of benchmark files, as their owners publish them.

What is a loader, and which are there?    `base.py`
"""
