"""The argument parser of all commands, which suggests the nearest name for an unknown one, and types of flags."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn


NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-(inf|infinity|nan)", re.IGNORECASE)
"""A value rather than a flag; unlike argparse's own expression, with exponents."""


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes dashes and underscores alike, no abbreviations, and finite numbers only.

    Help texts end with the default. Errors are raised as `ValueError` and suggest the nearest flag or choice.
    Subcommands get parsers of this class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._negative_number_matcher = re.compile(f"(?:{NEGATIVE_NUMBER.pattern})$", re.IGNORECASE)
        self.register("type", float, finite_number)
        self.register("type", int, whole_number)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add a flag, with its default in the help text."""
        action = super().add_argument(*names, **options)
        action.help = with_default(action.help, action)
        return action

    def parse_known_args(  # type: ignore[override]  # overloaded there
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does, whichever way flags are spelled."""
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words):
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # what follows is positional, or belongs to the subcommand
            words[index] = self._as_defined(word)
        return super().parse_known_args(words, namespace)

    def _as_defined(self, word: str) -> str:
        """A flag in the spelling it was defined with; other words unchanged."""
        name, equals, value = word.partition("=")
        known = self._option_string_actions
        if not word.startswith("-") or word == "-" or name in known or " " in name or NEGATIVE_NUMBER.fullmatch(word):
            return word
        spellings = {_plain(flag): flag for flag in reversed(list(known))}  # the first spelling of a flag wins
        if name.startswith("--") and _plain(name) in spellings:
            return f"{spellings[_plain(name)]}{equals}{value}"
        near = nearest(_plain(name), spellings)
        self.error(f"unknown flag {name}" + (f": did you mean {spellings[near]}?" if near else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown_choice(value, action.choices))

    def error(self, message: str) -> NoReturn:
        """Raise a `ValueError` instead of printing the usage and exiting."""
        message = re.sub(r"(--[\w-]+)(/--[\w-]+)+", r"\1", message)  # name one spelling of each flag
        if message.startswith("argument "):  # a bad value, which the message explains
            raise ValueError(re.sub(r"^argument (\S+): ", r"\1 ", message))
        raise ValueError(f"{message} (all flags: {self.prog} --help)")


def with_default(text: str | None, action: argparse.Action) -> str | None:
    """A help text, followed by the default of its flag unless there is none or the text names it."""
    default = action.default
    if text is None or "(default: " in text or action.nargs == 0 or default in (None, "", [], argparse.SUPPRESS):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} (default: {shown})"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant, or None."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


def unknown_choice(value: object, allowed: Iterable[object]) -> str:
    """`'x' is unknown: use one of y, z (did you mean 'y'?)`."""
    names = [str(name) for name in allowed]
    near = nearest(str(value), names)
    hint = f" (did you mean {near!r}?)" if near else ""
    return f"{str(value)!r} is unknown: use one of {', '.join(names)}{hint}"


def finite_number(text: str) -> float:
    """Type of a flag: a number, neither `nan` nor infinite."""
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return number


def whole_number(text: str) -> int:
    """Type of a flag: an integer."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error


def at_least(least: float, kind: Callable[[str], Any] = whole_number) -> Callable[[str], Any]:
    """Type of a flag: a `whole_number` or `finite_number` of at least `least`."""

    def read(text: str) -> Any:
        number = kind(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return number

    return read


def positive_number(text: str) -> float:
    """Type of a flag: a finite number above 0."""
    number = finite_number(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return number


def existing_file(kind: str) -> Callable[[str], str]:
    """Type of a flag: path of an existing file; `kind` says what to give, such as `an image file`."""

    def read(text: str) -> str:
        path = Path(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder: give {kind}")
        if "://" in text:
            raise argparse.ArgumentTypeError(f"{text} is a URL, and nothing is downloaded: give a local file")
        if not path.is_file():
            raise argparse.ArgumentTypeError(f"{text} does not exist")
        return text

    return read


image_file = existing_file("an image file")
"""Type of a flag: path of an existing image file."""


def output_folder(text: str) -> Path:
    """Type of a flag: path of a folder to write, which need not exist."""
    path = Path(text).expanduser()
    if (file := file_in_the_way(path)) is not None:
        raise argparse.ArgumentTypeError(f"{text} cannot be written to: {file} is a file; give a folder")
    return path


def output_file(text: str) -> Path:
    """Type of a flag: path of a file to write, which need not exist."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file")
    if (file := file_in_the_way(path.parent)) is not None:
        raise argparse.ArgumentTypeError(f"{text} cannot be written to: {file} is a file; give another folder")
    return path


def file_in_the_way(folder: Path) -> Path | None:
    """The file that keeps `folder` from being created: itself or its nearest existing parent, unless a folder."""
    found = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return None if found is None or found.is_dir() else found


def _plain(flag: str) -> str:
    """A flag without leading dashes, its words joined by underscores."""
    return flag.lstrip("-").replace("-", "_")
