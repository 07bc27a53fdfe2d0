"""`--sharding fsdp2` through the real trainer on two processes: the results of DDP, on CPUs and on two GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_parts import make_language_model, make_records, make_vision_tower, run_engines


ON_GPUS = ("bf16", "lora", "tower", "accumulated")
"""Cases on two GPUs: all of them would take longer than a part of `make gpu` may."""
PATHS = ("tied", "data.jsonl", "images", "prompts.jsonl")
SHARED = {"per_device_train_batch_size": 1}
STAGE_2 = SHARED | {"stage": 2, "from_scratch_connector": True}
EVALUATION = {
    "eval_data_path": "data.jsonl",
    "eval_image_folder": "images",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "sample_prompts": "prompts.jsonl",
    "sample_steps": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "stage_1": SHARED | {"stage": 1},
    "stage_2": STAGE_2,
    "packed": STAGE_2 | {"packing": True, "model_max_length": 128},
    "bf16": STAGE_2 | {"bf16": True},
    "lora": STAGE_2 | {"lora_enable": True, "lora_r": 4},
    "tower": STAGE_2 | {"freeze_vision": False, "image_token_reduction": "mlpmixer"},
    "tied": STAGE_2 | {"model_name_or_path": "tied"},
    "recompute": STAGE_2 | {"recompute": "full", "text_loss": "chunked"},
    "sgd": STAGE_2 | {"optim": "sgd"},
    "rmsprop": STAGE_2 | {"optim": "rmsprop", "learning_rate": 1e-4},
    # Six steps of two micro-batches; another run resumes from the checkpoint of step 4.
    "accumulated": STAGE_2
    | {"gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    | EVALUATION,
}
RESUMED = {"resumed": ("accumulated", 4), "finished": ("accumulated", 6)}
"""Name of a run -> the case and step of the checkpoint that it resumes from."""
HYBRID: dict[str, Any] = STAGE_2 | {
    "gradient_accumulation_steps": 2,
    "max_steps": 4,  # two epochs of 12 samples
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "llm")
    make_language_model(folder / "tied", tie_word_embeddings=True)
    make_vision_tower(folder / "tower")
    make_records(folder)
    prompts = [{"prompt": "<image>\nWhat is this?", "images": ["images/0.png"]}, {"prompt": "Draw.", "draw": True}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return folder


def train_on_two(parts: Path, folder: Path, cases: Iterable[str], *, on_gpus: bool = False) -> Path:
    """Run the cases with DDP and with FSDP2 in `folder`: `ENGINE-CASE-RANK.json` and `ENGINE-CASE/`.

    With FSDP2, the second process has no access to weights: it gets them from the first.
    """
    runs = {}
    for engine in ("ddp", "fsdp2"):  # Accelerate keeps FSDP2 once it is told to use it
        for case in cases:
            flags = CASES[case]
            own = {"sharding": engine, "use_cpu": not on_gpus}
            own |= {name: str(parts / value) for name, value in flags.items() if value in PATHS}
            runs[f"{engine}-{case}"] = flags | own
        for resumed, (case, step) in RESUMED.items():
            if f"{engine}-{case}" in runs:
                checkpoint = folder / f"{engine}-{case}" / f"checkpoint-{step}"
                runs[f"{engine}-{resumed}"] = runs[f"{engine}-{case}"] | {"resume_from_checkpoint": str(checkpoint)}
        if "tied" in cases:
            own = {"sharding": engine, "use_cpu": not on_gpus, "model_name_or_path": str(folder / "ddp-tied")}
            runs[f"{engine}-continued"] = SHARED | {"stage": 2} | own
    run_engines(parts, folder, runs)
    return folder


@pytest.fixture(scope="module")
def two(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_two(parts, tmp_path_factory.mktemp("two"), CASES)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a result, by file and name."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name}:{name}": weight for file in files for name, weight in load_file(file).items()}


def check_same(folder: Path, case: str, *, abs_loss: float, abs_weight: float, processes: int = 2) -> None:
    """What both engines have logged and saved is equal up to rounding."""
    for rank in range(processes):
        ddp, fsdp2 = (json.loads((folder / f"{engine}-{case}-{rank}.json").read_text()) for engine in ("ddp", "fsdp2"))
        assert fsdp2["layers"], "decoder layers are not sharded one by one"
        assert fsdp2["partitioned"] > 0
        assert ddp["partitioned"] == 0
        assert fsdp2["unsharded"] == 0, "gradients of all weights are kept between micro-batches"
        assert fsdp2["samples"] == ddp["samples"]
        assert len(fsdp2["steps"]) == 2 or "resumed" not in case, "it has not resumed two steps before the end"
        assert fsdp2["eval_losses"] or "eval_data_path" not in CASES.get(case, {})
        assert fsdp2["losses"] == pytest.approx(ddp["losses"], abs=abs_loss)
        assert fsdp2["norms"] == pytest.approx(ddp["norms"], rel=100 * abs_loss)
        assert fsdp2["eval_losses"] == pytest.approx(ddp["eval_losses"], abs=abs_loss)
    found, expected = weights(folder / f"fsdp2-{case}"), weights(folder / f"ddp-{case}")
    assert expected
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        if case == "bf16":  # Adam's first steps follow the signs of gradients; rounding decides those of small ones
            assert (found[name] - weight).norm() <= 0.05 * weight.norm(), name
            continue
        # Attention does not depend on the bias of its keys: its gradient is rounding, of which Adam makes large steps.
        assert name.endswith("k_proj.bias") or torch.allclose(found[name], weight, atol=abs_weight), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "continued", *(name for name in RESUMED if name != "finished")])
def test_fsdp2_trains_as_ddp(two: Path, case: str) -> None:
    tolerance = 1e-2 if case == "bf16" else 1e-4
    check_same(two, case, abs_loss=tolerance, abs_weight=tolerance)


@pytest.fixture(scope="module")
def four(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DDP, and FSDP2 within two groups of two processes; a run of each, and one that resumes its checkpoint."""
    folder = tmp_path_factory.mktemp("four")
    runs = {}
    for engine, flags in {"ddp": {"sharding": "ddp"}, "fsdp2": {"sharding": "fsdp2", "dp_replicate": 2}}.items():
        checkpoint = folder / f"{engine}-hybrid" / "checkpoint-2"
        runs[f"{engine}-hybrid"] = HYBRID | flags | {"use_cpu": True}
        runs[f"{engine}-hybrid_resumed"] = runs[f"{engine}-hybrid"] | {"resume_from_checkpoint": str(checkpoint)}
    run_engines(parts, folder, runs, processes=4)
    return folder


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", ["hybrid", "hybrid_resumed"])
def test_hybrid_sharding_trains_as_ddp_on_different_samples(four: Path, case: str) -> None:
    check_same(four, case, abs_loss=1e-4, abs_weight=1e-4, processes=4)
    seen = [json.loads((four / f"fsdp2-{case}-{rank}.json").read_text()) for rank in range(4)]
    assert all(mesh == [2, 2] for rank in seen for mesh in rank["meshes"])
    samples = sorted(number for rank in seen for number in rank["samples"])
    assert samples == sorted([*range(12)] * (2 if case == "hybrid" else 1))  # each once in an epoch


@pytest.mark.distributed
@pytest.mark.slow
def test_a_finished_run_writes_its_result_again(two: Path) -> None:
    found, expected = weights(two / "fsdp2-finished"), weights(two / "fsdp2-accumulated")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_fsdp2_trains_as_ddp_on_gpus(parts: Path, tmp_path: Path) -> None:
    folder = train_on_two(parts, tmp_path, ON_GPUS, on_gpus=True)
    for case in [*ON_GPUS, "resumed"]:
        check_same(folder, case, abs_loss=1e-2, abs_weight=1e-2)
