"""Options of multiple-choice questions: as a prompt shows them, and as the metric reads them."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from metamorph.evaluation.loaders.tables import Row, as_text


LETTER = "Answer with the option's letter from the given choices directly."
"""The instruction of LLaVA-1.5 (arXiv 2310.03744), which MetaMorph's and lmms-eval's evaluations use."""
SHORT = "Answer the question using a single word or phrase."
"""The same for open questions."""
_OPTION = re.compile(r"^\s*(?:\(([A-Z])\)|([A-Z])[.)])\s+(.*\S)", re.MULTILINE)


def lettered(texts: Sequence[str]) -> dict[str, str]:
    """The options by their letters; an empty one is not an option, but has a letter."""
    return {letter: text for letter, text in zip(ascii_uppercase, texts, strict=False) if text}


def option_lines(options: Mapping[str, str]) -> str:
    """One line for each option, for example `A. red`."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def choice_reference(options: Mapping[str, str], answer: str, row: Row) -> dict[str, Any]:
    """The reference of a sample, for the metric `multiple_choice`; the right answer must be one of the letters."""
    if answer not in options:
        raise row.error(f"the right answer {answer!r} is none of the options {', '.join(options)}")
    return {"answer": answer, "options": dict(options)}


def options_in(text: str) -> dict[str, str]:
    """The options in a text with a line for each, such as `(A) red` or `A. red`; none if it has no such lines."""
    found = {match[1] or match[2]: match[3] for match in _OPTION.finditer(text)}
    return found if len(found) > 1 and list(found) == list(ascii_uppercase[: len(found)]) else {}


def parse_list(value: Any, row: Row, column: str) -> list[str]:
    """A list of texts, also one written as a list of JSON or Python."""
    found = _parsed(value) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)):
        raise row.error(f"the column {column!r} must hold a list such as ['red', 'blue'], not {value!r:.80}")
    return [as_text(each) for each in found]


def _parsed(text: str) -> Any:
    """The value that a text of JSON or Python says; None if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
