"""Detectors and CLIP models of Transformers' architectures, tiny and random: what goes in, what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detector_parts import SAVE, SIDE, save_clip, save_mask2former, save_siglip
from PIL import Image
from transformers import AutoModelForUniversalSegmentation, AutoModelForZeroShotObjectDetection, AutoTokenizer

from metamorph.evaluation.clip import Clip, check_clip
from metamorph.evaluation.detectors import (
    COCO_NAMES,
    ClipColors,
    Detection,
    _crop,
    check_colors,
    check_detector,
    load_detector,
)
from metamorph.models.image_processing import load_image_processor


CPU = torch.device("cpu")
NAMES = COCO_NAMES.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("detectors")
    return {kind: save(folder / kind) for kind, save in SAVE.items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def image(width: int = 48, height: int = 36, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_classes_of_coco_are_those_of_genevals_prompts():
    assert len(NAMES) == len(set(NAMES)) == 80
    assert {"person", "tv remote", "computer mouse", "computer keyboard", "toothbrush"} <= set(NAMES)


@pytest.mark.parametrize("kind", SAVE)
def test_detectors_find_objects_of_the_asked_classes_above_the_threshold(folders, kind):
    """Each architecture runs from its folder without torchvision."""
    check_detector(str(folders[kind]), ["cat", "dog"])
    detector = load_detector(str(folders[kind]), CPU)
    names = NAMES if kind == "mask2former" else ["cat", "dog"]
    found = detector.detect(image(), names, 0.0)
    assert found
    assert {item.name for item in found} <= set(names)
    middle = sorted(item.score for item in found)[len(found) // 2]
    assert len(detector.detect(image(), names, middle)) == sum(item.score > middle for item in found)
    assert (found[0].mask is not None) == (kind == "mask2former")
    if kind == "mask2former":
        only = found[0].name
        assert {item.name for item in detector.detect(image(), [only], 0.0)} == {only}


def test_boxes_of_owlv2_are_those_of_transformers(folders):
    """Boxes refer to the square to which an image is padded."""
    folder, names = folders["owlv2"], ["cat", "dog"]
    processor, tokenizer = load_image_processor(str(folder)), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    text = tokenizer(
        [f"a photo of a {name}" for name in names], padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = model(**processor(image(), return_tensors="pt"), **text)
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(36, 48)])
    found = load_detector(str(folder), CPU).detect(image(), names, 0.0)
    torch.testing.assert_close(torch.tensor([item.box for item in found]), expected["boxes"])
    torch.testing.assert_close(torch.tensor([item.score for item in found]), expected["scores"])
    assert [item.name for item in found] == [names[label] for label in expected["labels"]]


def test_grounding_dino_takes_the_class_whose_words_fit_best(folders):
    folder = folders["grounding-dino"]
    processor, tokenizer = load_image_processor(str(folder)), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    text = tokenizer("red cat. dog.", return_tensors="pt")
    assert text["input_ids"].shape[1] == 7  # [CLS] red cat . dog . [SEP]
    with torch.no_grad():
        scores = model(**processor(image(), return_tensors="pt"), **text).logits[0]
    of_class = torch.stack([scores[:, 1:3].amax(dim=1), scores[:, 4]], dim=1)
    found = load_detector(str(folder), CPU).detect(image(), ["Red cat", "dog"], 0.0)
    assert [item.name for item in found] == [("Red cat", "dog")[label] for label in of_class.argmax(dim=1)]
    torch.testing.assert_close(torch.tensor([item.score for item in found]), of_class.amax(dim=1).sigmoid())


def test_boxes_of_masks_are_tight(folders):
    for item in load_detector(str(folders["mask2former"]), CPU).detect(image(), NAMES, 0.0):
        left, top, right, bottom = map(int, item.box)
        assert item.mask.shape == (36, 48)
        assert item.mask.sum() == item.mask[top:bottom, left:right].sum()
        for edge in (item.mask[top], item.mask[bottom - 1], item.mask[:, left], item.mask[:, right - 1]):
            assert edge.any()


def test_classes_a_detector_does_not_know_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="does not know the class 'circle'"):
        check_detector(str(folders["mask2former"]), ["cat", "circle"])
    other = save_mask2former(tmp_path / "other", num_labels=3)
    assert AutoModelForUniversalSegmentation.from_pretrained(other).config.id2label[0] == "LABEL_0"
    check_detector(str(other), ["LABEL_0"])
    with pytest.raises(ValueError, match="does not know the class 'cat'"):
        check_detector(str(other), ["cat"])


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such.module:Detector", "cannot be imported"),
        ("metamorph.evaluation.detectors:NoSuchDetector", "cannot be imported"),
        ("no/such/folder", "does not exist"),
    ],
)
def test_detectors_and_colors_that_do_not_exist_are_refused(reference, message):
    for check in (lambda: check_detector(reference, []), lambda: check_colors(reference)):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check()


def test_other_models_are_refused(clip, folders):
    with pytest.raises(ValueError, match="is of type clip"):
        check_detector(str(clip), [])
    with pytest.raises(ValueError, match="is of type owlv2"):
        check_clip(str(folders["owlv2"]), "clip")


@pytest.mark.parametrize("save", [save_clip, save_siglip])
def test_features_do_not_depend_on_the_batch(save, tmp_path):
    model = Clip(str(save(tmp_path)), CPU)
    images = [image(seed=seed) for seed in range(3)]
    torch.testing.assert_close(model.images(images), torch.cat([model.images([each]) for each in images]))
    texts = ["a cat", "a photo of a red dog", "a photo " * 50]
    torch.testing.assert_close(model.texts(texts), torch.cat([model.texts([each]) for each in texts]))
    assert not torch.allclose(*model.texts(texts[:2]))


def test_a_colour_is_the_one_with_the_nearest_sentences(clip):
    model = Clip(str(clip), CPU)
    shown = Detection("cat", 1.0, (4.0, 4.0, 30.0, 30.0))
    colors = ("red", "green", "blue")
    crop = F.normalize(model.images([image().crop((4, 4, 30, 30))]), dim=-1)[0]
    scores = []
    for color in colors:
        texts = [f"a photo of a {color} cat", f"a photo of a {color}-colored cat", f"a photo of a {color} object"]
        scores.append(F.cosine_similarity(F.normalize(model.texts(texts), dim=-1).mean(dim=0), crop, dim=0).item())
    assert ClipColors(model).colors_of(image(), [shown], "cat", colors) == [colors[int(np.argmax(scores))]]


def test_only_an_object_is_shown_and_no_pixel_outside_of_the_image():
    mask = np.zeros((SIDE, SIDE), bool)
    mask[4:8, 4:8] = True
    crop = _crop(Image.new("RGB", (SIDE, SIDE), "red"), Detection("cat", 1.0, (2.0, 2.0, 8.0, 8.0), mask))
    assert crop.size == (6, 6)
    assert (crop.getpixel((0, 0)), crop.getpixel((3, 3))) == ((153, 153, 153), (255, 0, 0))
    for box, size in (((-9.0, -9.0, 99.0, 99.0), (SIDE, SIDE)), ((90.0, 90.0, 95.0, 95.0), (1, 1))):
        assert _crop(Image.new("RGB", (SIDE, SIDE)), Detection("cat", 1.0, box)).size == size
