"""Serving a model to many clients: an HTTP API and a web page in front of one model.

Which requests are answered?              `app.py`: `create_app`; `server.py` runs it until a signal ends it
What is checked before a request is parsed? `guard.py`: key, size and time; `limits.py` has the limits of a request
How are the dialects of OpenAI spoken?    `chat_completions.py`, `images.py`, `responses.py`
What do the dialects share?               `service.py`: checks, prompts, usage
What does a browser show?                 `page.py`, made with Gradio; `page_guard.py` checks its requests
Which images does a request bring?        `request_images.py`; `remote_images.py` fetches those of allowed hosts
What do clients get for errors?           `errors.py`
What is measured?                         `metrics.py`
How do requests share the model?          `engine.py`; `batcher.py` joins what waits to batches
"""
