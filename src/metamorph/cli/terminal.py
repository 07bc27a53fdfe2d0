"""Answers on a terminal: text as it is written, images by the names of their files, and as pixels where it can."""

from __future__ import annotations

import base64
import io
import os
import re
import select
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from metamorph.flags.checks import printable


if TYPE_CHECKING:
    from PIL import Image

    from metamorph.inference.answer_files import AnswerFiles
    from metamorph.inference.streaming import Part


Protocol = Literal["kitty", "iterm2", "sixel"]

SHOWN_SIDE = 320
"""Largest width and height of images on a terminal, in pixels."""
_ANSWER_SECONDS = 0.3
_KITTY_CHUNK = 4096
_SIXEL_COLOURS = 255


class AnswerPrinter:
    """Called with the parts of an answer: prints text at once, saves images and prints the names of their files."""

    def __init__(
        self,
        files: AnswerFiles,
        *,
        preview: Callable[[Image.Image, Path], str] = lambda image, file: "",
        protocol: Protocol | None = None,
    ) -> None:
        self.files = files
        self.preview = preview
        self.protocol = protocol
        self._is_at_start = True  # of a line

    def __call__(self, part: Part) -> None:
        """Print a part."""
        from metamorph.models.processing_metamorph import TextPart

        if isinstance(part, TextPart):
            text = printable(part.text)
            self._write(text.lstrip() if self._is_at_start else text)
            return
        self._end_line()
        files = self.files.add(part)
        if not part.images:
            self._write(f"[image: not drawn without --visualizer; its visual tokens: {files[0]}]\n")
            return
        for image, file in zip(part.images, files, strict=True):
            preview = self.preview(image, file) if len(files) == 1 else ""
            self._write(f"[image: {file}{preview}]\n")
            if self.protocol is not None:
                self._write(f"{inline_image(image, self.protocol)}\n")

    def save(self, part: Part) -> None:
        """Save a part that is an image, and print nothing."""
        from metamorph.models.processing_metamorph import ImagePart

        if isinstance(part, ImagePart):
            self.files.add(part)

    def end(self, line: str = "") -> None:
        """End the answer, with a last line."""
        self._end_line()
        if line:
            self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._is_at_start = text.endswith("\n")

    def _end_line(self) -> None:
        if not self._is_at_start:
            self._write("\n")


def find_protocol() -> Protocol | None:
    """How this terminal shows images, by its environment or its answer; None if it cannot, or there is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") == "dumb":
        return None
    if "TMUX" not in os.environ and not os.environ.get("TERM", "").startswith(("screen", "tmux")):
        # Inside tmux these describe the terminal around it, whose images tmux does not pass on.
        program = os.environ.get("TERM_PROGRAM", "")
        if "kitty" in os.environ.get("TERM", "") or "KITTY_WINDOW_ID" in os.environ or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty") or os.environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    return "sixel" if 4 in _terminal_attributes() else None


def _terminal_attributes() -> set[int]:
    """The primary device attributes that the terminal reports; 4 is sixel. Empty if it does not answer."""
    if find_spec("termios") is None:  # Windows
        return set()
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before, answer = termios.tcgetattr(terminal), b""
    try:
        tty.setcbreak(terminal)
        sys.stdout.write("\x1b[c")
        sys.stdout.flush()
        until = time.monotonic() + _ANSWER_SECONDS
        while not answer.endswith(b"c") and select.select([terminal], [], [], max(until - time.monotonic(), 0))[0]:
            answer += os.read(terminal, 1)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    match = re.search(rb"\x1b\[\?([\d;]+)c", answer)
    return set() if match is None else {int(number) for number in match[1].split(b";") if number}


def inline_image(image: Image.Image, protocol: Protocol) -> str:
    """The sequence that shows an image, enlarged if it is small, at the cursor."""
    from metamorph.inference.answer_files import enlarged

    shown = enlarged(image).convert("RGB")
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    if protocol == "sixel":
        return _sixel(shown)
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    if protocol == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(buffer.getvalue())}:{data}\a"
    chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    keys = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]  # transmit and display a PNG, without an answer
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(
        f"\x1b_G{key}m={is_more};{chunk}\x1b\\" for key, is_more, chunk in zip(keys, more, chunks, strict=True)
    )


def _sixel(image: Image.Image) -> str:
    """An RGB image as DEC sixels: bands of six rows, in each of which every colour is drawn over the others."""
    indexed = image.quantize(_SIXEL_COLOURS)
    palette = indexed.getpalette() or []
    pixels = indexed.tobytes()
    rows = [pixels[start : start + image.width] for start in range(0, len(pixels), image.width)]
    colours = [
        f"#{number};2;" + ";".join(str(round(value * 100 / 255)) for value in palette[3 * number : 3 * number + 3])
        for number in sorted(set(pixels))
    ]
    bands = []
    for start in range(0, image.height, 6):
        band = rows[start : start + 6]
        columns = list(zip(*band, strict=True))
        lines = []
        for colour in sorted({pixel for row in band for pixel in row}):
            codes = (sum(1 << bit for bit, pixel in enumerate(column) if pixel == colour) for column in columns)
            runs = ((chr(63 + code), len(list(run))) for code, run in groupby(codes))
            lines.append(
                f"#{colour}" + "".join(f"!{count}{char}" if count > 3 else char * count for char, count in runs)
            )
        bands.append("$".join(lines))
    return f'\x1bPq"1;1;{image.width};{image.height}{"".join(colours)}{"-".join(bands)}\x1b\\'
