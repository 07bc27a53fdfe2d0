"""`metamorph quickstart`: data, both stages, the visualizer, evaluation and a report.

What happens in which order?              `run.py`; the parts that train `stages.py`
How long does each part train?            `recipe.py`
What is measured?                         `evaluate.py`; of any finished model `measure.py`
What does the report show?                `report.py`, `figures.py`, `report_template.py`
How long did each stage take?             `clock.py`
Which flags are there?                    `options.py`
What does the projector start from?       `conditions.py`
"""
