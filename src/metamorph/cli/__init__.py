"""The `metamorph` command: a table of subcommands, each imported only when it is called.

One file per command: flags, checks that need no weights, then one call into the packages below. What several commands
share is in `shared.py`, and how answers appear on a terminal in `terminal.py`.
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

from metamorph import __version__
from metamorph.runs.ranks import is_first_process


COMMANDS = {
    "quickstart": "train and evaluate a miniature of the entire system on a CPU",
    "train": "train the connector (stage 1) or the full model (stage 2)",
    "train-visualizer": "train the diffusion decoder that draws visual tokens",
    "generate": "answer a prompt, or a file of prompts, with text and images",
    "chat": "talk to a model about images, given and generated",
    "serve": "answer over HTTP, with OpenAI's API and a web page",
    "visualize": "reconstruct images from their visual tokens",
    "data": "check training data, show a sample, cache visual tokens",
    "evaluate": "evaluate a trained model or visualizer",
    "study": "run an experiment in the miniature world",
    "convert": "merge a LoRA adapter, or import a checkpoint of the original system",
    "recipes": "list the recipes for --config, or print one",
    "lr": "scale a learning rate to another batch size",
}
"""Subcommands with one line each for `metamorph --help`. The module of a command, `metamorph.cli.` and its name, has a
function `main(argv)`, which returns the exit status or None for 0."""

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)
"""Errors of bad input or a missing optional package, which are printed as one line. Anything else is a bug and keeps
its traceback."""

HARMLESS = {
    # Accelerate imports DeepSpeed if it is installed, even for a run without it.
    "DeepSpeed": r"Setting accelerator to CPU",
    # The text tower of every SigLIP, which is not used, has defaults outside its vocabulary.
    "transformers.configuration_utils": r"Model config: [be]os_token_id .* 31999\), got 4940[67]\.",
    # A language model's configuration often names another end token than its chat template writes.
    "transformers.trainer_utils": r"The tokenizer has new PAD/BOS/EOS tokens that differ from the model config",
}
"""Harmless warnings of libraries, by logger."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells: 128 + SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `metamorph COMMAND …`, by default from `sys.argv`.

    Returns 0 on success, 1 if `data check` finds problems, 2 for bad input, 130 after Ctrl-C.
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
        status = importlib.import_module(f"metamorph.cli.{words[0].replace('-', '_')}").main(words[1:])
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
    """Whether another package raised it: our own checks say what is wrong and how to fix it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return not str(frame.f_globals.get("__name__", "")).startswith("metamorph.")


def usage() -> str:
    """The text of `metamorph --help`."""
    commands = "\n".join(f"  {name:<18}{summary}" for name, summary in COMMANDS.items())
    end = "`metamorph COMMAND --help` lists the flags of a command. With --debug, errors keep their traceback."
    return f"usage: metamorph [--debug] COMMAND [flags]\n\ncommands:\n{commands}\n\n{end}"


def _warn_of_namesake() -> None:
    """Warn if the `metamorph` of PyPI is also installed: it has the same folder and command."""
    import importlib.metadata  # not for --help

    if not is_first_process():
        return
    # An older installation of ours, whose distribution was also called metamorph, has our command.
    for distribution in importlib.metadata.distributions(name="metamorph"):
        if all(point.value != "metamorph.cli:main" for point in distribution.entry_points):
            logging.getLogger(__name__).warning(
                "another project called metamorph (%s) is installed in this environment and owns the same files: "
                "`pip uninstall metamorph metamorph-vpit`, then install MetaMorph again",
                distribution.metadata["Summary"],
            )


def _let_idle_threads_sleep() -> None:
    """Set OpenMP's wait policy, which it reads when PyTorch is imported, for this process and its children.

    By default OpenMP's threads spin while they wait for each other, which takes several times as long as the work if
    other programs are running.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _set_up_logging(debug: bool) -> None:
    """Log to stderr, our records from the first process only unless `debug`, and silence some of other libraries."""
    is_main = is_first_process()
    level = logging.DEBUG if debug else logging.INFO if is_main else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter(debug))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("metamorph").setLevel(level)
    # It recommends a package for 4-bit products on a CPU, and reports the dtype of every 8-bit product.
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in HARMLESS:  # filters, because libraries set the levels of their loggers themselves
        logging.getLogger(name).addFilter(_is_worth_reading)
    if not (is_main and sys.stderr.isatty()):  # in a log file each bar takes several lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT uses a name of Transformers that is deprecated.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class _LineFormatter(logging.Formatter):
    """Formats `22:35:10 message`, with the level unless INFO, and the logger if it is a library's; all with `debug`.

    Control characters are escaped, since names and paths may come from untrusted data.
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
