"""Files of prompts: batched = alone, resumed = uninterrupted, two processes = one, and a bad line stops no other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import metamorph
from metamorph import cli
from metamorph.inference import SamplerSettings, Sampling, Session
from metamorph.inference.batch_file import Batch, open_results, run_batch
from metamorph.inference.batch_lines import BatchDefaults, parse_line, read_object


FAST = BatchDefaults(settings=SamplerSettings([1.0, 3.0], 2, seed=5, num_images=2))
HOT = {"temperature": 20, "top_k": 50, "max_new_tokens": 12}
LINES: list[Any] = [
    {"prompt": "draw a large red circle", "id": "first"},
    {"prompt": "what color is the object?", "images": ["in.png"], "id": 2},
    "{not json",
    {"prompt": "hello", "seed": 1, **HOT},
    {"prompt": "hello", "seed": 2, **HOT},
    {"prompt": "draw a blue square", "seed": 9},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "in.png"}, {"type": "text", "text": "shape?"}]}
        ]
    },
    {"prompt": "x", "draw": True, "max_new_tokens": 3, "id": "no room"},
    {"prompt": "hello", "draw": True, "stop": "zzz"},
]


@pytest.fixture(scope="module")
def session() -> Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (20, 20, 44, 44))
    image.save(tmp_path / "in.png")
    write(tmp_path / "prompts.jsonl", LINES)
    return tmp_path


def write(file: Path, lines: list[Any]) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def batch_of(folder: Path, name: str = "results.jsonl", **changes: Any) -> Batch:
    return Batch(
        **{"source": folder / "prompts.jsonl", "results": folder / name, "model": "mini", "defaults": FAST} | changes
    )


def answer(session: Session, batch: Batch, batch_size: int = 4) -> list[dict[str, Any]]:
    run_batch(session, batch, open_results(batch), batch_size)
    return read(batch.results)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def images(results: Path) -> dict[str, np.ndarray]:
    return {file.name: np.array(Image.open(file)).astype(int) for file in results.with_suffix("").glob("*.png")}


def assert_same(one: Path, other: Path, most: int = 2) -> None:
    """The same lines, and images that differ by rounding at most; the command computes in bfloat16."""
    assert one.read_text().replace(f'"{one.stem}/', '"') == other.read_text().replace(f'"{other.stem}/', '"')
    first, second = images(one), images(other)
    assert first.keys() == second.keys()
    assert first
    assert max(np.abs(first[name] - second[name]).max() for name in first) <= most


def test_batched_lines_are_answered_as_alone(session, folder: Path) -> None:
    together = answer(session, batch_of(folder))
    assert [each["line"] for each in together] == list(range(1, len(LINES) + 1))
    assert [each.get("id") for each in together] == ["first", 2, None, None, None, None, None, "no room", None]
    answer(session, batch_of(folder, "alone.jsonl"), batch_size=1)
    assert_same(folder / "results.jsonl", folder / "alone.jsonl")
    assert together[3]["text"] != together[4]["text"]  # the seeds of the lines
    # As one call in Python: text, and each drawing by its seed and guidance scale.
    reply = session.reply("draw a blue square", settings=SamplerSettings([1.0, 3.0], 2, seed=9, num_images=2))
    (part,) = together[5]["parts"]
    assert (together[5]["text"], together[5]["num_tokens"], len(part["files"])) == (reply.text, reply.num_tokens, 4)
    for file, image in zip(part["files"], reply.images, strict=True):
        assert np.abs(np.array(Image.open(folder / file)).astype(int) - np.array(image)).max() <= 2
    with Image.open(folder / part["files"][3]) as last:
        assert (last.text["prompt"], last.text["seed"], last.text["guidance_scale"]) == (
            "draw a blue square",
            "10",
            "3",
        )
    sampled = session.reply("hello", sampling=Sampling(20, top_k=50, seed=1), max_new_tokens=12)
    assert together[3]["text"] == sampled.text


def test_a_bad_line_is_an_error_and_stops_no_other(session, folder: Path) -> None:
    results = answer(session, batch_of(folder))
    assert [each["line"] for each in results if "error" in each] == [3, 8]
    assert "is not JSON" in results[2]["error"]
    assert "the answer may have 3" in results[7]["error"]


def test_a_prompt_that_fills_the_context_is_an_error_and_stops_no_other(session, folder: Path) -> None:
    """In a batch with others, and at resume."""
    write(folder / "prompts.jsonl", [LINES[1], {"prompt": "hello " * 1100}, LINES[1]])
    batch = batch_of(folder)
    results = answer(session, batch)
    assert ["error" in each for each in results] == [False, True, False]
    assert "which leaves 0 of 1024 for the answer" in results[1]["error"]
    batch.results.write_text(json.dumps(results[0]) + "\n")
    assert answer(session, batch) == results


BAD_LINES = [
    ("[1]", "is not an object"),
    ('{"prompt": "\\ud800"}', "is not JSON in UTF-8"),
    ('{"prompt": "x", "temperature": NaN}', "NaN is no number"),
    ({"prompt": " "}, '"prompt" is empty'),
    ({"prompt": "x", "imges": []}, "unknown field 'imges': did you mean 'images'?"),
    ({"id": 1}, 'needs either "prompt" or "messages"'),
    ({"prompt": "x", "messages": []}, 'needs either "prompt" or "messages"'),
    ({"prompt": "x", "images": [1]}, '"images" must be a path or a list of paths, not [1]'),
    ({"prompt": "x", "images": ["../in.png"]}, "leaves the image folder"),
    ({"prompt": "x", "images": ["none.png"]}, "there is no image file"),
    ({"prompt": "x", "images": ["http://a.org/b.png"]}, "nothing is downloaded"),
    ({"prompt": "x", "images": ["data:image/png;base64,AAAA"]}, "cannot be read as an image"),
    ({"prompt": "<image><image>", "images": ["in.png"]}, "has 2 <image> markers, but there are 1"),
    ({"prompt": "x", "videos": "in.png"}, "cannot be read as a video"),
    ({"prompt": "x", "seed": -1}, '"seed" must be from 0'),
    ({"prompt": "x", "seed": True}, '"seed" must be a number'),
    ({"prompt": "x", "top_k": 2**70}, '"top_k" must be from 0'),
    ({"prompt": "x", "top_p": 2}, "top_p must be above 0 and at most 1"),
    ({"messages": []}, "the last message must be the user's"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
    ({"messages": ["x"]}, '"messages" must be objects'),
    ({"messages": [{"role": "user", "content": "<image>"}]}, "has 1 <image> marker(s), but 0"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "base64": "in.png"}]}]}, "is not base64"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": 7}]}]}, "int is not an image"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "http://a.org/b.png"}]}]}, "nothing is"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/none"}}]}]},
        "no image file",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[str(line)[:70] for line, _ in BAD_LINES])
def test_what_is_wrong_with_a_line_is_said(line: Any, message: str, folder: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        parse_line(read_object(line if isinstance(line, str) else json.dumps(line)), folder, FAST)
    assert message in str(error.value)


def test_a_resumed_file_is_as_if_never_interrupted(session, folder: Path) -> None:
    """After a kill amid the fourth line: three lines stay, the incomplete one is written again."""
    results = batch_of(folder)
    answer(session, results)
    whole = results.results.read_bytes()
    cut = batch_of(folder, "cut.jsonl")
    open_results(cut)
    lines = whole.replace(b"results/", b"cut/").splitlines(keepends=True)
    cut.results.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert open_results(cut) == 3
    answer(session, cut)
    assert cut.results.read_bytes() == whole.replace(b"results/", b"cut/")
    after = images(cut.results)
    assert {name[:6] for name in images(results.results)} - {name[:6] for name in after} == {"000001"}
    assert open_results(cut) == len(LINES)


def test_results_of_something_else_are_refused(folder: Path) -> None:
    batch = batch_of(folder)
    open_results(batch)
    for change, message in (
        ({"visualizer": "mini"}, "holds results of another --visualizer: give another --output, or --overwrite"),
        ({"model": "owner/other"}, "holds results of another --model"),
        ({"defaults": BatchDefaults(settings=FAST.settings, fps=2)}, "holds results of --fps 1.0, which is now 2"),
    ):
        with pytest.raises(ValueError, match=message):
            open_results(batch_of(folder, **change))
    batch.results.write_text('{"line": 2}\n')
    with pytest.raises(ValueError, match="is damaged: it lacks the result of line 1"):
        open_results(batch)
    write(batch.source, [*LINES, LINES[0]])
    with pytest.raises(ValueError, match="holds results of another --input"):
        open_results(batch)
    assert open_results(batch, overwrite=True) == 0
    assert batch.results.read_text() == ""


def test_a_folder_of_other_images_is_not_written_to(folder: Path) -> None:
    batch = batch_of(folder)
    batch.folder.mkdir()
    (batch.folder / "000001.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds other files such as 000001\.png: give another --output"):
        open_results(batch, overwrite=True)
    assert (batch.folder / "000001.png").read_bytes() == b"mine"


COMMAND = ["generate", "--model", "mini", "--visualizer", "mini", "--steps", "2", "--input", "prompts.jsonl"]


@pytest.fixture
def greedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, without lines whose words depend on rounding: seven, two of them errors."""
    write(folder / "prompts.jsonl", [line for line in LINES if not isinstance(line, dict) or "temperature" not in line])
    monkeypatch.chdir(folder)
    return folder


def start(folder: Path, launcher: list[str], *flags: str) -> subprocess.Popen[str]:
    words = [sys.executable, *launcher, "-m", "metamorph", *COMMAND, *flags]
    return subprocess.Popen(
        words, cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_a_killed_command_continues(greedy: Path) -> None:
    """SIGKILL while it writes; the lock that it leaves is taken over, and the exit status tells of errors."""
    folder = greedy
    process = start(folder, [], "--output", "killed.jsonl", "--batch-size", "1")
    try:
        until = time.monotonic() + 120
        while not (folder / "killed.jsonl").exists() or (folder / "killed.jsonl").read_text().count("\n") < 2:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = (folder / "killed.jsonl").read_bytes()
    assert cli.main([*COMMAND, "--output", "killed.jsonl"]) == 1
    assert (folder / "killed.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert cli.main([*COMMAND, "--output", "once.jsonl"]) == 1
    assert_same(folder / "killed.jsonl", folder / "once.jsonl", most=24)
    assert not list(folder.glob("*/_run*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_the_file_of_one(greedy: Path) -> None:
    """In four rounds, the last one with work for one process only; errors are counted once."""
    folder = greedy
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(folder, launcher, "--output", "two.jsonl", "--batch-size", "1")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 1, errors
    assert errors.count("2 of 7 lines have an error; results: two.jsonl") == 1
    assert cli.main([*COMMAND, "--output", "one.jsonl"]) == 1
    assert_same(folder / "two.jsonl", folder / "one.jsonl", most=24)
