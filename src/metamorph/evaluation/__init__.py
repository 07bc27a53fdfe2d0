"""How good a model and a visualizer are, with a judge that the caller passes in.

Are answers right?                        `questions.py`
Do drawings show what was asked for?      `drawings.py`
Are visual tokens near the true ones?     `tokens.py`
Benchmarks with a spec: what, how?        `benchmarks/`, with `loaders/` of their files and `metrics/`
What is the loss on other data?           `losses.py`
How good is a visualizer alone?           `visualizer.py`; LPIPS and FID `perceptual.py`
"""
