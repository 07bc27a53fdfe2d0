"""What a run logs: speed, gradients, validation losses, samples, trackers."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from file_parts import other_permissions
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_parts import arguments, make_records
from visualization_parts import CROSS_ATTENTION_DIM, tiny_scheduler, tiny_unet, tiny_vae

from metamorph import cli
from metamorph.data.batching.collation import PaddedCollator
from metamorph.data.dataset import load_data
from metamorph.evaluation.losses import evaluate_losses, total_loss
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.costs.flops import Work, count_work, model_flops
from metamorph.training.optimizer import module_of
from metamorph.training.reporting.monitor import gradient_norms
from metamorph.training.run import TrainResult, run_training
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.projector import VisualizationProjector


pytestmark = pytest.mark.integration


SPEED = (
    *("step_seconds", "tokens_per_second", "samples_per_second", "images_per_second", "model_tflops_per_device"),
    *("mfu", "data_wait_share", "peak_memory_gib", "tokens_seen", "skipped_records"),
)
PROMPTS = [
    {"prompt": "What colour is the sky?"},
    {"prompt": "What is this?", "images": ["images/0.png"]},
    {"prompt": "Draw something.", "draw": True},
]


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of seven and five records as a mixture."""
    folder = tmp_path_factory.mktemp("validation")
    make_records(folder, 7)
    other = make_records(folder / "other", 5)
    other.rename(folder / "edits.jsonl")
    (folder / "mixture.yaml").write_text(
        "- {path: data.jsonl, image_folder: images}\n- {path: edits.jsonl, image_folder: other/images}\n"
    )
    return folder / "mixture.yaml"


@pytest.fixture(scope="module")
def visualizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one for the visual tokens of the tiny tower."""
    folder = tmp_path_factory.mktemp("visualizer")
    torch.manual_seed(1)
    projector = VisualizationProjector(input_dim=24, hidden_dim=16, output_dim=CROSS_ATTENTION_DIM, num_heads=2)
    VisualizationPipeline.from_parts(projector, tiny_unet(), tiny_vae(), tiny_scheduler()).save_pretrained(folder)
    return folder


def stage_2(parts: Path, output_dir: Path, **flags: object) -> TrainResult:
    defaults = {"from_scratch_connector": True, "warmup_ratio": 0, "gradient_accumulation_steps": 2}
    return run_training(*arguments(parts, output_dir, stage=2, **{**defaults, **flags}))


def lines(result: TrainResult, key: str) -> list[dict[str, float]]:
    return [line for line in result.log_history if key in line]


@pytest.fixture(scope="module")
def observed(parts: Path, validation: Path, visualizer: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """One epoch of twelve samples in three steps, with everything that can be looked at."""
    folder = tmp_path_factory.mktemp("observed")
    (parts / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return stage_2(
        parts,
        folder,
        max_steps=-1,
        num_train_epochs=1,
        logging_steps=2,
        logging_first_step=True,
        eval_data_path=str(validation),
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        sample_steps=2,
        sample_prompts=str(parts / "prompts.jsonl"),
        sample_visualizer=str(visualizer),
        report_to="tensorboard",
        peak_tflops=0.01,
    )


def test_without_a_logging_strategy_there_are_no_log_lines(parts: Path, tmp_path: Path) -> None:
    assert not lines(stage_2(parts, tmp_path, max_steps=1, logging_strategy="no"), "loss")


def test_every_log_entry_has_speed_and_memory(observed: TrainResult) -> None:
    logged = lines(observed, "text_loss")
    assert [line["step"] for line in logged] == [1, 2, 3]  # the first, every second, the last
    for line in logged:
        assert all(math.isfinite(line[name]) for name in SPEED)
        assert min(line[name] for name in SPEED[:6]) > 0
        assert 0 <= line["data_wait_share"] <= 1
        assert line["skipped_records"] == 0
        assert line["mfu"] == pytest.approx(line["model_tflops_per_device"] / 0.01)


def test_what_was_seen_is_counted_exactly(parts: Path, observed: TrainResult) -> None:
    data = load_data(parts / "data.jsonl", observed.processor, parts / "images")
    samples = [data[index] for index in range(len(data))]
    assert len(samples) == 12
    first, second, last = (line["tokens_seen"] for line in lines(observed, "text_loss"))
    assert 0 < first < second < last == sum(len(e["input_ids"]) for e in samples)
    end = observed.log_history[-1]
    count = end["train_samples_per_second"] * end["train_runtime"]
    assert count == pytest.approx(12, rel=1e-3)
    flops = model_flops(observed.model)
    works = [count_work(PaddedCollator(0)([e]), observed.model.config.num_image_tokens) for e in samples]
    assert end["total_flos"] == pytest.approx(flops.total(Work(*sum(works).tolist())))


def test_packed_runs_count_samples_and_tokens_not_rows(parts: Path, observed: TrainResult, tmp_path: Path) -> None:
    packed = stage_2(
        parts, tmp_path, packing=True, model_max_length=128, max_steps=-1, num_train_epochs=1, logging_steps=1
    )
    data = load_data(parts / "data.jsonl", observed.processor, parts / "images")
    assert lines(packed, "text_loss")[-1]["tokens_seen"] == sum(len(data[index]["input_ids"]) for index in range(12))
    end = packed.log_history[-1]
    assert end["train_samples_per_second"] * end["train_runtime"] == pytest.approx(12, rel=1e-3)
    assert end["total_flos"] == pytest.approx(observed.log_history[-1]["total_flos"])
    baseline = constant_cosine([data[index] for index in range(12)], packed.model)
    assert lines(packed, "text_loss")[-1]["visual_cosine_baseline"] == pytest.approx(baseline, rel=1e-5)


def constant_cosine(samples: list[dict[str, torch.Tensor]], model: MetaMorphForConditionalGeneration) -> float:
    """Mean cosine of all visual targets with the mean target of their place."""
    images = []
    for sample in samples:
        is_target = sample["visual_target_mask"][sample["input_ids"] == model.config.image_token_id]
        if is_target.any():
            tokens = model.get_visual_tokens(sample["pixel_values"])
            images.append(tokens[is_target.view(tokens.shape[:2]).all(dim=1)])
    targets = torch.cat(images)
    assert len(targets) > 1
    return torch.cosine_similarity(targets, targets.mean(dim=0, keepdim=True), dim=-1).mean().item()


def test_r06_watching_changes_nothing(parts: Path, observed: TrainResult, tmp_path: Path) -> None:
    plain = stage_2(parts, tmp_path, max_steps=-1, num_train_epochs=1, logging_steps=2, logging_first_step=True)
    for ours, theirs in zip(lines(plain, "text_loss"), lines(observed, "text_loss"), strict=True):
        assert ours["loss"] == theirs["loss"]
    weights = observed.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.model.state_dict().items())


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01, 100.0])
def test_gradient_norms_are_those_of_the_step_before_clipping(
    max_grad_norm: float, parts: Path, tmp_path: Path
) -> None:
    flags = {"learning_rate": 0.0, "max_steps": 1, "max_grad_norm": max_grad_norm}
    result = stage_2(parts, tmp_path, train_sampling_strategy="sequential", **flags)
    data = load_data(parts / "data.jsonl", result.processor, parts / "images")
    result.model.zero_grad()
    result.model(**PaddedCollator(0)([data[index] for index in range(4)])).loss.backward()
    line = lines(result, "text_loss")[0]
    direct = gradient_norms(result.model, module_of)
    assert set(direct) == {"language_model", "mm_projector", "vision_head"}
    for module, norm in direct.items():
        assert line[f"grad_norm_{module}"] == pytest.approx(norm.item(), rel=1e-4), module
    assert math.hypot(*(norm.item() for norm in direct.values())) == pytest.approx(line["grad_norm"], rel=1e-4)


def test_validation_losses_equal_a_direct_computation(parts: Path, validation: Path, tmp_path: Path) -> None:
    """Sample by sample, with weights that do not move."""
    flags = {"eval_data_path": str(validation), "eval_strategy": "epoch", "eval_on_start": True}
    result = stage_2(parts, tmp_path, learning_rate=0.0, max_steps=1, per_device_eval_batch_size=3, **flags)
    first, *_ = logged = lines(result, "eval_loss")
    assert [line["step"] for line in logged] == [0, 1]
    assert all(line == pytest.approx({**first, **own}) for line in logged for own in [fixed(line)])
    data = load_data(validation, result.processor)
    sums = {name: torch.zeros(5) for name in data.sources}
    for index in range(len(data)):
        with torch.no_grad():
            out = result.model.eval()(**PaddedCollator(0)([data[index]]))
        counts = (out.num_text_tokens, out.num_visual_tokens, out.num_visual_tokens)
        means = (out.text_loss, out.visual_loss, out.visual_cosine)
        weighted = [mean * count for mean, count in zip(means, counts, strict=True)]
        sums[data.locate(index)[0].name] += torch.stack([*weighted, *counts[:2]])
    for prefix, (text, visual, cosine, num_text, num_visual) in [
        *((f"eval_{name}_", total.tolist()) for name, total in sums.items()),
        ("eval_", sum(sums.values()).tolist()),
    ]:
        assert first[f"{prefix}num_text_tokens"] == num_text > 0
        assert first[f"{prefix}num_visual_tokens"] == num_visual > 0
        assert first[f"{prefix}text_loss"] == pytest.approx(text / num_text, rel=1e-5)
        assert first[f"{prefix}visual_loss"] == pytest.approx(visual / num_visual, rel=1e-5)
        assert first[f"{prefix}visual_cosine"] == pytest.approx(cosine / num_visual, rel=1e-4)
        assert first[f"{prefix}loss"] == pytest.approx(text / num_text + visual / num_visual, rel=1e-5)
    for prefix, names in [*((f"eval_{name}_", [name]) for name in data.sources), ("eval_", [*data.sources])]:
        samples = [data[index] for index in range(len(data)) if data.locate(index)[0].name in names]
        assert first[f"{prefix}visual_cosine_baseline"] == pytest.approx(constant_cosine(samples, result.model))


def test_image_starts_are_measured_where_an_answer_has_an_image(observed: TrainResult, validation: Path) -> None:
    """With a head that prefers `<image_start>` in some of the places where it is due."""
    model, data = copy.deepcopy(observed.model).eval(), load_data(validation, observed.processor)
    start = model.config.image_start_token_id
    hidden, source = [], []
    for index in range(len(data)):
        batch = PaddedCollator(0)([data[index]])
        for place in (batch["labels"][0] == start).nonzero().flatten().tolist():  # no answer here has two images
            with torch.no_grad():
                hidden.append(model(**batch, output_hidden_states=True).hidden_states[-1][0, place - 1])
            source.append(data.locate(index)[0].name)
    with torch.no_grad():
        # Orthogonal to the mean of the states, with which it would prefer all or none.
        mean = torch.stack(hidden).mean(dim=0)
        apart = hidden[0] - mean
        model.lm_head.weight[start] = 100 * (apart - mean * (apart @ mean) / (mean @ mean))
        found = [model.compute_logits(state).argmax().item() == start for state in hidden]
    assert 0 < sum(found) < len(found)
    for batch_size in (1, 4):
        losses = evaluate_losses(model, data, Accelerator(cpu=True), batch_size=batch_size)
        for name, loss in losses.items():
            own = [was_found for was_found, its_source in zip(found, source, strict=True) if its_source == name]
            metrics = loss.as_metrics()
            assert metrics["num_image_answers"] == len(own) > 0
            assert metrics["image_start_accuracy"] == sum(own) / len(own)
        assert total_loss(losses).as_metrics()["image_start_accuracy"] == sum(found) / len(found)


def fixed(line: dict[str, float]) -> dict[str, float]:
    """What differs between two evaluations of the same weights."""
    return {name: line[name] for name in ("step", "epoch", "eval_runtime") if name in line}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_best_model_is_loaded_at_the_end(stage: int, parts: Path, validation: Path, tmp_path: Path) -> None:
    """Here the largest loss counts as best, so that it is not the last."""
    flags = {"from_scratch_connector": True} if stage == 2 else {}
    result = run_training(
        *arguments(
            parts,
            tmp_path,
            stage=stage,
            max_steps=3,
            eval_data_path=str(validation),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,
            **flags,
        )
    )
    losses = [line["eval_loss"] for line in lines(result, "eval_loss")]
    assert max(losses) - losses[-1] > 1e-3
    data = load_data(validation, result.processor)
    end = total_loss(evaluate_losses(result.model, data, Accelerator(cpu=True)))
    assert end.as_metrics()["loss"] == pytest.approx(max(losses), rel=1e-5)


def test_evaluate_loss_measures_what_training_logged(
    observed: TrainResult, validation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", observed.output_dir, "--data_path", str(validation), "--cpu", "--batch_size", "2"]
    assert cli.main(["evaluate", "loss", *words, "--output", str(tmp_path / "losses.json")]) == 0
    assert "edits" in capsys.readouterr().out
    losses = json.loads((tmp_path / "losses.json").read_text())
    logged = lines(observed, "eval_loss")[-1]
    for prefix, values in (("eval_data_", losses["data"]), ("eval_edits_", losses["edits"]), ("eval_", losses["all"])):
        assert {name: logged[prefix + name] for name in values} == pytest.approx(values, rel=1e-4)
    assert cli.main(["evaluate", "loss", *words, "--batch_size", "0"]) == 2
    assert "--batch_size 0" in capsys.readouterr().err


def test_samples_are_written(observed: TrainResult) -> None:
    folder = Path(observed.output_dir) / "samples"
    assert [step.name for step in folder.iterdir()] == ["step-2"]
    answers = [json.loads(line) for line in (folder / "step-2" / "samples.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == [
        "What colour is the sky?",
        "<image>\nWhat is this?",
        "Draw something.",
    ]
    assert answers[2]["answer"].startswith("[image 1]")
    assert other_permissions(Path(observed.output_dir)) == {}
    assert answers[2]["answer_images"][0] == "003-1"
    with Image.open(folder / "step-2" / "003-1.png") as image:
        assert image.mode == "RGB"


def test_tensorboard_has_scalars_texts_and_images(observed: TrainResult) -> None:
    events = EventAccumulator(str(Path(observed.output_dir) / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {f"train/{name}" for name in (*SPEED, "text_loss", "grad_norm_vision_head")} <= {*tags["scalars"]}
    for name in ("eval/loss", "eval/data_text_loss", "eval/edits_visual_loss"):
        assert [event.step for event in events.Scalars(name)] == [0, 2, 3]
        logged = [line["eval_" + name.removeprefix("eval/")] for line in lines(observed, "eval_loss")]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(logged)
    assert events.Images("samples/003-1")[0].step == 2
    assert "samples/001/text_summary" in tags["tensors"]


def test_a_resumed_run_continues_counting(parts: Path, tmp_path: Path) -> None:
    """Saved between two log lines; TensorBoard's curve continues in the same folder."""
    flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    uninterrupted = stage_2(parts, tmp_path / "uninterrupted", **flags)
    checkpoint = str(tmp_path / "uninterrupted" / "checkpoint-1")
    resumed = stage_2(parts, tmp_path / "resumed", resume_from_checkpoint=checkpoint, report_to="tensorboard", **flags)
    assert [line["step"] for line in lines(resumed, "text_loss")] == [2, 4]
    for ours, theirs in zip(lines(resumed, "text_loss"), lines(uninterrupted, "text_loss"), strict=True):
        assert ours["tokens_seen"] == theirs["tokens_seen"]
    assert resumed.log_history[-1]["total_flos"] == pytest.approx(uninterrupted.log_history[-1]["total_flos"])
    again = stage_2(
        parts,
        tmp_path / "resumed",
        **{**flags, "max_steps": 6},
        resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-4"),
        report_to="tensorboard",
    )
    assert again.global_step == 6
    events = EventAccumulator(str(tmp_path / "resumed" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eval_strategy": "steps"}, "--eval_data_path"),
        ({"eval_data_path": "data.jsonl"}, "--eval_strategy"),
        ({"eval_data_path": "none.jsonl"}, "--eval_data_path none.jsonl"),
        ({"eval_image_folder": "none"}, "--eval_image_folder none"),
        ({"sample_steps": 5}, "--sample_prompts"),
        ({"sample_prompts": "x.txt"}, "--sample_steps"),
        ({"sample_prompts": "none.txt", "sample_steps": 2}, "--sample_prompts none.txt does not exist"),
        ({"sample_steps": 0, "sample_prompts": "x.txt"}, "--sample_steps 0"),
        ({"sample_visualizer": "x"}, "--sample_visualizer x"),
        ({"peak_tflops": 0.0}, "--peak_tflops 0"),
        ({"report_to": "tensorbord"}, "--report_to tensorbord"),
        ({"report_to": "mlflow"}, "--report_to mlflow: mlflow is not installed"),
    ],
)
def test_bad_flags_are_refused_before_the_model_is_loaded(
    flags: dict[str, object], message: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts)
    monkeypatch.setattr("metamorph.training.run.load_for_engine", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stage_2(parts, tmp_path, **flags)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not valid JSON"),
        ('{"text": "x"}', '"prompt"'),
        ('{"prompt": "x", "image": "a.png"}', "keys are"),
        ('{"prompt": "x", "images": ["none.png"]}', "there is no image"),
        ('{"prompt": "<image>"}', "has 1 <image> markers"),
        ('{"prompt": "%s"}' % ("red " * 9000), r"prompt 1 has \d+ tokens, which leaves 0 of"),
        ("", "is empty"),
    ],
)
def test_bad_prompts_are_refused(line: str, message: str, parts: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stage_2(parts, tmp_path / "out", sample_steps=1, sample_prompts=str(tmp_path / "prompts.jsonl"))


def test_r29_no_tracker_and_no_video_library_is_imported() -> None:
    """In a separate process, in which they cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('wandb', 'tensorboard', 'trackio', 'av', 'decord'): sys.modules[name] = None\n"
        "import metamorph.training.run, metamorph.training.reporting.trackers\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
