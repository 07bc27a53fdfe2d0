"""`metamorph train --dry-run`: what a run would do, without weights.

Which flags may be missing?    `arguments.py`
What is worked out?            `preview.py`
What is printed?               `report.py`
"""
