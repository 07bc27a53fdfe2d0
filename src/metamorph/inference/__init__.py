"""Using a trained model: answer prompts, and draw the images of the answers.

How does a prompt become an answer?       `reply.py`: `reply_to`
How do visual tokens become pixels?       `draw.py`: `draw`
How are model and visualizer loaded?      `session.py`: `load`, which gives one object that does both
"""

from metamorph.inference.draw import SamplerSettings, draw
from metamorph.inference.reply import Prompt, Reply, reply_to
from metamorph.inference.session import Session, load


__all__ = ["Prompt", "Reply", "SamplerSettings", "Session", "draw", "load", "reply_to"]
