"""Images and videos.

How does a record name an image?      `refs.py`
How is the image it names loaded?     `stores.py`
Which paths are allowed?              `images.py`; how a file is read: `metamorph.models.image_files`
How are frames of a video read?       `video.py`
"""
