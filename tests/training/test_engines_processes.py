"""Two processes through the real trainer: DDP, ZeRO-2 and ZeRO-3 train as one process does.

Each of the two sees one sample at a time, so in some steps one of them has no image, or no answer image.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_parts import arguments, logged, make_language_model, make_records, make_vision_tower, run_engines

from metamorph.models.connector import CONNECTOR_FILE
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.optimizer import VISION_TOWER, module_of
from metamorph.training.run import run_training


STAGE_2 = {"stage": 2, "from_scratch_connector": True, "max_steps": 10, "save_strategy": "steps", "save_steps": 6}
STAGE_1 = {"stage": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
TOWER = STAGE_2 | {
    "max_steps": 4,
    "save_strategy": "no",
    "freeze_vision": False,
    "image_token_reduction": "mlpmixer",
    "gradient_accumulation_steps": 2,
}
"""Everything is trained, the tower too, so ranks without images must take part in its gradients."""
ACCUMULATED = STAGE_2 | {
    "bf16": True,
    "optim": "sgd",  # the step is the gradient
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_steps": 1,
    "save_strategy": "no",
}
"""One step in bfloat16."""
CASES = {"stage_2": STAGE_2, "stage_1": STAGE_1, "tower": TOWER}
ENGINES = ("ddp", "zero2", "zero3")  # DDP first: Accelerate stays with DeepSpeed once it was asked for

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    records = make_records(folder).read_text().splitlines()
    (folder / "same.jsonl").write_text(f"{records[2]}\n" * 16)  # asks with an image and answers with one
    return folder


@pytest.fixture(scope="module")
def two(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all runs of two processes, `NAME-RANK.json` and `NAME/`, where NAME is ENGINE-CASE."""
    folder = tmp_path_factory.mktemp("two")
    runs = {
        f"{engine}-{case}": flags | {"sharding": engine, "per_device_train_batch_size": 1}
        for engine in ENGINES
        for case, flags in CASES.items()
    }
    for engine in ("zero2", "zero3"):
        for case, step in (("stage_2", 6), ("stage_1", 2)):
            checkpoint = str(folder / f"{engine}-{case}" / f"checkpoint-{step}")
            runs[f"{engine}-{case}-resumed"] = runs[f"{engine}-{case}"] | {"resume_from_checkpoint": checkpoint}
    mixer = STAGE_2 | {"max_steps": 2, "save_steps": 2, "image_token_reduction": "mlpmixer", "sharding": "zero2"}
    runs["mixer"] = mixer | {"per_device_train_batch_size": 1}
    runs["mixer-finished"] = runs["mixer"] | {"resume_from_checkpoint": str(folder / "mixer" / "checkpoint-2")}
    for engine in ENGINES:
        for accumulation in (1, 8):
            own = {"sharding": engine, "data_path": str(parts / "same.jsonl")}
            own |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
            runs[f"{engine}-accumulated_{accumulation}"] = ACCUMULATED | own
    # Accelerate keeps DeepSpeed once it has used it.
    run_engines(parts, folder, dict(sorted(runs.items(), key=lambda run: run[1]["sharding"] != "ddp")))
    return folder


@pytest.fixture(scope="module")
def one(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same cases on one process, which sees two samples at a time: folder of each."""
    folder = tmp_path_factory.mktemp("one")
    for case, flags in CASES.items():
        torch.manual_seed(0)
        result = run_training(*arguments(parts, folder / case, **flags, per_device_train_batch_size=2))
        losses = logged(result)
        norms = logged(result, "grad_norm")
        (folder / case / "log.json").write_text(json.dumps({"losses": losses, "norms": norms}))
    return {case: folder / case for case in CASES}


def ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(two: Path, one: dict[str, Path], engine: str, case: str) -> None:
    expected = json.loads((one[case] / "log.json").read_text())
    seen = ranks(two, f"{engine}-{case}")
    for rank in seen:
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    file = CONNECTOR_FILE if case == "stage_1" else "model.safetensors"
    full, reference = load_file(two / f"{engine}-{case}" / file), load_file(one[case] / file)
    assert set(full) == set(reference)
    for name, weight in reference.items():
        assert full[name].dtype == torch.float32, name
        # Attention does not depend on the bias of its keys: its gradient is rounding, of which Adam makes large steps.
        assert name.endswith("k_proj.bias") or torch.allclose(full[name], weight, atol=1e-4), name


@pytest.mark.parametrize("engine", ENGINES)
def test_some_steps_have_a_rank_without_images_or_answer_images(two: Path, engine: str) -> None:
    steps = list(zip(*(rank["steps"] for rank in ranks(two, f"{engine}-stage_2")), strict=True))
    for kind in (0, 1):
        assert any(first[kind] != second[kind] for first, second in steps)


@pytest.mark.parametrize(("engine", "wrapper"), [("ddp", "DistributedDataParallel"), ("zero2", "DeepSpeedEngine")])
def test_the_engine_that_was_asked_for_trains(two: Path, engine: str, wrapper: str) -> None:
    seen = ranks(two, f"{engine}-stage_2")[0]
    assert seen["engine"] == wrapper
    assert seen["partitioned"] == 0


def test_zero3_partitions_everything_but_the_frozen_tower(two: Path) -> None:
    frozen, trained = ranks(two, "zero3-stage_2")[0], ranks(two, "zero3-tower")[0]
    assert frozen["partitioned"] > 0
    assert frozen["outside"]
    assert not frozen["tower_partitioned"]
    assert trained["tower_partitioned"]
    assert not trained["outside"]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_accumulated_in_float32(two: Path, engine: str) -> None:
    """Eight times an eighth of the gradient of one sample is that gradient; sums in bfloat16 differ by 0.4 %."""
    one, eight = (load_file(two / f"{engine}-accumulated_{count}" / "model.safetensors") for count in (1, 8))
    for name, weight in one.items():
        assert torch.allclose(eight[name], weight, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(("case", "left"), [("stage_2", 4), ("stage_1", 2)])
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_resumes_where_it_was(two: Path, engine: str, case: str, left: int) -> None:
    full, resumed = ranks(two, f"{engine}-{case}")[0], ranks(two, f"{engine}-{case}-resumed")[0]
    assert resumed["trained"] == CASES[case]["max_steps"]
    assert len(resumed["steps"]) == left
    assert resumed["steps"] == full["steps"][-left:]
    assert resumed["losses"] == pytest.approx(full["losses"], abs=1e-5)


def test_checkpoints_of_zero_hold_no_gathered_and_no_frozen_weights(two: Path) -> None:
    assert not list(two.glob("zero*/checkpoint-*/*.safetensors"))
    (file,) = (two / "zero2-stage_1" / "checkpoint-2").rglob("mp_rank_00_model_states.pt")
    held = torch.load(file, weights_only=False)["module"]  # DeepSpeed's objects; the test has just written it
    assert held
    assert not [name for name in held if ".layers." in name or "vision_tower" in name]


def test_a_finished_run_whose_reduction_was_trained_is_only_loaded(two: Path) -> None:
    again, result = (
        load_file(two / "mixer-finished" / "model.safetensors"),
        load_file(two / "mixer" / "model.safetensors"),
    )
    assert all(torch.equal(again[name], weight) for name, weight in result.items())
    assert not ranks(two, "mixer-finished")[0]["steps"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_result_is_a_plain_model_with_its_tower(two: Path, parts: Path, engine: str) -> None:
    model = MetaMorphForConditionalGeneration.from_pretrained(two / f"{engine}-stage_2")
    assert any(module_of(name) == VISION_TOWER for name, _ in model.named_parameters())
    original = load_file(parts / "tower" / "model.safetensors")
    embedding = next(name for name in original if name.endswith("patch_embedding.weight"))
    assert torch.equal(model.model.vision_tower.encoder.embeddings.patch_embedding.weight, original[embedding])
