"""Images of any mode and shape become the exact square of the tower, with every image processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from processing_parts import golden_image, peak_memory
from transformers import BitImageProcessor, CLIPImageProcessor, Siglip2ImageProcessor, SiglipImageProcessor

from metamorph.models import image_processing
from metamorph.models.image_processing import load_image_processor, preprocess_images, square_image_processor, to_rgb


PROCESSORS = [SiglipImageProcessor, CLIPImageProcessor, BitImageProcessor, Siglip2ImageProcessor]


@pytest.mark.parametrize("kind", PROCESSORS)
def test_every_image_is_the_towers_square(kind):
    processor = square_image_processor(kind(), image_size=56)
    images = [Image.new("RGB", size, "red") for size in ((56, 56), (200, 10), (10, 200), (1, 1), (57, 56))]
    assert preprocess_images(images, processor).shape == (5, 3, 56, 56)


@pytest.mark.parametrize("kind", [SiglipImageProcessor, CLIPImageProcessor, BitImageProcessor])
def test_pixels_are_bit_for_bit_those_of_the_library(kind):
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), golden_image("vqa")]
    processor = square_image_processor(kind(), image_size=56)
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(preprocess_images(images, processor), expected)


@pytest.mark.parametrize("kind", [CLIPImageProcessor, BitImageProcessor])
def test_nothing_is_cropped_away(kind):
    """A wide image, red on the left and blue on the right: the centre crop of CLIP would lose both ends."""
    image = Image.new("RGB", (400, 40), "white")
    image.paste("red", (0, 0, 40, 40))
    image.paste("blue", (360, 0, 400, 40))
    processor = square_image_processor(kind(), image_size=40)
    pixels = preprocess_images([image], processor)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    colours = (pixels * std + mean)[:, 20, [1, -2]].T
    assert torch.allclose(colours, torch.tensor([[1.0, 0, 0], [0, 0, 1]]), atol=0.02)


def test_the_size_is_the_processors_own_unless_it_is_given():
    crop = {"height": 40, "width": 40}
    assert square_image_processor(CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=crop)).size["height"] == 40
    assert square_image_processor(SiglipImageProcessor(size={"height": 32, "width": 32})).size["height"] == 32
    with pytest.raises(ValueError, match="not a square; pass the tower's image size"):
        square_image_processor(SiglipImageProcessor(size={"height": 32, "width": 64}))


def test_the_given_processor_is_left_as_it_is():
    original = CLIPImageProcessor()
    square_image_processor(original, image_size=40)
    assert original.do_center_crop
    assert dict(original.size)["shortest_edge"] == 224


def test_pad_keeps_the_proportions():
    image = Image.new("RGB", (64, 32), "black")
    processor = square_image_processor(SiglipImageProcessor(), image_size=32)
    pixels = preprocess_images([image], processor, aspect_ratio="pad")[0, 0]
    assert torch.allclose(pixels[:6], torch.zeros(6, 32), atol=0.01)  # the mean colour, normalised
    assert torch.allclose(pixels[-6:], torch.zeros(6, 32), atol=0.01)
    assert (pixels[12:20] == -1).all()
    assert (preprocess_images([image], processor) == -1).all()


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST])
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (50, 50), (3, 700), (700, 3), (1, 1), (333, 250)])
def test_pad_is_bit_for_bit_a_padded_square_resized(size, resample, monkeypatch):
    monkeypatch.setattr(image_processing, "_BAND_PIXELS", 5000)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    kind = SiglipImageProcessor(resample=resample, image_mean=[0.2, 0.5, 0.7])
    processor = square_image_processor(kind, image_size=56)
    square = Image.new("RGB", (max(size),) * 2, (51, 128, 178))
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    expected = preprocess_images([square], processor)
    assert torch.equal(preprocess_images([image], processor, aspect_ratio="pad"), expected)


@pytest.mark.parametrize("size", [(20_000, 40), (40, 20_000), (5_000_000, 1)])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_long_images_cost_the_memory_of_the_result(size, aspect_ratio):
    """As a square, 20,000 pixels would take 1.5 GiB; Pillow's weights for 5 million pixels 160 MB."""
    processor = square_image_processor(SiglipImageProcessor(), image_size=32)
    image = Image.new("RGB", size, "white")
    preprocess_images([Image.new("RGB", (9, 9))], processor, aspect_ratio)
    assert peak_memory(lambda: preprocess_images([image], processor, aspect_ratio)) < 64 * 2**20


@pytest.mark.parametrize("mode", ["I;16", "F", "RGBA"])
def test_converting_costs_the_memory_of_the_result(mode):
    image = Image.new(mode, (4000, 4000))
    assert peak_memory(lambda: to_rgb(image)) < 2 * 4 * 4000 * 4000  # Pillow takes 4 bytes for a pixel of RGB


def test_a_saved_image_processor_is_loaded(tmp_path):
    CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}).save_pretrained(tmp_path)
    loaded = square_image_processor(load_image_processor(str(tmp_path)))
    assert preprocess_images([golden_image("vqa")], loaded).shape == (1, 3, 40, 40)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_become_rgb(mode):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], dtype=np.uint16), [0, 1, 255]),
        (np.array([[0, 257, 514]], dtype=np.uint16), [0, 1, 2]),  # a dark 16-bit image stays dark
        (np.array([[0, 32896, 65535]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 7, 255]], dtype=np.int32), [0, 7, 255]),
        (np.array([[0, 0.2, 1]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0, np.nan, 255]], dtype=np.float32), [0, 0, 255]),
    ],
)
def test_deep_greys_are_scaled_and_not_clipped(values, expected):
    rgb = np.asarray(to_rgb(Image.fromarray(values)))
    assert rgb[0, :, 0].tolist() == expected
    assert (rgb == rgb[..., :1]).all()


@pytest.mark.parametrize("kind", ["I;16", "I", "F", "RGBA", "LA", "P", "RGB"])
def test_bands_of_rows_are_converted_as_the_whole(kind, monkeypatch):
    numbers = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    if kind in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[kind]
        image = Image.fromarray((numbers[..., 0].astype(np.int64) * 257).astype(dtype))
    elif kind in ("RGBA", "LA"):
        image = Image.fromarray(numbers).convert(kind)
    else:
        image = Image.fromarray(numbers[..., :3].copy())
        image = image.quantize(16) if kind == "P" else image
        image.info["transparency"] = bytes([0, 100, 255]) if kind == "P" else image.getpixel((3, 3))
    full = np.asarray(to_rgb(image))
    monkeypatch.setattr(image_processing, "_BAND_PIXELS", 100)
    assert np.array_equal(np.asarray(to_rgb(image)), full)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        image = image.convert("P")
        image.info["transparency"] = image.getpixel((0, 0))
    elif mode != "RGBA":
        image = image.convert(mode)
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
