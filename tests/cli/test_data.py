"""`metamorph data`: exit codes, the printed summary, the files it writes, and one example to look at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from training_parts import IMAGE_SIZE, NUM_IMAGE_TOKENS, write_records

from metamorph import cli


pytestmark = pytest.mark.integration


@pytest.fixture
def check(parts: Path, tmp_path: Path):
    """Run `metamorph data check` on a file with the parts' language model; returns exit code and report."""

    def check(path: Path, *words: str, folder: Path | None = None) -> tuple[int, dict]:
        output = tmp_path / "report"
        flags = ["--image-folder", str(folder or parts / "images"), "--output-dir", str(output), "--workers", "0"]
        flags += ["--model_name_or_path", str(parts / "llm"), "--num_image_tokens", str(NUM_IMAGE_TOKENS)]
        code = cli.main(["data", "check", str(path), *flags, *words])
        report = output / "report.json"
        return code, json.loads(report.read_text()) if report.exists() else {}

    return check


def test_a_clean_set_gives_0(check, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = check(parts / "data.jsonl")
    assert code == 0
    assert (report["records"], report["ok"], report["problems"], report["by_kind"]) == (12, 12, [], {})
    assert report["statistics"]["images"]["total"] == 12
    assert report["statistics"]["answer_images"]["total"] == 6
    printed = capsys.readouterr().out
    assert "12 of 12 records are in order" in printed
    assert f"report: {tmp_path / 'report' / 'report.html'}" in printed


def test_problems_give_1(check, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (parts / "data.jsonl").read_text() + '{"id": "half'
    (tmp_path / "data.jsonl").write_text(lines)
    code, report = check(tmp_path / "data.jsonl")
    assert code == 1
    assert report["by_kind"] == {"broken_line": 1}
    assert report["problems"][0]["line"] == 13
    assert "broken_line" in capsys.readouterr().out


def test_lengths_are_judged_by_the_model(check, parts: Path) -> None:
    code, report = check(parts / "data.jsonl", "--model_max_length", "40")
    assert code == 1
    assert set(report["by_kind"]) <= {"over_long", "unsupervised"}
    assert report["by_kind"]["over_long"] == sum(kind == "over_long" for kind in _kinds(report)) > 0


def _kinds(report: dict) -> list[str]:
    return [problem["kind"] for problem in report["problems"]]


def test_unusable_data_give_2(check, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "does not exist": (tmp_path / "nothing.jsonl", None),
        "--image_folder": (parts / "data.jsonl", tmp_path / "nowhere"),
        "is wrong": (parts / "data.jsonl", tmp_path),
        "has no records": (write_records(tmp_path / "empty.jsonl", []), None),
    }
    for words, (path, folder) in cases.items():
        code, report = check(path, folder=folder)
        assert (code, report) == (2, {}), words
        assert words in capsys.readouterr().err


def test_a_mixture_has_a_row_for_each_source(check, parts: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "text.jsonl", [{"id": 1, "conversations": [{"from": "human", "value": "Hi"}]}])
    entries = [{"path": str(parts / "data.jsonl"), "weight": 0.25}, {"path": "text.jsonl", "name": "questions"}]
    (tmp_path / "mixture.yaml").write_text(json.dumps(entries))
    code, report = check(tmp_path / "mixture.yaml")
    assert code == 1
    sources = report["statistics"]["sources"]
    assert {name: row["records"] for name, row in sources.items()} == {"data": 12, "questions": 1}
    assert report["problems"][0]["source"] == "questions"


def test_without_a_model_lengths_are_not_judged(parts: Path, tmp_path: Path) -> None:
    words = ["data", "check", str(parts / "data.jsonl"), "--image_folder", str(parts / "images"), "--workers", "0"]
    assert cli.main([*words, "--output-dir", str(tmp_path), "--model_max_length", "10"]) == 0
    statistics = json.loads((tmp_path / "report.json").read_text())["statistics"]
    assert statistics["model_max_length"] is None
    assert "--model_name_or_path" in statistics["note"]
    assert "texts come out too long" in (tmp_path / "report.html").read_text()


def test_a_recipe_of_training_gives_the_flags(parts: Path, tmp_path: Path) -> None:
    recipe = {
        "model_name_or_path": str(parts / "llm"),
        "data_path": str(parts / "data.jsonl"),
        "image_folder": str(parts / "images"),
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "mm_use_im_start_end": False,
        "model_max_length": 40,
        "learning_rate": 1e-3,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["data", "check", "--config", str(tmp_path / "recipe.yaml"), "--workers", "0"]
    totals = []
    for flags in (["--model_max_length", "500"], ["--model_max_length", "500", "--mm_use_im_start_end", "True"], []):
        code = cli.main([*words, "--output-dir", str(tmp_path / "out"), *flags])
        assert code == (0 if flags else 1)
        totals.append(json.loads((tmp_path / "out" / "report.json").read_text())["statistics"]["tokens"]["total"])
    assert totals[1] == totals[0] + 2 * 12  # start and end of each image
    assert cli.main(["data", "check"]) == 2


def test_show_prints_tokens_and_writes_images(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ["data", "show", str(parts / "data.jsonl"), "--image-folder", str(parts / "images")]
    words += ["--model_name_or_path", str(parts / "llm"), "--num_image_tokens", str(NUM_IMAGE_TOKENS)]
    assert cli.main([*words, "--index", "2", "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "data.jsonl:3 (id 'sample-2')" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert sum(row[-2:] == ["visual", "target"] for row in rows) == 1  # the second image is the answer
    assert sum("image 0: 4 visual tokens" in line for line in printed.splitlines()) == 1
    learned = [row[2] for row in rows if len(row) > 3 and row[-1] == "text"]
    assert learned == ["<image_start>", "<image_end>", "<|eot_id|>"]
    for number in (0, 1):
        assert Image.open(tmp_path / f"2-image-{number}.png").size == (384, 384)
    assert cli.main([*words, "--index", "12", "--output-dir", str(tmp_path)]) == 2
    assert "--index 12 does not exist" in capsys.readouterr().err


def test_a_finished_model_says_how_sequences_are_made(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(parts / "data.jsonl"), "--image-folder", str(parts / "images"), "--output-dir", str(tmp_path)]
    words += ["--model_name_or_path", "mini"]
    check = ["data", "check", *words, "--workers", "0"]
    # In a process of its own, in which nothing else has imported the model.
    done = subprocess.run([sys.executable, "-m", "metamorph", *check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["statistics"]["images"]["total"] == 12
    assert cli.main(["data", "show", *words, "--index", "2", "--image_aspect_ratio", "pad"]) == 0
    assert "image 0: 16 visual tokens" in capsys.readouterr().out
    assert Image.open(tmp_path / "2-image-0.png").size == (64, 64)
    assert cli.main([*check, "--num_image_tokens", "16"]) == 0
    assert cli.main([*check, "--num_image_tokens", "64"]) == 2
    assert "--num_image_tokens 64 contradicts the model" in capsys.readouterr().err


def test_the_tower_says_how_large_images_are(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "show", str(parts / "data.jsonl"), "--image-folder", str(parts / "images")]
    words += ["--output-dir", str(tmp_path)]
    for model, tower, size in (
        ("mini-llama", "mini-siglip", 64),
        ("mini", "mini", 64),
        ("mini-llama", str(parts / "tower"), IMAGE_SIZE),
    ):
        assert cli.main([*words, "--model_name_or_path", model, "--vision_tower", tower]) == 0
        assert Image.open(tmp_path / "0-image-0.png").size == (size, size)
    for model, tower, message in (
        ("mini", str(parts / "tower"), "contradicts the model"),
        ("mini-llama", str(tmp_path), "--vision_tower"),
        ("mini-llama", "mini-llama", "whose token layout is unknown"),
    ):
        capsys.readouterr()
        assert cli.main([*words, "--model_name_or_path", model, "--vision_tower", tower]) == 2
        assert message in capsys.readouterr().err


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["check", "--help"], ["cache-features", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["data", *words])
        assert stop.value.code == 0
    assert "--feature_cache" in capsys.readouterr().out
