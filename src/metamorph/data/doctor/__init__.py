"""`metamorph data check`: what is wrong with data, before anything is trained on it.

What is checked?                              `check.py`, boxes by `boxes.py`
What does training itself look at first?      `preflight.py`
What does the report hold?                    `report.py`, its HTML `page.py`
How does an example look to the model?        `samples.py`
"""
