"""From a conversation to one sequence of ids, labels and visual targets.

Which templates does `--version` name?        `chat_templates.py`
What of a template is learned?                 `chat_template.py`; its date: `template_date.py`
How is a template limited?                    `bounded_jinja.py`
How are ids and labels built together?        `conversations.py`, called by `conversation_encoder.py`
How are generated ids split?                  `conversations.py`
How does text become ids, not control tokens? `text_encoding.py`
Which tokens mark images?                     `image_tokens.py`
Which values are shared?                      `constants.py`
"""
