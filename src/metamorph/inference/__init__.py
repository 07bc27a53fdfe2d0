"""Using a trained model: answer prompts, and draw the images of the answers.

How are model and visualizer loaded?      `session.py`: `load`, which gives one object that answers and draws
What can the model be asked?              `prompt.py`
How does a prompt become an answer?       `reply.py`: `reply_to`; rows of a batch are independent of each other
How is a token of text chosen?            `sampling.py`
How is an answer streamed and ended?      `streaming.py`
How do visual tokens become pixels?       `draw.py`: `draw`
How does a conversation continue?         `chat.py`; `prefix_cache.py` keeps what was computed
How do videos become images of a prompt?  `media.py`
Which files are written of an answer?     `answer_files.py`
How is a file of prompts answered?        `batch_file.py`: `run_batch`; its lines and results: `batch_lines.py`
"""

from metamorph.inference.chat import Chat
from metamorph.inference.draw import SamplerSettings, draw
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply, reply_to
from metamorph.inference.sampling import Sampling
from metamorph.inference.session import Session, load


__all__ = ["Chat", "Prompt", "Reply", "SamplerSettings", "Sampling", "Session", "draw", "load", "reply_to"]
