"""What all commands share about flags.

How is a command line read?                     `parser.py`
How do errors name a flag?                      `checks.py`
How do a YAML recipe and flags become values?   `recipes.py`
How do errors say what to install?              `extras.py`
"""
