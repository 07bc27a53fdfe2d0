"""The whole system in miniature: a small drawn world, and one command that trains and judges everything in it.

Scenes, pictures and texts                `world/`
What does `metamorph quickstart` do?      `quickstart/`
Does joint training help drawing?         `study.py`
"""
