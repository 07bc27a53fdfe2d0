"""Metrics of benchmarks.

What is a metric, and which are there?    `base.py`
Short answers: how are they compared?     `text.py`
Is a short answer right?                  `exact_match.py`, `relaxed_accuracy.py`, `anls.py`, `vqa_accuracy.py`
Yes or no                                 `yes_no.py`
Multiple choice, also in groups           `multiple_choice.py`
"""

METRICS: dict[str, str] = {
    "exact_match": "metamorph.evaluation.metrics.exact_match:ExactMatch",
    "relaxed_accuracy": "metamorph.evaluation.metrics.relaxed_accuracy:RelaxedAccuracy",
    "anls": "metamorph.evaluation.metrics.anls:Anls",
    "vqa_accuracy": "metamorph.evaluation.metrics.vqa_accuracy:VqaAccuracy",
    "yes_no": "metamorph.evaluation.metrics.yes_no:YesNo",
    "multiple_choice": "metamorph.evaluation.metrics.multiple_choice:MultipleChoice",
    "paired_choice": "metamorph.evaluation.metrics.multiple_choice:PairedChoice",
    "circular_choice": "metamorph.evaluation.metrics.multiple_choice:CircularChoice",
}
"""Metrics by their names in specs, as `module:Class`; a module is imported when a spec names its metric."""
