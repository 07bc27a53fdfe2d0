"""Checks of data before training.

What is checked in each record?          `walk.py`
What does `metamorph data check` do?     `check.py`, and what a run checks at its start
What is in the report?                   `report.py`; its HTML is `metamorph/templates/data_check.html.jinja`
How does the model see an example?       `samples.py`
"""
