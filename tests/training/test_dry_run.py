"""`metamorph train --dry-run`: the recipes of the large models from configurations alone, and tiny runs with data."""

import re
import socket
from pathlib import Path

import pytest
from config_parts import make_llama_8b, make_so400m

from metamorph import cli


pytestmark = pytest.mark.integration


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llm` and `tower` with configurations of real sizes; no weights anywhere."""
    folder = tmp_path_factory.mktemp("large")
    make_llama_8b(folder / "llm")
    make_so400m(folder / "tower")
    assert not list(folder.rglob("*.safetensors"))
    return folder


def dry_run(capsys: pytest.CaptureFixture[str], **flags: object) -> str:
    """What the command prints."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    status = cli.main(["train", "--dry-run", *words])
    output = capsys.readouterr()
    assert status == 0, output.err
    return output.out


def gib(report: str, name: str) -> float:
    """A number of the memory table."""
    found = re.search(rf"^  {re.escape(name)}.*? ([\d.]+) GiB", report, re.MULTILINE)
    assert found, report
    return float(found[1])


def trained(report: str) -> dict[str, tuple[int, int]]:
    """The table of modules: trained and frozen parameters."""
    rows = re.findall(r"^  (\w+) +([\d,]+) +([\d,]+) ", report, re.MULTILINE)
    return {name: (int(a.replace(",", "")), int(b.replace(",", ""))) for name, a, b in rows}


def test_stage_1_of_the_8b_recipe(
    large: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a dry run of folders needs no network"))
    report = dry_run(
        capsys,
        config="llama3.1-8b-stage1",
        model_name_or_path=large / "llm",
        vision_tower=large / "tower",
        num_gpus=8,
    )
    modules = trained(report)
    assert modules["language_model"] == (0, 8_030_261_248)
    assert modules["mm_projector"] == (1152 * 4096 + 4096 + 4096 * 4096 + 4096 + 2 * 4096, 0)
    assert modules["vision_head"][0] == modules["vision_tower"][0] == 0
    assert "What stage 1 trains" in report
    assert re.search(r"global batch = \d+ per GPU × \d+ accumulation steps × 8 GPUs × 1 nodes = \d+", report)
    assert gib(report, "optimizer") <= 0.2  # of a connector
    assert gib(report, "total") < 80
    assert "--data_path is not given" in report
    assert gib(report, "frozen vision tower") > 0.7
    flags = {"config": "llama3.1-8b-stage1", "model_name_or_path": large / "llm", "num_gpus": 8}
    cached = dry_run(capsys, **flags, vision_tower=large / "tower", feature_cache="features")
    assert not re.search(r"^  frozen vision tower.*[1-9]", cached, re.MULTILINE)  # it stays in main memory


def test_stage_2_of_the_8b_recipe(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {
        "config": "llama3.1-8b-stage2",
        "model_name_or_path": large / "llm",
        "vision_tower": large / "tower",
        "pretrain_mm_mlp_adapter": large / "stage1",
    }
    report = dry_run(capsys, **flags, num_gpus=8)
    modules = trained(report)
    assert modules["language_model"] == (8_030_261_248, 0)
    assert modules["vision_tower"][0] == 0
    assert modules["vision_head"] == (4096 * 4096 + 4096 + 4096 * 1152 + 1152, 0)
    assert f"{large / 'stage1'} does not exist yet" in report
    assert "with fsdp2" in report  # 8B parameters in training do not fit one GPU of 80 GiB
    assert gib(report, "optimizer") == pytest.approx(8 * 8.073e9 / 8 / 2**30, abs=0.1)
    four_nodes = dry_run(capsys, **flags, num_gpus=8, num_nodes=4)
    assert "× 8 GPUs × 4 nodes" in four_nodes
    assert gib(four_nodes, "optimizer") == pytest.approx(gib(report, "optimizer") / 4, abs=0.1)
    hybrid = flags | {"num_nodes": 4, "sharding": "fsdp2"}
    assert gib(dry_run(capsys, **hybrid, num_gpus=8, dp_replicate=4), "total") == gib(report, "total")
    words = [word for name, value in hybrid.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", "--dry-run", *words, "--num_gpus", "1", "--dp_replicate", "4"]) == 2
    assert "--dp_replicate 4 does not divide 4 processes into groups of equal size" in capsys.readouterr().err
    assert "does not fit" in dry_run(capsys, **flags, num_gpus=1)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_memory_table_of_the_documentation(stage: int, large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "multi_gpu.md").read_text(encoding="utf-8")
    engines = re.findall(r"`(\w+)`", re.search(r"^\| Stage, `--recompute` .*$", page, re.MULTILINE)[0])
    numbers = re.search(rf"^\| {stage}, `none` \| (.*) \|$", page, re.MULTILINE)[1].split(" | ")
    report = dry_run(
        capsys,
        config=f"llama3.1-8b-stage{stage}",
        model_name_or_path=large / "llm",
        vision_tower=large / "tower",
        num_gpus=8,
    )
    others = dict(re.findall(r"(\w+) ([\d.]+)[, ]", re.search(r"with other engines .*", report)[0]))
    assert dict(zip(engines, numbers, strict=True)).items() >= others.items()
    assert f"{gib(report, 'total')}" in numbers


def test_what_data_decide(parts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """12 samples of a tiny model: packed rows, samples in a step, the rate by the rule, steps of an epoch."""
    flags: dict[str, object] = {
        "model_name_or_path": parts / "llm",
        "vision_tower": parts / "tower",
        "num_image_tokens": 4,
        "tune_mm_mlp_adapter": True,
        "data_path": parts / "data.jsonl",
        "image_folder": parts / "images",
        "model_max_length": 512,
        "learning_rate": "auto",
        "base_learning_rate": 1e-3,
        "base_batch_size": 4,
        "num_gpus": 2,
    }
    report = dry_run(capsys, **flags, packing=False, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert "global batch = 2 per GPU × 3 accumulation steps × 2 GPUs × 1 nodes = 12 samples" in report
    assert "learning rate: 0.00173 = 0.001 × √(12 / 4)" in report
    assert re.search(r"mm_projector .* 0\.00173 ", report)
    assert "data: 12 samples of" in report
    assert "steps: 1 per epoch, 3 in total, 1 of them warm-up" in report

    report = dry_run(capsys, **flags, packing=True, per_device_train_batch_size=1)
    per_row = float(re.search(r"packing: ([\d.]+) samples per row of 512 tokens", report)[1])
    assert per_row > 2
    assert re.search(rf"learning rate: \S+ = 0.001 × √\({2 * per_row:g}", report)

    absent = dry_run(capsys, **{**flags, "data_path": tmp_path / "none.jsonl"}, packing=True)
    assert "known from the data" in absent
    assert re.search(r"mm_projector .* auto ", absent)
    assert f"--data_path {tmp_path / 'none.jsonl'}" in absent


def test_lora_in_4_bits(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    report = dry_run(
        capsys,
        model_name_or_path=large / "llm",
        vision_tower=large / "tower",
        lora_enable=True,
        bits=4,
        per_device_train_batch_size=1,
        recompute="full",
        gpu_memory=24,
    )
    language_model = trained(report)["language_model"]
    assert 0.01 < language_model[0] / sum(language_model) < 0.05
    assert "frozen matrices in 4 bits" in report
    assert "with single" in report
    assert gib(report, "weights") < 12


def test_engines_are_planned_for_without_gpus(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"model_name_or_path": parts / "llm", "vision_tower": parts / "tower", "num_image_tokens": 4}
    report = dry_run(capsys, **flags, sharding="zero3_offload", num_gpus=4)
    assert "with zero3_offload" in report
    assert "main memory of each process" in report


def test_given_flags_are_marked(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Given by a flag or the recipe, be it with the value of the default; and a rate that nobody has chosen warns."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_image_tokens: 4\nadam_beta1: 0.9\n")
    flags = {"config": recipe, "model_name_or_path": parts / "llm", "vision_tower": parts / "tower"}
    for stage_1, figure in ((True, "1e-3 --base_batch_size 256"), (False, "6.93e-5 --base_batch_size 1536")):
        caplog.clear()
        report = dry_run(capsys, **flags, tune_mm_mlp_adapter=stage_1)
        given = set(re.findall(r"^  \* (\w+)", report, re.MULTILINE))
        assert given == {"model_name_or_path", "vision_tower", "num_image_tokens", "tune_mm_mlp_adapter", "adam_beta1"}
        assert "learning rate: 5e-05, the default" in report
        assert f"--learning_rate auto --base_learning_rate {figure}" in caplog.text
    caplog.clear()
    report = dry_run(capsys, **flags, learning_rate=5e-5)
    assert "learning rate: 5e-05, as given" in report
    assert re.search(r"^  \* learning_rate +5e-05", report, re.MULTILINE)
    dry_run(capsys, **flags, tune_mm_mlp_adapter=True, mm_projector_lr=1e-3)
    assert "Transformers' default" not in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_gpus", "8"], "--num_gpus 8 is for --dry_run only"),
        (["--dry-run", "--num_gpus", "0"], "--num_gpus 0 must be larger than 0"),
        (["--dry-run", "--num_gpu", "8"], "unknown flag --num_gpu: did you mean --num_gpus?"),
        (["--dry-run", "--num_image_tokens", "5"], "--num_image_tokens=5 is not a square number"),
        (["--dry-run", "--vision_tower", "/no/tower"], "--vision_tower /no/tower does not exist"),
    ],
)
def test_bad_flags(words: list[str], message: str, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["train", "--model_name_or_path", str(parts / "llm"), "--vision_tower", str(parts / "tower")]
    rest = [] if "--dry-run" in words else ["--data_path", str(parts / "data.jsonl"), "--output_dir", str(parts / "o")]
    assert cli.main([*start, "--tune_mm_mlp_adapter", "True", *rest, *words]) == 2
    assert message in capsys.readouterr().err


def test_dry_run_false_is_a_run(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So it asks for what a run needs."""
    words = ["--model_name_or_path", str(parts / "llm"), "--tune_mm_mlp_adapter", "True", "--dry_run", "False"]
    assert cli.main(["train", *words]) == 2
    assert "data_path" in capsys.readouterr().err
