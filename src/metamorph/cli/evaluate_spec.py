"""`metamorph evaluate SPEC --model M`: run a benchmark; also `--list` and `--compare` of `metamorph evaluate`."""

import argparse
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metamorph.cli.shared import add_loading_flags, loading_dtype, open_answering_session, print_table
from metamorph.flags.checks import check_metamorph_model
from metamorph.flags.extras import install_command
from metamorph.flags.parser import at_least, output_folder
from metamorph.mini import shipped_folder


logger = logging.getLogger(__name__)

PLOT_FILE = "plot.png"
_SHOWN_IDS = 5


def add_flags(parser: argparse.ArgumentParser, commands: Sequence[str]) -> None:
    """Add the flags of the command; `commands` are the others that may stand in the place of SPEC."""
    parser.set_defaults(run=lambda flags: _run(flags, commands))
    parser.description = "SPEC is a benchmark of `metamorph evaluate --list`, or a YAML file."
    parser.add_argument("spec", metavar="SPEC", help=argparse.SUPPRESS)
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained model, or mini")
    parser.add_argument("--visualizer", help="folder or Hub id of the visualizer, or mini; for benchmarks of images")
    data_help = "file or folder of the benchmark's data (default: as in SPEC)"
    parser.add_argument("--data-path", type=Path, help=data_help)
    output_help = f"folder of result.json, table.md, {PLOT_FILE} and all answers (default: evaluation/SPEC)"
    parser.add_argument("--output-dir", type=output_folder, help=output_help)
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="prompts that each process answers at once")
    limit_help = "number of samples to ask about, evenly spaced; each gets the answer of a full run"
    parser.add_argument("--limit", type=at_least(1), help=limit_help)
    parser.add_argument("--overwrite", action="store_true", help="replace results of something else")
    add_loading_flags(parser)


def _run(flags: argparse.Namespace, commands: Sequence[str]) -> int:
    from metamorph.evaluation.benchmarks.spec import read_spec

    if flags.spec in commands:
        raise ValueError(f"{flags.spec} comes before its flags: metamorph evaluate {flags.spec} …")
    spec = read_spec(flags.spec, commands)
    _require_matplotlib()
    from metamorph.cli.generate import check_budget
    from metamorph.evaluation.benchmarks.plots import save_result
    from metamorph.evaluation.benchmarks.result import table
    from metamorph.evaluation.benchmarks.run import check_visualizer_is_due, name_of, run_spec
    from metamorph.inference.batch_file import joined_processes
    from metamorph.inference.session import check_visualizer_folder, pick_device
    from metamorph.runs.lock import only_run_in

    check_visualizer_is_due(spec, flags.visualizer)
    check_metamorph_model(shipped_folder(flags.model, "model"), flag="--model")
    if flags.visualizer is not None:
        check_visualizer_folder(shipped_folder(flags.visualizer, "visualizer"))
    if spec.decoding.draw or spec.metric.needs_images:
        decoding = spec.decoding
        check_budget(flags.model, decoding.max_new_tokens, draw=True, name_of=lambda setting: name_of(setting, spec))
    folder = flags.output_dir or Path("evaluation") / spec.name
    device = pick_device(flags.device, flag="--device")
    with joined_processes(), only_run_in(folder, flag="--output-dir"):
        result = run_spec(
            spec,
            flags.model,
            flags.visualizer,
            folder,
            lambda: open_answering_session(flags),
            data_path=flags.data_path,
            batch_size=flags.batch_size,
            limit=flags.limit,
            dtype=loading_dtype(flags),
            device=device,
            overwrite=flags.overwrite,
        )
    if not result:  # not the first process
        return 0
    print_table(*table(result))
    save_result(result, folder / PLOT_FILE)
    print(f"\nresult.json, table.md, {PLOT_FILE} and all answers: {folder.resolve()}")
    if result["errors"]:
        logger.warning("%d of %d answers are errors and count as wrong", result["errors"], len(result["answers"]))
    return int(result["errors"] > 0)


def print_specs() -> None:
    """Print the name, description, source and licence of each shipped spec."""
    from metamorph.evaluation.benchmarks.spec import shipped_specs

    specs = shipped_specs()
    width = max(map(len, specs), default=0)
    for name, content in specs.items():
        print(f"{name:<{width}}  {content['description']}\n{'':<{width}}  {content['source']}")


def compare_results(files: Sequence[str], output: Path | None) -> None:
    """Print what differs between two results, and write it to `output` as JSON, with a plot next to it."""
    from metamorph.evaluation.benchmarks.compare import compare, table
    from metamorph.evaluation.benchmarks.result import read_result

    if output is not None:
        _require_matplotlib()
    comparison = compare(*(read_result(Path(file)) for file in files))
    for letter, file in zip("ab", files, strict=True):
        print(f"{letter}: {file}")
    if others := comparison["only_in_a"] + comparison["only_in_b"]:
        print(f"compared: the {comparison['samples']} samples of both, without {others} of one of them")
    print()
    print_table(*table(comparison))
    print()
    for line in _change_lines(comparison):
        print(line)
    if not comparison["differs"]:
        print("nothing else differs: model, data, spec and versions are the same")
    for name, (first, second) in comparison["differs"].items():
        print(f"{name}: {_shown(first)} in a, {_shown(second)} in b")
    if output is not None:
        from metamorph.evaluation.benchmarks.plots import save_comparison

        output.parent.mkdir(parents=True, exist_ok=True)
        content = {"a": files[0], "b": files[1], **comparison}
        output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_comparison(comparison, output.with_suffix(".png"))


def _change_lines(comparison: Mapping[str, Any]) -> list[str]:
    changes = comparison["changes"]
    values = {value for kind in ("better", "worse") for each in changes[kind] for value in (each["a"], each["b"])}
    is_verdict = values <= {0, 1} and not comparison["lower_is_better"]
    words = {
        "better": "wrong in a, right in b" if is_verdict else "better in b",
        "worse": "right in a, wrong in b" if is_verdict else "worse in b",
    }
    lines = []
    for kind, text in words.items():
        ids = [each["id"] for each in changes[kind]]
        shown = ", ".join([*ids[:_SHOWN_IDS], *(["…"] if len(ids) > _SHOWN_IDS else [])])
        lines.append(f"{text} ({changes['score']}): {len(ids)}" + (f" ({shown})" if ids else ""))
    return lines


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 64 else f"{text[:60]} …"


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"plots need matplotlib: {install_command('evaluate')}")
