"""Visual tokens of a frozen tower, computed once and read in its place.

What is kept, and when is it valid?   `cache.py`
Which images are encoded?             `images.py`
"""
