"""Functions of the tasks in this folder; their documents are written by `tests/evaluation/test_lmms_eval.py`."""

import json

from PIL import Image


def visuals(doc):
    return [Image.open(doc["image"])]


def no_visuals(doc):
    return []


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def visual_cot_text(doc, lmms_eval_specific_kwargs=None):
    return f"[GEN_PROMPT]draw a red circle[/GEN_PROMPT][QUESTION]{doc['question']}[/QUESTION]"


def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    """The question, then the same one about the previous answer, then the end."""
    if round_idx is None:
        return doc["question"]
    asked = (previous_round_info or 0) + 1
    return visuals(doc), f"you said {previous_output[-1]}. {doc['question']}", round_idx == 2, previous_output, asked


def accuracy(doc, results):
    found = results[0][-1] if isinstance(results[0], list) else results[0]
    return {"accuracy": float(found.strip().lower() == doc["answer"])}


def num_images(doc, results):
    images = json.loads(results[0])["images"]
    return {"num_images": float(sum(Image.open(file).size == (64, 64) for file in images))}
