"""How good a model and a visualizer are, with a judge that the caller passes in or a benchmark's spec names.

Are answers right?                        `questions.py`
Do drawings show what was asked for?      `drawings.py`
Are visual tokens near the true ones?     `tokens.py`
Benchmarks: what is run, and how?         `benchmarks/`
What is a sample, and what an answer?     `samples.py`; from files: `loaders/`; judged: `metrics/`
How are the options of a spec checked?    `options.py`
What finds objects and colours?           `detectors.py`; texts and images as vectors: `clip.py`
How is another model asked to judge?      `endpoint.py`
Are benchmarks in training data?          `overlap.py`
What is the loss on other data?           `losses.py`
How does lmms-eval ask a model?           `lmms_eval_model.py`
How good is a visualizer alone?           `visualizer.py`; LPIPS and FID `perceptual.py`
"""
