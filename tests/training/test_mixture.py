"""Training on a mixture: what `--data_path` takes, from the command to the losses."""

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest
import yaml
from training_parts import NUM_IMAGE_TOKENS, arguments, write_records

from metamorph import cli
from metamorph.data.bad_records import TooManyBadRecordsError
from metamorph.training.run import run_training


pytestmark = pytest.mark.integration


@pytest.fixture
def mixture(parts: Path, tmp_path: Path) -> Path:
    """Questions in JSON Lines, captions in a tar, edits in a JSON array; one record of each is bad."""
    images = parts / "images"
    with tarfile.open(tmp_path / "captions-0.tar", "w") as tar:
        for number in range(5):
            picture = (images / f"{number}.png").read_bytes() if number else b"no picture"
            for name, content in ((f"{number}.png", picture), (f"{number}.txt", f"Noise {number}.".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    turns = [{"from": "human", "value": "<image> What is this?"}, {"from": "gpt", "value": "Noise."}]
    questions = [{"id": f"q{n}", "image": f"{n}.png", "conversations": turns} for n in range(5)]
    write_records(tmp_path / "questions.jsonl", [*questions, {"id": "silent", "conversations": turns[1:]}])
    edits = [
        {
            "id": f"e{n}",
            "image": [f"{n}.png", f"{n + 1}.png"],
            "conversations": [{"from": "human", "value": "<image> Next."}, {"from": "gpt", "value": "<image>"}],
        }
        for n in range(5)
    ]
    edits.append({**edits[0], "id": "gone", "image": ["gone.png", "0.png"]})
    (tmp_path / "edits.json").write_text(json.dumps(edits, indent=1))
    sources = [
        {"path": "questions.jsonl", "image_folder": str(images)},
        {"path": "captions-{0..0}.tar", "task": "text_to_image", "name": "captions"},
        {"path": "edits.json", "max_samples": 6},
    ]
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump(sources))
    return path


def test_a_mixture_trains_and_leaves_out_bad_records(parts: Path, mixture: Path, tmp_path: Path, caplog) -> None:
    flags = {
        "data_path": str(mixture),
        "on_bad_record": "skip",
        "max_bad_fraction": 0.2,
        "max_steps": -1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 6,
        "from_scratch_connector": True,
    }
    with caplog.at_level(logging.INFO):
        result = run_training(*arguments(parts, tmp_path / "out", stage=2, **flags))
    assert result.data_statistics["bad"] == {"role_order": 1, "missing_image": 1, "unreadable_image": 1}
    assert {name: sum(source["bad"].values()) for name, source in result.data_statistics["sources"].items()} == {
        "questions": 1,
        "captions": 1,
        "edits": 1,
    }
    assert "source captions: 5 samples of 5 records, task text_to_image" in caplog.text
    logs = [line for line in result.log_history if "num_visual_tokens" in line]
    # each epoch samples four captions and five edits
    assert sum(line["num_visual_tokens"] for line in logs) == 2 * 9 * NUM_IMAGE_TOKENS
    assert result.global_step == 6


def test_too_many_bad_records_over_all_sources_stop_the_run(parts: Path, mixture: Path, tmp_path: Path) -> None:
    flags = {"data_path": str(mixture), "on_bad_record": "skip", "max_bad_fraction": 0.16, "max_steps": 3}
    flags |= {"from_scratch_connector": True, "per_device_train_batch_size": 6}
    with pytest.raises(TooManyBadRecordsError, match=r"3 of 17 records are bad"):
        run_training(*arguments(parts, tmp_path / "out", stage=2, **flags))


def test_the_command_names_what_is_wrong_with_a_mixture(parts: Path, mixture: Path, tmp_path: Path, capsys) -> None:
    words = ["train", "--model_name_or_path", str(parts / "llm"), "--vision_tower", str(parts / "tower")]
    words += ["--num_image_tokens", str(NUM_IMAGE_TOKENS), "--tune_mm_mlp_adapter", "True", "--max_steps", "1"]
    words += ["--output_dir", str(tmp_path / "out"), "--data_path"]
    assert cli.main([*words, str(mixture)]) == 2
    message = capsys.readouterr().err
    assert "questions.jsonl has 1 bad record(s)" in message
    assert "--on_bad_record skip" in message
    mixture.write_text("- {path: questions.jsonl, tsk: video_qa}")
    assert cli.main([*words, str(mixture)]) == 2
    assert "source 1: unknown key 'tsk': did you mean 'task'?" in capsys.readouterr().err
    assert cli.main([*words, f"{tmp_path}/captions-{{0..3}}.tar"]) == 2
    assert "captions-1.tar and 2 more does not exist" in capsys.readouterr().err
