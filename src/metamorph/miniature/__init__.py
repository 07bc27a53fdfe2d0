"""The whole system in miniature: a small drawn world, and one command that trains and judges everything in it.

What is there to see and to say?          `world/`
What does `metamorph quickstart` do?      `quickstart/`
Does joint training help drawing?         `study.py`
"""
