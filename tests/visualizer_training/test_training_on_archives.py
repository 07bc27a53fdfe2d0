"""The visualizer's trainer on tar archives, some of them damaged."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainerCallback
from visualization_parts import random_images, tiny_flags, write_archive, write_damaged_archives

from metamorph.data.bad_records import TooManyBadRecordsError
from metamorph.visualization import VisualizerArguments, train_visualizer
from metamorph.visualization.pixels import PixelFormat
from metamorph.visualizer_training.dataset import Sample, VisualizerDataset
from metamorph.visualizer_training.images.bad_images import BadImages
from metamorph.visualizer_training.images.sources import open_images


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    options = {"training_steps": 6, "lr": 1e-2, "lr_warmup_steps": 1, "save_step": 0}
    return tiny_flags(tmp_path_factory.mktemp("parts")) | options


def losses(flags: dict, output_dir: Path, **options) -> list[float]:
    return train_visualizer(VisualizerArguments(output_dir=str(output_dir), **(flags | options))).losses


def test_archives_train_as_files_do(flags, tmp_path):
    images = random_images(5)
    (tmp_path / "files").mkdir()
    for index, image in enumerate(images):
        image.save(tmp_path / "files" / f"{index}.png")
    (tmp_path / "shards").mkdir()
    write_archive(tmp_path / "shards" / "a.tar", {f"{i}.png": images[i] for i in range(3)})
    write_archive(tmp_path / "shards" / "b.tar", {f"{i}.png": images[i] for i in (3, 4)})
    expected = losses(flags, tmp_path / "one", image_folder=str(tmp_path / "files"))
    (tmp_path / "list.json").write_text(json.dumps(["shards/a.tar", "shards/b.tar"]))
    options = {"image_jsons": [str(tmp_path / "list.json")], "dataloader_num_workers": 2}
    assert losses(flags, tmp_path / "two", **options) == expected


@pytest.mark.parametrize("options", [{}, {"random_crop": True}, {"cache_latents": True}])
def test_r42_resume_on_archives_equals_uninterrupted(options, flags, tmp_path):
    write_archive(tmp_path / "a.tar", {f"{i}.png": image for i, image in enumerate(random_images(5))})
    options |= {"image_folder": str(tmp_path), "save_step": 4}
    whole = losses(flags, tmp_path / "whole", **options)
    rest = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-4")}
    assert losses(flags, tmp_path / "rest", **options, **rest) == whole[4:]


class Lines(TrainerCallback):
    """Keeps all log entries, that of the run included."""

    def __init__(self, lines):
        self.lines = lines

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def test_damaged_archives_are_reported_and_left_out_within_the_cap(flags, tmp_path, caplog):
    paths = write_damaged_archives(tmp_path / "shards", random_images(8))
    args = VisualizerArguments(output_dir=str(tmp_path / "out"), image_folder=str(tmp_path / "shards"), **flags)
    with pytest.raises(ValueError, match=r"1 of 4 archives are damaged: .*1-cut\.tar \(1 images\) is cut off.*skip"):
        train_visualizer(args)
    with pytest.raises(TooManyBadRecordsError, match=r"1 of 9 images are bad.*\{'lost with damaged archives': 1\}"):
        train_visualizer(replace(args, on_bad_image="skip"))
    logged = []
    with caplog.at_level(logging.INFO, logger="metamorph"):
        result = train_visualizer(
            replace(args, on_bad_image="skip", max_bad_fraction=0.3, logging_steps=6), callbacks=[Lines(logged)]
        )
    assert len(result.losses) == 6
    assert logged[0]["skipped_records"] == 2
    assert logged[-1]["train_loss"] == pytest.approx(logged[0]["loss"])  # bad images count in neither
    assert "4 archives with 8 images, 0 to 4 each" in caplog.text
    assert f"{paths[1]} (1 images) is cut off" in caplog.text
    assert f"{paths[2]} (0 images) is empty" in caplog.text
    assert caplog.text.count("left out: ") == 1  # 12 samples of 8 images meet it more than once
    assert f"{paths[0]}:broken.jpg cannot be read" in caplog.text
    workers = replace(args, on_bad_image="skip", max_bad_fraction=0.3, dataloader_num_workers=2, training_steps=4)
    workers = replace(workers, output_dir=str(tmp_path / "workers"))
    assert train_visualizer(workers, callbacks=[Lines(logged)]).losses
    assert [line["skipped_records"] for line in logged if "loss" in line][-1] == 2


@pytest.mark.parametrize("options", [{}, {"cache_latents": True}, {"gradient_accumulation_steps": 2, "batch_size": 1}])
def test_a_bad_image_changes_no_other_sample(options, flags, tmp_path):
    """The loss of two images is the mean of those with either of them bad, each at its place in the order."""
    images = random_images(2)
    flags = flags | {"training_steps": 1, "on_bad_image": "skip", "max_bad_fraction": 0.5} | options
    found = {}
    for name, bad in (("first", 0), ("second", 1), ("none", None)):
        folder = tmp_path / name
        folder.mkdir()
        write_archive(folder / "a.tar", {f"{i}.png": b"no" if i == bad else images[i] for i in range(2)})
        (found[name],) = losses(flags, tmp_path / f"{name}-out", image_folder=str(folder))
    assert found["none"] == pytest.approx((found["first"] + found["second"]) / 2, abs=1e-5)
    assert found["first"] != pytest.approx(found["second"], abs=1e-3)


def test_bad_images_are_counted_once_and_raise_by_default(tmp_path, caplog):
    (tmp_path / "bad.png").write_bytes(b"no image")
    random_images(1)[0].save(tmp_path / "good.png")
    parts = (open_images(image_folder=tmp_path), PixelFormat(8), PixelFormat(16))
    with pytest.raises(ValueError, match=r"bad\.png cannot be read.*--on_bad_image skip"):
        VisualizerDataset(*parts, BadImages(2))[Sample(0, 0)]
    bad = BadImages(2, "skip", 0.5)
    dataset = VisualizerDataset(*parts, bad)
    samples = [dataset[Sample(0, position)] for position in (0, 4)] + [dataset[Sample(1, 1)]]
    assert [sample["weight"].item() for sample in samples] == [0, 0, 1]
    assert samples[0]["vae_pixels"].shape == (3, 16, 16)
    assert bad.num_bad == 1
    assert caplog.text.count("left out: ") == 1
    with pytest.raises(TooManyBadRecordsError, match=r"1 of 2 images are bad.*The last one: .*bad\.png"):
        VisualizerDataset(*parts, BadImages(2, "skip", 0.4))[Sample(0, 0)]
