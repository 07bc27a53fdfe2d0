"""`metamorph chat --model DIR [--visualizer DIR]`: a conversation with images, on a terminal or from a pipe."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamorph.cli.shared import add_answer_flags, check_answer_flags, open_answering_session, open_images
from metamorph.cli.terminal import AnswerPrinter, find_protocol
from metamorph.flags.checks import printable
from metamorph.flags.parser import FlagParser, nearest, output_folder


if TYPE_CHECKING:
    from PIL import Image

    from metamorph.inference import Chat, Reply, SamplerSettings, Sampling


logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = Path("chat")
HISTORY_LENGTH = 1000
COMMANDS = {
    "/image": ("FILE", "show the model an image with your next words; may be repeated"),
    "/video": ("FILE", "show it a video"),
    "/save": ("FILE", "write the conversation as JSON, and its images in a folder next to it"),
    "/retry": ("", "answer the last words again, with the next seed"),
    "/reset": ("", "forget the conversation"),
    "/help": ("", "list the commands"),
    "/quit": ("", "leave; so do Ctrl-D and Ctrl-C"),
}
"""Commands with their argument and what they do."""


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(
        prog="metamorph chat",
        description="Talk to a model. Its images are saved, and shown on terminals that can (kitty, iTerm2, sixel).",
        epilog="Lines that begin with / are commands: "
        + "; ".join(" ".join((name, *words)) for name, words in COMMANDS.items()),
    )
    parser.add_argument("--system", help="system message")
    parser.add_argument("--output-dir", type=output_folder, default=DEFAULT_OUTPUT, help="folder of the images")
    parser.add_argument("--no-history", action="store_true", help="do not keep the lines for the next chat")
    add_answer_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Answer the lines of stdin; 1 if they came from a pipe or file and one of them failed."""
    flags = build_parser().parse_args(argv)
    sampling, settings = check_answer_flags(flags)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    session = open_answering_session(flags)
    conversation = Conversation(session.chat(flags.system), flags, sampling, settings)
    if is_terminal:
        print("/help lists the commands; Ctrl-C ends an answer", file=sys.stderr)
        with line_editing(None if flags.no_history else history_file()):
            conversation.run(prompted_lines())
        return 0
    conversation.run(line.rstrip("\n") for line in sys.stdin)
    return int(conversation.has_failed)


class Conversation:
    """Takes lines, which are commands or words for the model, and prints the answers."""

    def __init__(self, chat: Chat, flags: argparse.Namespace, sampling: Sampling, settings: SamplerSettings) -> None:
        self.chat = chat
        self.flags = flags
        self.sampling = sampling
        self.settings = settings
        self.protocol = find_protocol()
        self.has_failed = False
        self._images: list[Image.Image] = []
        self._videos: list[list[Image.Image]] = []
        self._words = ""
        self._retries = 0
        self._saved: set[Path] = set()

    def run(self, lines: Iterator[str]) -> None:
        """Take lines until they end, or one is `/quit`. An error is printed and ends nothing."""
        for line in lines:
            if line.strip() == "/quit":
                return
            try:
                self._take(line)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                self.has_failed = True
                print(printable(f"error: {error}"), file=sys.stderr)

    def _take(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        if not line.strip():
            return
        if not line.startswith("/"):
            self._answer(line)
        elif name not in COMMANDS:
            near = nearest(name, COMMANDS)
            hint = f": did you mean {near}?" if near else ""
            raise ValueError(f"unknown command {name}{hint} (/help lists all; begin with a space to say it)")
        elif COMMANDS[name][0]:
            if not argument.strip():
                raise ValueError(f"{name} needs a file: {name} FILE")
            getattr(self, f"_{name[1:]}")(Path(argument.strip()).expanduser())
        else:
            getattr(self, f"_{name[1:]}")()

    def _image(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"/image {file} does not exist")
        self._images += open_images([file], "/image")

    def _video(self, file: Path) -> None:
        from metamorph.inference.media import load_video

        if not file.is_file():
            raise ValueError(f"/video {file} does not exist")
        self._videos.append(load_video(file, self.flags.fps, self.flags.max_frames))

    def _save(self, file: Path) -> None:
        from metamorph.inference.answer_files import save_conversation

        folder = file.with_suffix("")
        if folder == file:
            raise ValueError(f"/save {file}: give a name that ends in .json")
        if file not in self._saved and (taken := next((each for each in (file, folder) if each.exists()), None)):
            raise ValueError(f"/save {file}: {taken} exists; give another name")
        save_conversation(self.chat.messages, file)
        self._saved.add(file)
        print(f"[saved: {file}]")

    def _reset(self) -> None:
        self.chat.reset()
        self._images, self._videos, self._retries = [], [], 0

    def _help(self) -> None:
        for name, (argument, words) in COMMANDS.items():
            print(f"{name:<7} {argument:<5} {words}")

    def _retry(self) -> None:
        self._retries += 1
        self._print(self.chat.retry, self._words)

    def _answer(self, words: str) -> None:
        from metamorph.inference.prompt import place_media

        prompt, media = place_media(words, self._images, self._videos)
        self._retries = 0
        # A turn that fails or is dropped leaves its images for the next one, and the last answer for /retry.
        if self._print(lambda **options: self.chat.reply(prompt, media, **options), words):
            self._words, self._images, self._videos = words, [], []

    def _print(self, answer: Callable[..., Reply], words: str) -> bool:
        """Generate an answer to `words` and print it meanwhile; Ctrl-C ends it. Returns whether the chat keeps it."""
        from metamorph.inference.answer_files import AnswerFiles, drawing_metadata

        seed = self.settings.seed + self._retries
        settings, sampling = replace(self.settings, seed=seed), replace(self.sampling, seed=seed)
        metadata = drawing_metadata(self.flags.model, self.flags.visualizer, words, sampling, settings)
        files = AnswerFiles(self.flags.output_dir / "image.png", metadata, settings)
        printer = AnswerPrinter(files, protocol=self.protocol)
        before = self.chat.messages
        with stopped_by_ctrl_c() as cancelled:
            answer(
                settings=settings,
                sampling=sampling,
                max_new_tokens=self.flags.max_new_tokens,
                on_part=printer,
                cancelled=cancelled,
            )
        is_kept = self.chat.messages is not before
        dropped = "" if is_kept else " before its first word: the chat is as before"
        printer.end(f"[stopped{dropped}]" if cancelled.is_set() else "")
        return is_kept


@contextmanager
def stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one is a `KeyboardInterrupt` as usual."""
    cancelled = threading.Event()

    def stop(number: int, frame: Any) -> None:
        cancelled.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, before)


def prompted_lines() -> Iterator[str]:
    """Lines that the user types, until Ctrl-D."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def history_file() -> Path:
    """Where lines are kept from one chat to the next: in the user's folder of states (XDG base directories)."""
    folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder) / "metamorph" / "chat_history"


def completions(line: str, word: str) -> list[str]:
    """Completions of `word`, the end of `line` after its last space or slash: commands, or files."""
    name, space, argument = line.partition(" ")
    if not space:
        known = (f"{each} " if argument else each for each, (argument, _) in COMMANDS.items() if each.startswith(name))
        return [each[1:] for each in known if line.startswith("/")]
    if not COMMANDS.get(name, ("",))[0]:
        return []
    folder, slash, start = argument.lstrip().rpartition("/")
    files = (file for file in Path(folder + slash).expanduser().iterdir() if file.name.startswith(start))
    shown = (file for file in files if start or not file.name.startswith("."))
    return sorted(file.name[len(start) - len(word) :] + ("/" if file.is_dir() else "") for file in shown)


@contextmanager
def line_editing(file: Path | None) -> Iterator[None]:
    """Let the user edit lines, complete commands and paths by Tab, and recall earlier lines, also of earlier chats if
    there is a `file`.
    """
    if find_spec("readline") is None:  # Windows
        yield
        return
    import readline

    found: list[str] = []

    def complete(word: str, number: int) -> str | None:
        if number == 0:
            found[:] = completions(readline.get_line_buffer()[: readline.get_endidx()], word)
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" /")
    readline.set_completer(complete)
    is_libedit = "libedit" in (readline.__doc__ or "")  # on macOS
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    readline.set_history_length(HISTORY_LENGTH)
    if file is None:
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError as error:
        logger.warning("%s cannot be used, so the history ends with this chat: %s", file, error)
        yield
        return
    try:
        yield
    finally:
        readline.write_history_file(file)
