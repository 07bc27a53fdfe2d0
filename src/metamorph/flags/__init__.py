"""Flags of all commands.

How is a command line parsed?                      `parser.py`
How do a YAML recipe and flags become values?      `recipes.py`
How is a value checked, and the flag named?        `checks.py`
What does an error say to install?                 `extras.py`
"""
