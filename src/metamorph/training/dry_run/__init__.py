"""`metamorph train --dry-run`: describes a run without loading weights.

Which flags are there?    `arguments.py`
What is computed?         `preview.py`
What is printed?          `report.py`
"""
