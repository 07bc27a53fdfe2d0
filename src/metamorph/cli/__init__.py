"""The `metamorph` command: a table of subcommands, each imported only when it is called.

One file for each command: flags, checks that need no weights, then one call into the packages below.
What several commands share is in `shared.py`.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from metamorph import __version__
from metamorph.runs.ranks import is_first_process


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    module: str
    """Module with `main(argv: Sequence[str])`, which returns its exit status, or None for 0."""
    summary: str
    """One line for `metamorph --help`."""


COMMANDS = {
    "quickstart": Command("metamorph.cli.quickstart", "the whole system in miniature, on a CPU, with a report"),
    "train": Command("metamorph.cli.train", "train the connector (stage 1) or the whole model (stage 2)"),
    "train-visualizer": Command("metamorph.cli.train_visualizer", "train the diffusion decoder of visual tokens"),
    "generate": Command("metamorph.cli.generate", "answer a prompt with text and pictures"),
    "visualize": Command("metamorph.cli.visualize", "draw pictures again from their own visual tokens"),
    "data": Command("metamorph.cli.data", "check training data before it is trained on, show it, cache its features"),
    "evaluate": Command("metamorph.cli.evaluate", "how good a finished model is, with pictures"),
    "study": Command("metamorph.cli.study", "experiments on the miniature world, with error bars"),
    "convert": Command("metamorph.cli.convert", "merge an adapter, or import a checkpoint of the original system"),
    "recipes": Command("metamorph.cli.recipes", "list the recipes for `--config`, or print one"),
    "lr": Command("metamorph.cli.lr", "scale a learning rate to another batch size"),
}

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)
"""What bad input raises, and the lack of an optional package. It is printed as one line; anything else is a fault of
ours and keeps its traceback."""

HARMLESS = {
    # Accelerate imports DeepSpeed where it is installed, also for a run without it.
    "DeepSpeed": r"Setting accelerator to CPU",
    # The text half of every SigLIP, which is not used, has defaults outside its vocabulary.
    "transformers.configuration_utils": r"Model config: [be]os_token_id .* 31999\), got 4940[67]\.",
    # A language model's configuration often names another end than its chat template writes.
    "transformers.trainer_utils": r"The tokenizer has new PAD/BOS/EOS tokens that differ from the model config",
}
"""Loggers of libraries -> warnings of theirs that are harmless in every run."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `metamorph COMMAND …`.

    Args:
        argv: Command line without the program's name; None reads `sys.argv`.

    Returns:
        Exit status: 0 on success, 1 if `data check` found problems, 2 for bad input, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = words[:1] == ["--debug"]  # before the command only: `train` has Transformers' own --debug
    words = words[debug:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"metamorph {__version__}")
        return 0
    if words[0] not in COMMANDS:
        from metamorph.flags.parser import nearest

        near = nearest(words[0], COMMANDS)
        hint = f": did you mean {near!r}?" if near else ""
        print(f"metamorph: unknown command {words[0]!r}{hint} (all commands: metamorph --help)", file=sys.stderr)
        return 2
    _let_idle_threads_sleep()
    _set_up_logging(debug)
    _warn_of_namesake()
    try:
        status = importlib.import_module(COMMANDS[words[0]].module).main(words[1:])
    except USER_ERRORS as error:
        if debug:
            raise
        from metamorph.flags.checks import printable  # not for --help: it imports more

        hint = f" (metamorph --debug {words[0]} … shows where)" if _is_from_elsewhere(error) else ""
        print(f"metamorph {words[0]}: error: {printable(str(error))}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if debug:
            raise
        if is_first_process():
            print(f"metamorph {words[0]}: interrupted {error}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    return status or 0


def _is_from_elsewhere(error: BaseException) -> bool:
    """Whether another package has raised it: our own checks say what is wrong and how to mend it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return not str(frame.f_globals.get("__name__", "")).startswith("metamorph.")


def usage() -> str:
    """The text of `metamorph --help`."""
    lines = [f"  {name:<18}{command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: metamorph [--debug] COMMAND [flags]\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`metamorph COMMAND --help` lists the flags; `metamorph --debug COMMAND` shows where an error was raised."
    )


def _warn_of_namesake() -> None:
    """Warn where the `metamorph` of PyPI is installed, too: it owns the same folder and the same command."""
    import importlib.metadata  # not for --help

    if not is_first_process():
        return
    # An installation of ours from before its distribution was called metamorph-vpit has our command.
    for distribution in importlib.metadata.distributions(name="metamorph"):
        if all(point.value != "metamorph.cli:main" for point in distribution.entry_points):
            logging.getLogger(__name__).warning(
                "another project called metamorph (%s) is installed in this environment and owns the same files: "
                "`pip uninstall metamorph metamorph-vpit`, then install MetaMorph again",
                distribution.metadata["Summary"],
            )


def _let_idle_threads_sleep() -> None:
    """Set OpenMP's wait policy, which it reads when PyTorch is imported; processes that are started inherit it.

    By default OpenMP's threads spin while they wait for one another, which beside other programs takes several times
    as long as the work.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _set_up_logging(debug: bool) -> None:
    """Log to stderr: our own records from the first process only, unless `debug`. Hush some of libraries."""
    is_main = is_first_process()
    level = logging.DEBUG if debug else logging.INFO if is_main else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter(debug))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("metamorph").setLevel(level)
    # PEFT imports bitsandbytes, which then recommends a package for 4-bit products on a CPU to every command.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in HARMLESS:  # filters, as libraries set the levels of their loggers themselves
        logging.getLogger(name).addFilter(_is_worth_reading)
    if not (is_main and sys.stderr.isatty()):  # in a log file each bar is several lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT asks Transformers by a name that is about to go.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class _LineFormatter(logging.Formatter):
    """`22:35:10 message`; the level where it is a warning or worse, the logger where it is a library's, or `debug`.

    Control characters are escaped: names and paths in a line may be a stranger's.
    """

    def __init__(self, debug: bool) -> None:
        super().__init__("%(asctime)s %(origin)s%(message)s", datefmt="%H:%M:%S")
        self.debug = debug

    def format(self, record: logging.LogRecord) -> str:
        from metamorph.flags.checks import printable

        is_own = record.name.partition(".")[0] == "metamorph"
        level = f"{record.levelname} " if self.debug or record.levelno != logging.INFO else ""
        record.origin = level if is_own and not self.debug else f"{level}{record.name}: "
        return printable(super().format(record))


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """False for what `HARMLESS` lists."""
    return re.match(HARMLESS[record.name], record.getMessage()) is None
