"""The argument parser of all commands: dashes or underscores, no abbreviations, the nearest name for a wrong one."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-(inf|infinity|nan)", re.IGNORECASE)
"""A value rather than a flag. argparse's own expression lacks exponents."""


class FlagParser(argparse.ArgumentParser):
    """`ArgumentParser` of all commands.

    A flag may be written with dashes or underscores, but not abbreviated. A number must be finite. Errors are raised
    as `ValueError`, and name the nearest flag or choice for an unknown one. Subcommands get parsers of the same class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._negative_number_matcher = re.compile(f"(?:{NEGATIVE_NUMBER.pattern})$", re.IGNORECASE)
        self.register("type", float, finite_number)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, with the flags in the spelling they were defined with.

        Raises:
            ValueError: for an unknown flag, or a value that is not allowed.
        """
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words):
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # positional words, or those of the subcommand
            words[index] = self._as_defined(word)
        return super().parse_known_args(words, namespace)

    def _as_defined(self, word: str) -> str:
        """The word, if it is a flag in the spelling that the parser knows.

        Raises:
            ValueError: if it is a flag that the parser does not know.
        """
        name, equals, value = word.partition("=")
        known = self._option_string_actions
        if not word.startswith("-") or word == "-" or name in known or " " in name or NEGATIVE_NUMBER.fullmatch(word):
            return word
        spellings = {_plain(flag): flag for flag in reversed(list(known))}  # the first spelling of a flag counts
        if name.startswith("--") and _plain(name) in spellings:
            return f"{spellings[_plain(name)]}{equals}{value}"
        near = nearest(_plain(name), spellings)
        self.error(f"unknown flag {name}" + (f": did you mean {spellings[near]}?" if near else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown_choice(value, action.choices))

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting.

        Args:
            message: What argparse found wrong.
        """
        message = re.sub(r"(--[\w-]+)(/--[\w-]+)+", r"\1", message.removeprefix("argument "))  # one spelling of each
        raise ValueError(f"{message} (all flags: {self.prog} --help)")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_choice(value: object, allowed: Iterable[object]) -> str:
    """`'x' is unknown: use one of y, z (did you mean 'y'?)`."""
    names = [str(name) for name in allowed]
    near = nearest(str(value), names)
    hint = f" (did you mean {near!r}?)" if near else ""
    return f"{str(value)!r} is unknown: use one of {', '.join(names)}{hint}"


def finite_number(text: str) -> float:
    """Read a number; `nan` and infinities are refused.

    Raises:
        argparse.ArgumentTypeError: naming the text.
    """
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def _plain(flag: str) -> str:
    """A flag without leading dashes, words joined by underscores."""
    return flag.lstrip("-").replace("-", "_")
