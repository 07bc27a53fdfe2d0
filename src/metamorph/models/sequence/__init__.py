"""From a conversation to one sequence of ids, labels and visual targets.

How does a template write a conversation?     `chat_templates.py`
What may templates of strangers do?           `bounded_jinja.py`
How do ids and labels grow together?          `conversations.py`
How does text become ids, and never control?  `text_encoding.py`
Which tokens stand for images?                `image_tokens.py`
Which values must all agree on?               `constants.py`
"""
