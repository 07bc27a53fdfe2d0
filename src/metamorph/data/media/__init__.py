"""Images and videos.

How does a record name an image?      `refs.py`
Which paths are allowed, and how is the image loaded?   `stores.py`; a single file: `metamorph.models.image_files`
How are frames of a video read?       `video.py`
"""
