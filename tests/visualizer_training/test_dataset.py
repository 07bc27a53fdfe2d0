"""Training samples of the visualizer: crops, formats, sources and order."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessor
from visualization_parts import random_images

from metamorph.visualization.pixels import PixelFormat, crop_square
from metamorph.visualizer_training.dataset import Sample, StreamBatches, VisualizerDataset
from metamorph.visualizer_training.images.bad_images import BadImages
from metamorph.visualizer_training.images.sources import TrainingImages, open_images


def gradient(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row."""
    columns = np.broadcast_to(np.linspace(0, 255, width)[None], (height, width))
    rows = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8))


def crops(width: int, height: int, *formats: int, **options) -> VisualizerDataset:
    source = TrainingImages([gradient(width, height)])
    return VisualizerDataset(source, *map(PixelFormat, formats), BadImages(1), **options)


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (48, 48)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_r44_tower_and_vae_see_the_same_crop(size, random_crop):
    sample = crops(*size, 16, 32, random_crop=random_crop, seed=3)[Sample(index=0, position=7)]
    assert sample["tower_pixels"].shape == (3, 16, 16)
    assert sample["vae_pixels"].shape == (3, 32, 32)
    shrunk = torch.nn.functional.avg_pool2d(sample["vae_pixels"], 2)
    torch.testing.assert_close(sample["tower_pixels"], shrunk, rtol=0, atol=0.06)


def test_r44_crop_is_the_centre_and_keeps_the_aspect():
    square = crop_square(gradient(90, 30))
    assert square.size == (30, 30)
    assert np.array_equal(np.array(square), np.array(gradient(90, 30))[:, 30:60])


def test_random_crop_is_a_function_of_seed_and_position():
    dataset = crops(90, 30, 8, 8, random_crop=True)
    first, second = (dataset[Sample(0, position)]["vae_pixels"] for position in (1, 2))
    assert torch.equal(first, dataset[Sample(0, 1)]["vae_pixels"])
    assert not torch.equal(first, second)


def test_tower_pixels_are_those_of_the_siglip_processor():
    image = random_images(1, size=(50, 50))[0]
    expected = SiglipImageProcessor(size={"height": 32, "width": 32})(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(PixelFormat(32).pixels(image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_image_once_per_epoch_in_a_new_order(count, world_size):
    ranks = [StreamBatches(count, 2, 2 * count, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    samples = sorted((s for rank in ranks for batch in rank for s in batch), key=lambda s: s.position)
    assert [s.position for s in samples] == list(range(len(samples)))
    epochs = [[s.index for s in samples[at : at + count]] for at in range(0, 4 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 5 or epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_r42_order_resumes_with_any_number_of_processes(world_size):
    expected = [s for batch in StreamBatches(7, 3, 10, seed=0) for s in batch]
    ranks = [StreamBatches(7, 2, 5, 0, rank, world_size).resume(2, 12) for rank in range(world_size)]
    assert [len(batch) for batch in ranks[0]] == [0, 0, 2, 2, 2]  # Trainer skips those that are done
    resumed = sorted((s for rank in ranks for batch in rank for s in batch), key=lambda s: s.position)
    assert resumed == expected[12 : 12 + 6 * world_size]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_r41_every_image_format_is_read(suffix, tmp_path):
    (tmp_path / "sub").mkdir()
    random_images(1)[0].save(tmp_path / "sub" / f"a.{suffix}")
    (tmp_path / "notes.txt").write_text("no image")
    source = open_images(image_folder=tmp_path)
    assert len(source) == 1
    assert source.load(0).mode == "RGB"


def test_r41_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no image ending in .*, and no \.tar archive"):
        open_images(image_folder=tmp_path)


def test_records_of_every_form(tmp_path):
    for name in "abcdef":
        random_images(1)[0].save(tmp_path / f"{name}.png")
    records = ["a.png", {"image": "b.png"}, {"image": ["c.png", "d.png"]}, {"jpg": "e.png"}, {"conversations": []}]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "lines.jsonl").write_text('{"id": 1, "webp": "f.png"}\n\n')
    source = open_images([tmp_path / "list.json", tmp_path / "lines.jsonl"])
    assert [path.name for path in source.files] == [f"{name}.png" for name in "abcdef"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a.png"\n{broken', "list.json:2: the text is not valid JSON"),
        ("[1, 2", "not a valid JSON array"),
        ("[" * 100_000, "nested too deeply"),
        ('["\\ud800.png"]', "record 1: .* is not the path of a file"),
        ('["../outside.png"]', "record 1: the path '../outside.png' leaves"),
        ('["a/../../outside.tar"]', "record 1: the path .* leaves"),
        ('{"image": 3}', "record 1: 3 is not the path"),
        ('{"text": "none"}', "lists no image"),
    ],
)
def test_wrong_lists_name_file_and_record(text, message, tmp_path):
    (tmp_path / "lists").mkdir()
    for place in ("lists/a.png", "outside.png"):
        random_images(1)[0].save(tmp_path / place)
    (tmp_path / "lists" / "list.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_images([tmp_path / "lists" / "list.json"])


def test_missing_and_broken_images_are_named(tmp_path):
    (tmp_path / "list.json").write_text('["gone.png"]')
    with pytest.raises(FileNotFoundError, match=r"record 1: image .*gone\.png"):
        open_images([tmp_path / "list.json"])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        open_images(image_folder=tmp_path).load(0)
