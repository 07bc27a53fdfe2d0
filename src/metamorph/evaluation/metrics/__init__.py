"""Metrics of benchmarks.

What is a metric, and which are there?    `base.py`
Short answers: how are they compared?     `text.py`
Is a short answer right?                  `exact_match.py`, `relaxed_accuracy.py`, `anls.py`, `vqa_accuracy.py`
Yes or no                                 `yes_no.py`
Multiple choice, also in groups           `multiple_choice.py`
Objects, numbers, colours, places         `geneval.py`
What a judge at an endpoint says      `judged.py`: DPG-Bench, WISE, edits
CLIP score and Fréchet distances          `captions.py`
What an edit keeps and changes            `edits.py`
Generated and true visual tokens          `visual_tokens.py`
Answers to your own records               `answers.py`
"""

METRICS: dict[str, str] = {
    "anls": "metamorph.evaluation.metrics.anls:Anls",
    "answers": "metamorph.evaluation.metrics.answers:Answers",
    "captions": "metamorph.evaluation.metrics.captions:Captions",
    "circular_choice": "metamorph.evaluation.metrics.multiple_choice:CircularChoice",
    "dpg": "metamorph.evaluation.metrics.judged:Dpg",
    "edit_judge": "metamorph.evaluation.metrics.judged:EditJudge",
    "edits": "metamorph.evaluation.metrics.edits:Edits",
    "exact_match": "metamorph.evaluation.metrics.exact_match:ExactMatch",
    "geneval": "metamorph.evaluation.metrics.geneval:Geneval",
    "multiple_choice": "metamorph.evaluation.metrics.multiple_choice:MultipleChoice",
    "paired_choice": "metamorph.evaluation.metrics.multiple_choice:PairedChoice",
    "relaxed_accuracy": "metamorph.evaluation.metrics.relaxed_accuracy:RelaxedAccuracy",
    "visual_tokens": "metamorph.evaluation.metrics.visual_tokens:VisualTokens",
    "vqa_accuracy": "metamorph.evaluation.metrics.vqa_accuracy:VqaAccuracy",
    "wise": "metamorph.evaluation.metrics.judged:Wise",
    "yes_no": "metamorph.evaluation.metrics.yes_no:YesNo",
}
"""Metrics by their names in specs, as `module:Class`; a module is imported when a spec names its metric."""
