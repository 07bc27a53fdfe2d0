"""What all commands share about flags: help texts from docstrings, and errors that name the flag and can be printed."""

import ast
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

from metamorph.flags.parser import unknown_choice


HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_TIMEOUT = 10
"""Seconds to wait for the Hub's answer whether a model exists."""


_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""All but tab and line end: what a terminal obeys, what turns the direction of text round, and half characters."""


class RemembersGiven:
    """Base of a dataclass of flags that remembers which of them were given, be it with the value of the default."""

    _given: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - the class says it
        flags = super().__new__(cls)
        names = [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]
        flags._given = frozenset(names[: len(args)]) | frozenset(kwargs)
        return flags

    def is_given(self, name: str) -> bool:
        """Whether the field `name` was given when the object was built."""
        return name in self._given


def attribute_docs(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a class and of our classes it inherits from, by field, each on one line."""
    docs = {}
    for cls in reversed(kind.__mro__):
        if not cls.__module__.startswith("metamorph."):
            continue  # the fields of `transformers.TrainingArguments` have help texts of their own
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                text = getattr(below.value, "value", None)
                if isinstance(text, str):
                    docs[field.target.id] = " ".join(text.split())
    return docs


def printable(text: str) -> str:
    """Text with control characters as escapes: names and paths of strangers must not command the terminal.

    Args:
        text: The text; its tabs and line ends are kept.
    """
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_choice(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check that `value` is one of `allowed`.

    Raises:
        ValueError: naming flag, value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{flag} {unknown_choice(value, allowed)}")


def check_model_reference(name: str, flag: str, file: str = "config.json") -> None:
    """Check that `name` is a model folder, or can be a Hub id, without loading or downloading anything.

    Args:
        name: Folder or Hub id.
        flag: Flag that the error message names.
        file: File that such a folder must hold.

    Raises:
        FileNotFoundError: if the folder, or the file in it, is missing.
    """
    folder = Path(name)
    if os.path.isdir(name):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{flag} {name} is a folder without {file}: give a folder written by save_pretrained"
            )
        return
    # `out/model` is a mistyped path rather than a Hub id when there is a local folder `out`.
    is_path = HUB_ID.fullmatch(name) is None or (folder.parent != Path(".") and os.path.isdir(folder.parent))
    if is_path or name.upper().startswith("PATH_TO"):
        raise FileNotFoundError(f"{flag} {name} does not exist: give an existing model folder or a Hub id (owner/name)")


def check_reachable(name: str, flag: str, file: str = "config.json") -> None:
    """Ask the Hub once, without the minutes of retries of a download, whether a model that is no folder exists.

    Args:
        name: Folder or Hub id.
        flag: Flag that the error message names.
        file: File that such a model must hold.

    Raises:
        FileNotFoundError: if the model is neither a folder, nor in the Hub's cache, nor on the Hub; or the Hub cannot
            be reached.
    """
    if Path(name).is_dir() or constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, file), str):
        return
    request = Request(hf_hub_url(name, file), method="HEAD")
    try:
        with urlopen(request, timeout=HUB_TIMEOUT):
            return
    except HTTPError as error:
        if error.code != HTTPStatus.NOT_FOUND:
            return  # private or gated, say: loading gives the better message
        reason = f"the Hub has no {file} of that name"
    except OSError as error:
        reason = f"the Hub cannot be reached ({error})"
    raise FileNotFoundError(f"{flag} {name} is not a local folder, and {reason}: check the path or the name")


@contextmanager
def names_flag(flag: str, value: str) -> Iterator[None]:
    """Turn what Transformers and diffusers raise for a missing or unknown model into an error that names the flag.

    Args:
        flag: The flag, with dashes.
        value: Its value.
    """
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{flag} {value} cannot be loaded: {reason}") from error
    except (ValueError, KeyError) as error:
        message = str(error)
        if flag in message:
            raise
        raise ValueError(f"{flag} {value} cannot be used: {message}") from error
