"""The entire system in miniature: a small drawn world, and one command that trains and evaluates everything in it.

Scenes, images and texts                  `world/`
What does `metamorph quickstart` do?      `quickstart/`
Does joint training help drawing?         `study.py`
"""
