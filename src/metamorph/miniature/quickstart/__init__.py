"""`metamorph quickstart`: data, both stages, the visualizer, evaluation and a report.

What happens in which order?             `run.py`; the parts that train: `stages.py`
How long does each part train?           `recipe.py`
What is measured?                        `evaluate.py`; for any trained model: `measure.py`
What does the report show?               `report.py`, `figures.py`
How long does each stage take?           `clock.py`
Which folders does a run use?            `workspace.py`
What does the projector start from?      `conditions.py`
"""
