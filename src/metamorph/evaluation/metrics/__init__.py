"""Metrics of benchmarks.

What is a metric, and which are there?    `base.py`
Objects, numbers, colours, places         `geneval.py`
What a judge at an endpoint says      `judged.py`: DPG-Bench, WISE, edits
CLIP score and Fréchet distances          `captions.py`
What an edit keeps and changes            `edits.py`
Generated and true visual tokens          `visual_tokens.py`
"""

METRICS: dict[str, str] = {
    "captions": "metamorph.evaluation.metrics.captions:Captions",
    "dpg": "metamorph.evaluation.metrics.judged:Dpg",
    "edit_judge": "metamorph.evaluation.metrics.judged:EditJudge",
    "edits": "metamorph.evaluation.metrics.edits:Edits",
    "geneval": "metamorph.evaluation.metrics.geneval:Geneval",
    "visual_tokens": "metamorph.evaluation.metrics.visual_tokens:VisualTokens",
    "wise": "metamorph.evaluation.metrics.judged:Wise",
}
"""Metrics by their names in specs, as `module:Class`; a module is imported when a spec names its metric."""
