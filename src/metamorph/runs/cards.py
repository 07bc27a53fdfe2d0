"""Model cards of results: metadata for the Hub, and text from a template that shows untrusted names as plain text."""

import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from metamorph import __version__
from metamorph.files.templates import render
from metamorph.flags.checks import printable


CARD_FILE = "README.md"
UNKNOWN_LICENSE = "unknown"
"""The Hub's own word for it."""


def render_card(
    template: str,
    name: str,
    *,
    parts: Mapping[str, str],
    recipe: Mapping[str, Any],
    libraries: Sequence[str],
    model_license: str | None,
    tags: Sequence[str],
    pipeline_tag: str,
    **values: Any,
) -> str:
    """Render the card of the result `name`, a Hub id or folder.

    `parts` are the folders and Hub ids that it was trained from, `libraries` the packages whose versions belong to the
    recipe; a recipe's values of None are left out. `values` are what only this template names.
    """
    metadata = ModelCardData(
        library_name="metamorph",
        pipeline_tag=pipeline_tag,
        license=model_license or UNKNOWN_LICENSE,
        base_model=[part for part in parts.values() if not _is_local(part)] or None,
        tags=list(tags),
    )
    versions = {library: importlib.metadata.version(library) for library in libraries}
    return render(
        template,
        metadata=metadata.to_yaml(),
        title=name.rpartition("/")[2],
        parts=parts,
        recipe={**recipe, "metamorph": __version__, **versions},
        model_license=model_license,
        code=code,
        escaped=escaped,
        shown=shown,
        **values,
    )


def shown(name: str) -> str:
    """The last part of a local path, or a Hub id: a card is read on other machines."""
    return Path(name).name if _is_local(name) else name


def code(text: str) -> str:
    """Format a name, which may be untrusted, as code. A backtick would end the code, a bar the cell of a table."""
    line = " ".join(printable(text).split())
    return "`" + line.replace("`", "'").replace("|", r"\|") + "`"


def escaped(value: Any) -> str:
    """Format a value on one line in which nothing is Markdown or HTML."""
    # Transformers' enumerations are written as their value.
    text = f"{value:.4g}" if isinstance(value, float) else str(getattr(value, "value", value))
    return re.sub(r"[\\`*<>\[\]|]", r"\\\g<0>", " ".join(printable(text).split()))


def _is_local(name: str) -> bool:
    return os.path.isabs(name) or name.startswith("~") or Path(name).exists()
