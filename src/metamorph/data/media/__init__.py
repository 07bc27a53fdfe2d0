"""Images and videos.

How does a record name an image?      `refs.py`
Where is the file it names?           `stores.py`
How is an image file read?            `images.py`; what others are, says `unreadable.py`
How are frames of a video read?       `video.py`
"""
