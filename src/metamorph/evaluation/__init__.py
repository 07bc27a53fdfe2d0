"""How good a model and a visualizer are: answers, drawings and visual tokens, judged by what the caller passes in."""
