"""What the model cards of all results share: the head that the Hub reads, tables, licences, names without paths."""

import importlib.metadata
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from metamorph import __version__
from metamorph.flags.checks import printable


CARD_FILE = "README.md"
UNKNOWN_LICENSE = "unknown"
"""The Hub's own word for it."""


def render_card(
    name: str,
    sections: Iterable[str],
    *,
    parts: Iterable[str],
    license_name: str | None,
    tags: Sequence[str],
    pipeline_tag: str,
    library: str = "metamorph",
) -> str:
    """The text of a card: metadata for the Hub, the title, then the sections.

    Args:
        name: Hub id or folder of the result.
        sections: Markdown.
        parts: Folders and Hub ids that the result was trained from.
        license_name: Licence of the result; None for unknown.
        tags: For the Hub's search.
        pipeline_tag: The Hub's name of the task.
        library: The Hub's name of the library that opens the result.
    """
    metadata = ModelCardData(
        library_name=library,
        pipeline_tag=pipeline_tag,
        license=license_name or UNKNOWN_LICENSE,
        base_model=[part for part in parts if not _is_local(part)] or None,
        tags=list(tags),
    )
    return "\n".join([f"---\n{metadata.to_yaml()}\n---\n", f"# {escaped(name.rpartition('/')[2])}\n", *sections])


def table(title: str, left: str, right: str, rows: Iterable[tuple[str, Any]]) -> str:
    """A section with a table of two columns; rows whose value is None are left out.

    Args:
        title: Of the section.
        left: Head of the first column, which is set as code.
        right: Head of the second.
        rows: Their cells.
    """
    lines = [f"| {code(name)} | {escaped(_text(value))} |" for name, value in rows if value is not None]
    return "\n".join([f"## {title}\n", f"| {left} | {right} |", "| --- | --- |", *(lines or ["| - | none |"])]) + "\n"


def licences(result: str | None, data: str | None) -> str:
    """The section about licences.

    Args:
        result: Of the result; None for unknown.
        data: Of the training data.
    """
    unknown = "unknown (not given to the training command; ask the author before use)"
    return (
        "## Licences\n\n"
        f"- This result: {escaped(result or unknown)}\n"
        f"- Training data: {escaped(data or unknown)}\n"
        "- The models it was trained from have licences of their own, which bind this result, too.\n"
    )


def versions(*libraries: str) -> list[tuple[str, str]]:
    """Rows with the versions of this package and of the given libraries."""
    return [("metamorph", __version__), *((library, importlib.metadata.version(library)) for library in libraries)]


def shown(name: str) -> str:
    """Of a path on this machine only the last part: a card is read elsewhere."""
    return Path(name).name if _is_local(name) else name


def code(text: str) -> str:
    """A name as code. It may be a stranger's: a backtick would end the code, a bar the cell of a table."""
    line = " ".join(printable(text).split())
    return "`" + line.replace("`", "'").replace("|", r"\|") + "`"


def escaped(text: str) -> str:
    """Text on one line in which nothing is Markdown or HTML."""
    return re.sub(r"[\\`*<>\[\]|]", r"\\\g<0>", " ".join(printable(text).split()))


def _is_local(name: str) -> bool:
    return os.path.isabs(name) or name.startswith("~") or Path(name).exists()


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(getattr(value, "value", value))  # of Transformers' enumerations the value
