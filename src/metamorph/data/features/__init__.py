"""Visual tokens of a frozen tower, computed once and read while training.

What is saved, and when is it valid?   `cache.py`
Which images are encoded?             `images.py`
"""
