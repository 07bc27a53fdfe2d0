"""Checks of data before training.

What is checked in each record?          `walk.py`; boxes: `boxes.py`
What does `metamorph data check` do?     `check.py`
What does a run check at its start?      `preflight.py`
What is in the report?                   `report.py`; its HTML is `metamorph/templates/data_check.html.jinja`
How does the model see an example?       `samples.py`
"""
