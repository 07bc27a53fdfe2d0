"""Serving a model to many clients: an HTTP API and a web page in front of one model.

How do requests share the model?          `engine.py`; `batcher.py` joins what waits to batches
"""
