"""Chat templates that print the date: it is fixed once, so a resumed run writes the same text."""

import re
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from metamorph.models.sequence.constants import OTHER_VERSION


_DATE = re.compile(r"""strftime_now\(\s*(['"])(.+?)\1\s*\)""")


def with_fixed_date(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Replace calls for the date in a Jinja template by today's date; their formats must be literals."""
    now = datetime.now()
    fixed = _DATE.sub(lambda call: repr(now.strftime(call[2])), source)
    if "strftime_now(" in fixed:
        raise ValueError(
            f"the chat template of {name_of(tokenizer)} prints the date in a format that it computes, so that it would "
            f"change during training; write the format out, or {OTHER_VERSION}"
        )
    return fixed


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of a tokenizer in messages."""
    return f"the tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "this tokenizer"
