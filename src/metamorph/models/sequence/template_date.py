"""Templates that print the day: it is fixed once, so that a resumed run writes what the first one wrote."""

from __future__ import annotations

import re
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from metamorph.models.sequence.constants import VERSIONS


_DATE = re.compile(r"""strftime_now\(\s*(['"])(.+?)\1\s*\)""")


def with_fixed_date(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template with today's date in place of the calls that ask for it.

    Args:
        source: The Jinja template.
        tokenizer: Has its name in the message of an error.

    Raises:
        ValueError: If there is a call whose format is not written out.
    """
    now = datetime.now()
    fixed = _DATE.sub(lambda call: repr(now.strftime(call[2])), source)
    if "strftime_now(" in fixed:
        raise ValueError(
            f"the chat template of {name_of(tokenizer)} prints the date in a format that it computes, so that it would "
            f"change during training; write the format out, or choose another --version ({', '.join(VERSIONS[:-1])})"
        )
    return fixed


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What messages call a tokenizer."""
    return f"the tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "this tokenizer"
