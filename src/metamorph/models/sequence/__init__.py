"""From a conversation to one sequence of ids, labels and visual targets.

Which templates does `--version` name?        `chat_templates.py`
What of a template is learnt?                 `chat_template.py`; its date: `template_date.py`
How long may a template compute?              `bounded_jinja.py`
How do ids and labels grow together?          `conversations.py`, driven by `conversation_encoder.py`
How is an answer taken apart?                 `answers.py`
How does text become ids, not control tokens? `text_encoding.py`
Which tokens stand for images?                `image_tokens.py`
Which values are shared?                      `constants.py`
"""
