"""Training with a feature cache gives the losses of the tower; a cache that does not fit is refused."""

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from file_parts import other_permissions
from training_parts import NUM_IMAGE_TOKENS, arguments, write_records
from transformers import SiglipVisionModel, TrainerCallback

from metamorph import cli
from metamorph.data.dataset import load_data
from metamorph.data.features import FeatureCache, ImageSet, describe_tower, image_key, write_features
from metamorph.data.media.stores import FolderStore
from metamorph.data.records import DataError, RecordError
from metamorph.data.tasks import ImageRef
from metamorph.models.image_files import MediaError
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.vision_tower import load_tower_of
from metamorph.training.arguments import DataArguments, ModelArguments, RunArguments
from metamorph.training.build import load_model, load_training_data, plan_batches, resolve_model
from metamorph.training.features import FeatureArguments, cache_features, load_frozen_tower
from metamorph.training.run import TrainResult, run_training
from metamorph.training.stages import apply_stage
from metamorph.training.trainer import MetaMorphTrainer


pytestmark = pytest.mark.integration


def train(parts: Path, output_dir: Path, **flags: object) -> TrainResult:
    return run_training(*arguments(parts, output_dir, **{"stage": 2, "from_scratch_connector": True, **flags}))


def make_cache(parts: Path, folder: Path, **flags: object) -> int:
    """Write a cache with the flags of `train`; returns the number of images."""
    model_args, data_args, _ = arguments(parts, folder, stage=1, feature_cache=str(folder), **flags)
    feature_args = FeatureArguments(use_cpu=True, per_device_train_batch_size=5, feature_dtype="float32")
    return cache_features(model_args, data_args, feature_args)[1]


def losses(result: TrainResult) -> list[tuple[float, ...]]:
    names = ("loss", "text_loss", "visual_loss", "visual_cosine", "grad_norm")
    return [tuple(line[name] for name in names) for line in result.log_history if "visual_loss" in line]


@pytest.fixture(scope="module")
def cache(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the parts' images in float32."""
    folder = tmp_path_factory.mktemp("cache")
    make_cache(parts, folder)
    return folder


def without_tower_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attempt to run the tower or to open an image an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an image was opened, or the tower was run")

    monkeypatch.setattr("metamorph.models.vision_tower.VisionTower.forward", refuse)
    monkeypatch.setattr("PIL.Image.open", refuse)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_losses_are_those_of_the_tower(
    packing: bool, parts: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"packing": packing, "model_max_length": 96}
    expected = losses(train(parts, tmp_path / "plain", **flags))
    without_tower_runs(monkeypatch)
    found = losses(train(parts, tmp_path / "cached", feature_cache=str(cache), **flags))
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


class TowerWatch(TrainerCallback):
    """Notes in each step whether the tower is where the trainer, or an engine, would move it."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step_end(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Look at the names of the parameters."""
        names = [name for name, _ in kwargs["model"].named_parameters()]
        self.seen.append(any("vision_tower" in name for name in names))


def test_the_tower_stays_in_main_memory_and_is_saved_as_it_was(parts: Path, cache: Path, tmp_path: Path) -> None:
    """Also after a resume, which loads a checkpoint over the model."""
    flags = {"feature_cache": str(cache), "stage": 2, "from_scratch_connector": True, "save_strategy": "steps"}
    for steps in (2, 4):
        watch = TowerWatch()
        run = arguments(parts, tmp_path, max_steps=steps, save_steps=2, lr_scheduler_type="constant", **flags)
        result = run_training(*run, callbacks=[watch])
        assert watch.seen == [False] * 2
        for saved in (tmp_path, tmp_path / f"checkpoint-{steps}"):
            weights = load_tower_of(saved).state_dict()
            assert weights.keys() == result.model.model.vision_tower.state_dict().keys()
            expected = load_frozen_tower(run[0], resolve_model(run[0])).state_dict()
            assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    watch = TowerWatch()
    data = {"eval_data_path": str(parts / "data.jsonl"), "eval_image_folder": str(parts / "images")}
    flags |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "max_steps": 1, **data}
    run_training(*arguments(parts, tmp_path / "validated", **flags), callbacks=[watch])
    assert watch.seen == [True]  # validation encodes images


def test_nothing_moves_a_tower_that_does_not_compute(parts: Path, cache: Path, tmp_path: Path) -> None:
    args = RunArguments(*arguments(parts, tmp_path, stage=1))
    spec = resolve_model(args.model)
    model = load_model(args.model, spec)
    apply_stage(model, args.model)
    planner = plan_batches(args, load_training_data(args, spec.processor))
    MetaMorphTrainer(stage=1, planner=planner, model=model, args=args.training, tower_on_device=False)
    model.to("meta")  # instead of a GPU
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert {weight.device.type for weight in model.model.vision_tower.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match=r"on meta, but the vision tower is on cpu.*--feature_cache keeps the tower"):
        model.get_visual_tokens(torch.zeros(1, 3, 32, 32, device="meta"))


@pytest.mark.slow
def test_stage_1_trains_with_a_cache(parts: Path, cache: Path, tmp_path: Path) -> None:
    expected = train(parts, tmp_path / "plain", stage=1, from_scratch_connector=False)
    found = train(parts, tmp_path / "cached", stage=1, from_scratch_connector=False, feature_cache=str(cache))
    assert found.metrics["train_loss"] == pytest.approx(expected.metrics["train_loss"], abs=1e-5)


@pytest.mark.slow
def test_bfloat16_is_the_default_and_close(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, as a user would make one; a recipe of training brings the flags."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model_name_or_path": str(parts / "llm"),
                "vision_tower": str(parts / "tower"),
                "num_image_tokens": NUM_IMAGE_TOKENS,
                "tune_mm_mlp_adapter": True,
                "image_folder": str(parts / "images"),
                "output_dir": str(tmp_path / "never"),
                "learning_rate": 1e-3,
            }
        )
    )
    folder = tmp_path / "cache"
    words = ["cache-features", str(parts / "data.jsonl"), "--config", str(recipe), "--feature_cache", str(folder)]
    assert cli.main(["data", *words]) == 0
    assert f"visual tokens of 12 images: {folder}" in capsys.readouterr().out
    assert not (tmp_path / "never").exists()
    manifest = json.loads((folder / "feature_cache.json").read_text())
    assert (manifest["images"], manifest["dtype"]) == (12, "bfloat16")
    expected = losses(train(parts, tmp_path / "plain", learning_rate=0.0))
    found = losses(train(parts, tmp_path / "cached", learning_rate=0.0, feature_cache=str(folder)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-3)


def test_tokens_are_those_of_the_tower_whatever_the_shards(parts: Path, cache: Path, tmp_path: Path) -> None:
    model_args, data_args, _ = arguments(parts, tmp_path, stage=1)
    spec = resolve_model(model_args)
    features = FeatureCache(cache, describe_tower(spec.config, spec.processor))
    assert len(features) == 12
    data = {"path": data_args.data_path, "folder": data_args.image_folder}
    plain = load_data(data["path"], spec.processor, data["folder"])
    cached = load_data(data["path"], spec.processor, data["folder"], features=features)
    tower = load_frozen_tower(model_args, spec)
    for index in range(len(plain)):
        ours, theirs = cached[index], plain[index]
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert "pixel_values" not in ours
        assert ("visual_tokens" in ours) == ("pixel_values" in theirs)
        if "visual_tokens" in ours:
            torch.testing.assert_close(ours["visual_tokens"], tower(theirs["pixel_values"]), atol=1e-6, rtol=0)
    assert other_permissions(cache) == {}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"num_image_tokens": 16}, "num_image_tokens 4 instead of 16"),
        ({"image_token_reduction": "concat_interpolation"}, "image_token_reduction 'interpolation' instead of 'concat"),
        ({"mm_vision_select_layer": -2}, "mm_vision_select_layer -1 instead of -2"),
        ({"normalize_vision": False}, "normalize_vision True instead of False"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio 'square' instead of 'pad'"),
    ],
)
def test_a_cache_of_another_reduction_is_refused(
    flags: dict[str, object], reason: str, parts: Path, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"--feature_cache .* does not fit this model: it was made with {reason}"):
        train(parts, tmp_path, feature_cache=str(cache), **flags)


def test_a_cache_of_other_weights_is_refused(parts: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "tower", tmp_path / "tower")
    tower = SiglipVisionModel.from_pretrained(parts / "tower")
    with torch.no_grad():
        next(tower.parameters())[0] += 1e-3
    tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(DataError, match="a tower of other weights"):
        train(parts, tmp_path / "out", vision_tower=str(tmp_path / "tower"), feature_cache=str(cache))


def test_what_changes_while_training_is_refused(parts: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--freeze_vision False trains the tower"):
        train(parts, tmp_path, freeze_vision=False, feature_cache=str(cache))
    with pytest.raises(ValueError, match="--freeze_vision False trains the tower"):
        make_cache(parts, tmp_path, tune_mm_mlp_adapter=False, from_scratch_connector=True, freeze_vision=False)
    with pytest.raises(ValueError, match="--image_token_reduction mlpmixer is trained"):
        train(parts, tmp_path, image_token_reduction="mlpmixer", feature_cache=str(cache))


def test_an_unfinished_cache_is_refused(parts: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "half")
    (tmp_path / "half" / "feature_cache.json").unlink()
    with pytest.raises(DataError, match="is not a feature cache, or is unfinished"):
        train(parts, tmp_path, feature_cache=str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("feature_cache.json", '{"format": 1}'),
        ("feature_cache.json", "[" * 100_000),
        ("feature_cache.json", {"images_per_shard": 0}),
        ("feature_cache.json", {"images": 10**9}),
        ("keys.npy", np.zeros((2, 5), np.uint64)),
        ("rows.npy", np.zeros(12, np.int32)),
        ("rows.npy", np.full(12, -1)),
        ("rows.npy", "cut"),
        ("features-00000.safetensors", "cut"),
    ],
)
def test_a_damaged_cache_is_refused_when_it_is_opened(cache: Path, tmp_path: Path, file: str, content: object) -> None:
    folder = shutil.copytree(cache, tmp_path / "damaged")
    manifest = json.loads((folder / "feature_cache.json").read_text())
    if isinstance(content, np.ndarray):
        np.save(folder / file, content)
    else:
        text = content if isinstance(content, str) else json.dumps({**manifest, **cast("dict", content)})
        (folder / file).write_text(text)
    with pytest.raises(DataError, match=r"make (the cache|it) again"):
        FeatureCache(folder, manifest["tower"])


def test_an_image_that_has_changed_is_an_error_of_its_record(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "images", tmp_path / "images")
    folder = tmp_path / "cache"
    make_cache(parts, folder, image_folder=str(tmp_path / "images"))
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "0.png")
    with pytest.raises(RecordError, match=r"sample-0'\): --feature_cache .* has no visual tokens of 0.png"):
        train(parts, tmp_path / "out", image_folder=str(tmp_path / "images"), feature_cache=str(folder))


def test_a_name_that_no_file_can_have_is_a_missing_image(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="there is no file") as error:
        image_key(ImageRef("a" * 300), FolderStore(tmp_path))
    assert error.value.kind == "missing_image"


def test_a_cache_that_holds_all_images_is_left_as_it_is(
    parts: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(cache, tmp_path / "cache")
    with monkeypatch.context() as patch:
        without_tower_runs(patch)
        assert make_cache(parts, folder) == 12
        write_records(tmp_path / "few.jsonl", [json.loads(line) for line in (parts / "data.jsonl").open()][:2])
        make_cache(parts, folder, data_path=str(tmp_path / "few.jsonl"))
        with pytest.raises(AssertionError, match="the tower was run"):
            make_cache(parts, folder, num_image_tokens=16)
    assert make_cache(parts, folder, num_image_tokens=16) == 12  # another reduction is another cache


@pytest.mark.slow
def test_a_finished_model_brings_its_own_tower(parts: Path, tmp_path: Path) -> None:
    first = train(parts, tmp_path / "first", max_steps=1)
    flags = {"model_name_or_path": first.output_dir, "from_scratch_connector": False, "tune_mm_mlp_adapter": False}
    model_args = ModelArguments(**flags)
    data_args = DataArguments(
        data_path=str(parts / "data.jsonl"), image_folder=str(parts / "images"), feature_cache=str(tmp_path / "cache")
    )
    assert cache_features(model_args, data_args, FeatureArguments(use_cpu=True))[1] == 12
    spec = resolve_model(model_args)
    features = FeatureCache(tmp_path / "cache", describe_tower(spec.config, spec.processor))
    features.check_weights(MetaMorphForConditionalGeneration.from_pretrained(first.output_dir).model.vision_tower)


class Corners(torch.nn.Module):
    """Stands in for a tower where only the bookkeeping is tested: the corner pixels of each image are its tokens."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, 3, height, width] -> [images, 4, 3]."""
        return pixel_values[:, :, ::31, ::31].flatten(2).transpose(1, 2)


def test_parts_of_images_and_members_of_tars_are_images_of_their_own(parts: Path, tmp_path: Path) -> None:
    """Each row of the cache is found, over several shards; the same image is stored once."""
    answer = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "It."}]
    crops = [f"0.png###[{left}, 0, {left + 8}, 8]" for left in (0, 8, 16, 8)]
    records = [{"id": number, "image": ["0.png", crop], "conversations": answer} for number, crop in enumerate(crops)]
    write_records(tmp_path / "crops.jsonl", records)
    for number in range(2):  # the same names in both tars
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as tar:
            for key in range(2):
                tar.add(parts / "images" / f"{2 * number + key}.png", arcname=f"{key}.png")
                text = json.dumps({"image": f"{key}.png", "caption": "A cat."}).encode()
                info = tarfile.TarInfo(f"{key}.json")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    sources = [
        {"path": "crops.jsonl", "task": "visual_cot", "image_folder": str(parts / "images")},
        {"path": "shard-{0..1}.tar", "task": "text_to_image"},
    ]
    (tmp_path / "mixture.yaml").write_text(json.dumps(sources))
    spec = resolve_model(arguments(parts, tmp_path, stage=1)[0])
    plain = load_data(tmp_path / "mixture.yaml", spec.processor)
    images = ImageSet(plain)
    assert images.num_images == 1 + 3 + 4  # the image, three crops of it, four members
    tower, description = Corners(), describe_tower(spec.config, spec.processor)
    options = {"dtype": "float32", "batch_size": 3, "images_per_shard": 3}
    assert write_features(tmp_path / "cache", images.images(), tower, description, **options) == 8
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    features = FeatureCache(tmp_path / "cache", description)
    cached = load_data(tmp_path / "mixture.yaml", spec.processor, features=pickle.loads(pickle.dumps(features)))  # noqa: S301
    for index in range(len(plain)):
        assert torch.equal(cached[index]["visual_tokens"], tower(plain[index]["pixel_values"]))
