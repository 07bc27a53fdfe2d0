"""Images and videos.

How does a record name an image?      `refs.py`
Where is the file it names?           `stores.py`
Which paths are allowed?              `images.py`; how a file is read: `metamorph.models.image_files`
How are frames of a video read?       `video.py`
"""
