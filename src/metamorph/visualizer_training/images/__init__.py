"""Training images of the visualizer: where they are and what is wrong with them.

Files, tars or memory     `sources.py`
Images in tar archives    `archives.py`
Images that are bad       `bad_images.py`
"""
