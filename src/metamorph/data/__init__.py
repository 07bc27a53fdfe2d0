"""Training data: records become examples, examples become batches.

What does --data_path accept?                    `dataset.py`, and `mixture.py` for several sources
How does a JSONL line become ids and labels?     `examples.py`: the calls in order
What may a record contain?                       `records.py`; other layouts: `fields.py`
What if a record has fields that are not read?   `remarks.py`
Where are the data tasks, and how do I add one?  `tasks/`
How are files of records read?                   `sources/`
How are images and videos read?                  `media/`
Which samples make a batch?                      `batching/`
What happens to a bad record?                    `bad_records.py`
Who checks data before training?                 `checks/`
Where are features of a frozen tower cached?     `features.py`
"""
