"""Where the images of the visualizer come from.

Files, tars or memory     `sources.py`
Images in tar shards      `shards.py`
Images that are broken    `bad_pictures.py`
"""
