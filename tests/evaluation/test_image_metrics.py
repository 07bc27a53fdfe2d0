"""CLIP score and Fréchet distances of captions, measures of edits, visual tokens against true ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detector_parts import save_clip, save_siglip
from perceptual_parts import save_networks
from PIL import Image

import metamorph
from metamorph.evaluation.clip import Clip
from metamorph.evaluation.drawings import encode_images
from metamorph.evaluation.loaders.edits import EditsLoader
from metamorph.evaluation.loaders.generation import CaptionsLoader
from metamorph.evaluation.metrics.base import Tools
from metamorph.evaluation.metrics.captions import Captions
from metamorph.evaluation.metrics.edits import Edits
from metamorph.evaluation.metrics.visual_tokens import VisualTokens
from metamorph.evaluation.samples import Answer
from metamorph.inference.answer_files import save_tokens
from metamorph.models.image_files import load_image
from metamorph.runs.progress import Progress


CPU = torch.device("cpu")


def tools(folder: Path, session: metamorph.inference.Session | None = None) -> Tools:
    return Tools(CPU, lambda: session or pytest.fail("no model is needed"), Progress(), folder)


def save_noise(file: Path, seed: int, side: int = 48) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)
    return file


def write_captions(folder: Path, count: int) -> Path:
    lines = []
    for index in range(count):
        save_noise(folder / f"true-{index}.png", index, side=32 + 8 * (index % 2))
        lines.append(json.dumps({"image": f"true-{index}.png", "caption": f"a photo of a {'red cat' * (index + 1)}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder / "captions.jsonl"


@pytest.mark.parametrize("save", [save_clip, save_siglip])
def test_scores_of_captions(save, tmp_path, monkeypatch):
    samples = CaptionsLoader().load(write_captions(tmp_path, 4))
    _, inception = save_networks(tmp_path)
    drawn = [save_noise(tmp_path / f"drawn-{index}.png", 9 + index) for index in range(5)]
    answers = [Answer(images=tuple(drawn[:2])), *(Answer(images=(file,)) for file in drawn[2:4]), Answer()]
    metric = Captions(str(save(tmp_path / "clip")), str(inception))
    metric.check(samples)
    scores = [each["clip_score"] for each in metric.score(samples, answers, tools(tmp_path))]
    clip = Clip(metric.clip, CPU)
    images = F.normalize(clip.images([load_image(file) for file in drawn[:2]]), dim=-1)
    cosines = images @ F.normalize(clip.texts([samples[0].fields["prompt"]]), dim=-1).T
    assert scores[0] == pytest.approx(100 * cosines.clamp(min=0).mean().item(), rel=1e-4)
    assert scores[3] == 0.0
    found = metric.of_set(samples, answers, tools(tmp_path))
    shared = tools(tmp_path)
    metric.score(samples, answers, shared)
    with monkeypatch.context() as patched:  # encoded once
        patched.setattr("metamorph.evaluation.metrics.captions.Clip", None)
        assert metric.of_set(samples, answers, shared) == found
    assert found.keys() == {"clip_fid", "fid"}
    own = [Answer(images=(Path(sample.files["image"]),)) for sample in samples]
    same = metric.of_set(samples, own, tools(tmp_path))
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert same["clip_fid"] < 0.1 * found["clip_fid"]


def test_captions_of_coco(tmp_path):
    (tmp_path / "val2014").mkdir()
    for name in ("7.png", "8.png"):
        save_noise(tmp_path / "val2014" / name, 0)
    content = {
        "images": [{"id": 8, "file_name": "8.png"}, {"id": 7, "file_name": "7.png"}],
        "annotations": [
            {"image_id": 7, "caption": "first"},
            {"image_id": 7, "caption": "second"},
            {"image_id": 8, "caption": "other"},
        ],
    }
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps(content))
    samples = CaptionsLoader(image_folder="val2014").load(file)
    assert [(sample.id, sample.fields["prompt"]) for sample in samples] == [("8", "other"), ("7", "first")]
    with pytest.raises(ValueError, match=r"row 1: there is no file '8.png' in"):
        CaptionsLoader().load(file)
    file.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(ValueError, match=r"has no rows; expected columns: image_id, caption"):
        CaptionsLoader(image_folder="val2014").load(file)
    file.write_text(json.dumps({**content, "annotations": content["annotations"][:1]}))
    with pytest.raises(ValueError, match="row 1: image 8 has no caption"):
        CaptionsLoader(image_folder="val2014").load(file)
    file.write_text(json.dumps({"data": []}))
    with pytest.raises(ValueError, match=r"a list in the key 'annotations' .*with the keys data"):
        CaptionsLoader().load(file)


def write_edits(folder: Path, **more: str) -> Path:
    Image.new("RGB", (40, 40), (100, 100, 100)).save(folder / "before.png")
    target = Image.new("RGB", (40, 40), (100, 100, 100))
    target.paste((200, 100, 100), (0, 0, 20, 40))
    target.save(folder / "target.png")
    mask = Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 20, 40))
    mask.save(folder / "mask.png")
    (folder / "edits.jsonl").write_text(json.dumps({"image": "before.png", "instruction": "paint it", **more}))
    return folder


CAPTIONS = {"caption_before": "a photo of a cat", "caption_after": "a photo of a red dog"}


def test_measures_of_edits(tmp_path):
    folder = write_edits(tmp_path, mask="mask.png", target="target.png", **CAPTIONS)
    samples = EditsLoader().load(folder)
    metric = Edits(str(save_clip(tmp_path / "clip")))
    metric.check(samples)

    def score(file: str | None) -> dict[str, float]:
        answer = Answer(images=(tmp_path / file,)) if file else Answer()
        return metric.score(samples, [answer], tools(tmp_path))[0]

    copy, right = score("before.png"), score("target.png")
    assert copy["clip_image"] == pytest.approx(1, abs=1e-5)
    assert (copy["clip_direction"], copy["kept_l1"]) == (pytest.approx(0, abs=1e-5), 0.0)
    assert copy["target_l1"] == pytest.approx(100 / 255 / 3 / 2, rel=1e-4)  # half of the pixels, one of three channels
    assert (right["kept_l1"], right["target_l1"]) == (0.0, 0.0)
    assert right["target_clip"] == pytest.approx(1, abs=1e-5)
    Image.new("RGB", (20, 20), (151, 100, 100)).save(tmp_path / "small.png")  # sizes differ
    assert score("small.png")["kept_l1"] == pytest.approx(51 / 255 / 3, rel=1e-4)
    clip = Clip(metric.clip, CPU)
    before, after = F.normalize(
        clip.images([load_image(tmp_path / f"{name}.png") for name in ("before", "target")]), dim=-1
    )
    words = F.normalize(clip.texts(list(CAPTIONS.values())), dim=-1)
    expected = F.cosine_similarity(after - before, words[1] - words[0], dim=0).item()
    assert right["clip_direction"] == pytest.approx(expected, abs=1e-4)
    assert score(None) == {"drawn": 0.0, "clip_direction": 0.0}
    Image.new("L", (40, 40), 255).save(tmp_path / "mask.png")  # nothing was to be kept
    assert "kept_l1" not in score("target.png")


def test_edits_need_captions_somewhere(tmp_path):
    samples = EditsLoader().load(write_edits(tmp_path))
    with pytest.raises(ValueError, match="no record has caption_before and caption_after"):
        Edits("clip").check(samples)
    with pytest.raises(ValueError, match=r"there is no file or folder .*clip"):
        EditsLoader().load(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"edits.jsonl, row 1: there is no file 'no.png'"):
        EditsLoader().load(write_edits(tmp_path, mask="no.png"))


def test_paths_may_not_leave_the_folder(tmp_path):
    (tmp_path / "data").mkdir()
    save_noise(tmp_path / "secret.png", 0)
    with pytest.raises(ValueError, match=r"row 1: the path '../secret.png' leaves"):
        EditsLoader().load(write_edits(tmp_path / "data", target="../secret.png"))
    file = tmp_path / "data" / "captions.jsonl"
    file.write_text(json.dumps({"image": "../secret.png", "caption": "x"}))
    with pytest.raises(ValueError, match=r"row 1: the path '../secret.png' leaves"):
        CaptionsLoader().load(file)


def test_visual_tokens_are_compared_with_those_of_all_true_images(tmp_path):
    session = metamorph.load("mini", device="cpu", dtype=torch.float32)
    samples = CaptionsLoader().load(write_captions(tmp_path, 3))
    true = encode_images(session.model, session.processor, [load_image(sample.files["image"]) for sample in samples])
    files = []
    for index, tokens in enumerate((true[0], true[2] + 0.01)):
        files.append(tmp_path / f"{index}.safetensors")
        save_tokens(tokens, files[-1], {})
    answers = [*(Answer(visual_tokens=(file,)) for file in files), Answer()]
    metric, shared = VisualTokens(retrieval_at=(1, 3)), tools(tmp_path, session)
    scores = metric.score(samples, answers, shared)
    assert scores[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert scores[1]["cosine"] == pytest.approx(
        F.cosine_similarity(true[2] + 0.01, true[1], dim=-1).mean().item(), abs=1e-5
    )
    others = [F.cosine_similarity(true[0], true[index], dim=-1).mean().item() for index in (1, 2)]
    assert scores[0]["cosine_to_others"] == pytest.approx(sum(others) / 2, abs=1e-5)
    assert [(each["retrieval_at_1"], each["retrieval_at_3"]) for each in scores] == [(1, 1), (0, 1), (0, 0)]
    baseline = metric.of_set(samples, answers, tools(tmp_path, session))["cosine_baseline"]
    Path(samples[0].files["image"]).unlink()  # true images are encoded once
    assert metric.of_set(samples, answers, shared)["cosine_baseline"] == baseline
    constant = F.normalize(true, dim=-1).sum(dim=0)
    assert baseline == pytest.approx(F.cosine_similarity(constant[None], true, dim=-1).mean().item(), abs=1e-5)
