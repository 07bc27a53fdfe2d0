"""`metamorph evaluate answers`: questions of one's own records, and what their answers are compared with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import metamorph
from metamorph import cli
from metamorph.data.media.refs import Box, ImageRef
from metamorph.data.media.stores import FolderStore, load_all
from metamorph.evaluation.benchmarks.result import VOLATILE
from metamorph.evaluation.benchmarks.run import PROMPTS_FILE, run_spec
from metamorph.evaluation.benchmarks.spec import read_spec
from metamorph.evaluation.drawings import encode_images
from metamorph.evaluation.loaders.records import RecordsLoader
from metamorph.evaluation.metrics.answers import SHEET_FILE, Answers
from metamorph.evaluation.metrics.base import Tools
from metamorph.evaluation.samples import Answer
from metamorph.evaluation.tokens import constant_cosine, mean_cosine
from metamorph.inference import Session
from metamorph.inference.answer_files import load_tokens, save_tokens
from metamorph.miniature.world.language import drawing_prompt, questions
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import sample_scene
from metamorph.models.image_inputs import to_pil_image
from metamorph.runs.progress import Progress


@pytest.fixture(scope="module")
def session() -> Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`own.jsonl`: three records of two questions about an image, and four prompts for images."""
    folder, rng, records = tmp_path_factory.mktemp("own"), np.random.default_rng(5), []
    (folder / "images").mkdir()
    for number in range(7):
        scene = sample_scene(rng, reserved=True, background=None if number < 3 else "white")
        render(scene).save(folder / "images" / f"{number}.png")
        if number < 3:
            (_, first, answer), (_, second, other) = questions(scene, rng)[:2]
            talk = turns(f"<image>\n{first}", answer, second, other)
        else:
            talk = turns(drawing_prompt(scene, rng), "<image>")
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": talk})
    (folder / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "mixture.yaml").write_text("- {path: own.jsonl, image_folder: images}\n")
    return folder


def run(session: Session, folder: Path, output: Path, **options: Any) -> dict[str, Any]:
    options = {"data_path": folder / "mixture.yaml", "device": torch.device("cpu"), **options}
    return run_spec(read_spec("answers"), "mini", options.pop("visualizer", None), output, lambda: session, **options)


def test_answers_of_mini(session: Session, folder: Path, tmp_path: Path) -> None:
    result = run(session, folder, tmp_path / "one", visualizer="mini")
    assert result["errors"] == 0
    assert [answer["id"] for answer in result["answers"]] == [
        *(f"own/{number}/{turn}" for number in range(3) for turn in (1, 2)),
        *(f"own/{number}" for number in range(3, 7)),
    ]
    figures = {name: figure["value"] for name, figure in result["summary"].items()}
    counts = {name: figure["n"] for name, figure in result["summary"].items()}
    assert counts["exact_match"] == 10
    assert (counts["no_image_when_none_due"], counts["image_when_due"]) == (6, 4)
    assert figures["exact_match"] >= 0.8  # mini is good at this
    assert figures["image_when_due"] == figures["no_image_when_none_due"] == 1
    assert figures["cosine"] > 0.9 > figures["cosine_baseline"] > figures["cosine_to_others"]
    assert figures["retrieval_at_1"] >= 0.75
    assert abs(figures["cosine_between_drawings"] - figures["cosine_between_targets"]) < 0.1
    assert result["categories"]["answer"].keys() == {"text", "image"}
    with Image.open(tmp_path / "one" / SHEET_FILE) as sheet:
        assert sheet.width == 8 * 130 - 2
    again = run(session, folder, tmp_path / "two", visualizer="mini", batch_size=3)
    assert [{k: v for k, v in each.items() if k not in ("scores", *VOLATILE)} for each in result["answers"]] == [
        {k: v for k, v in each.items() if k not in ("scores", *VOLATILE)} for each in again["answers"]
    ]


def test_later_answers_see_the_true_conversation(session: Session, folder: Path, tmp_path: Path) -> None:
    """The figures are those of `Session.reply` with that conversation."""
    result = run(session, folder, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / PROMPTS_FILE).read_text().splitlines()]
    record = json.loads((folder / "own.jsonl").read_text().splitlines()[0])
    first, answer, second = (turn["value"] for turn in record["conversations"][:3])
    assert lines[0]["prompt"] == first
    assert [message["content"] for message in lines[1]["messages"]] == [first, answer, second]
    image = folder / "images" / "0.png"
    assert lines[1]["images"] == [str(image)]
    parts = [{"type": "image", "path": str(image)}, {"type": "text", "text": first.removeprefix("<image>")}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    assert result["answers"][1]["text"] == session.reply(messages).text


def judge(session: Session, folder: Path, answers: Sequence[tuple[str, Tensor | None]], tmp_path: Path) -> list[Any]:
    samples, made = RecordsLoader().load(folder / "mixture.yaml"), []
    for number, (text, tokens) in enumerate(answers):
        files: tuple[Path, ...] = ()
        if tokens is not None:
            files = (tmp_path / f"{number}.safetensors",)
            save_tokens(tokens, files[0], {})
        made.append(Answer(text, visual_tokens=files))
    tools = Tools(torch.device("cpu"), lambda: session, Progress(total=10), tmp_path)
    return Answers().score(samples, made, tools)


@pytest.fixture(scope="module")
def true(session: Session, folder: Path) -> Tensor:
    """Visual tokens of the true images."""
    images = [to_pil_image(folder / "images" / f"{number}.png") for number in range(3, 7)]
    return encode_images(session.model, session.processor, images)


def test_drawings_that_are_all_the_same_show(session: Session, folder: Path, true: Tensor, tmp_path: Path) -> None:
    """The trap: the constant has a good cosine."""
    constant = torch.nn.functional.normalize(true, dim=-1).mean(dim=0)
    answers = [*[("x", None)] * 6, *[("", constant)] * 4]
    scores = judge(session, folder, answers, tmp_path)[6:]
    mean = {name: sum(each[name] for each in scores) / 4 for name in scores[0]}
    assert mean["cosine"] == pytest.approx(mean["cosine_baseline"], abs=1e-5)
    assert mean["cosine_baseline"] == pytest.approx(constant_cosine(true), abs=1e-5)
    assert mean["cosine_between_drawings"] == pytest.approx(1, abs=1e-5)
    assert mean["cosine_between_targets"] < 0.8
    assert mean["retrieval_at_1"] == 0.25
    assert mean["image_when_due"] == mean["exact_match"] == 1


def test_each_figure(session: Session, folder: Path, true: Tensor, tmp_path: Path) -> None:
    """Perfect; the next one's image; an image with words too many; none. And an image where none is due."""
    samples = RecordsLoader().load(folder / "mixture.yaml")
    texts = [(sample.reference["text"].upper() + ".", None) for sample in samples[:5]]
    images = [("", true[0]), ("", true[2]), ("Here!", true[2]), ("", None)]
    scores = judge(session, folder, [*texts, (samples[5].reference["text"], true[0]), *images], tmp_path)
    assert [each["exact_match"] for each in scores] == [1] * 6 + [1, 1, 0, 1]
    assert [each["no_image_when_none_due"] for each in scores[:6]] == [1] * 5 + [0]
    assert [each["image_when_due"] for each in scores[6:]] == [1, 1, 1, 0]
    assert [each["retrieval_at_1"] for each in scores[6:]] == [1, 0, 1, 0]
    assert scores[6]["cosine"] == pytest.approx(1, abs=1e-5)
    assert scores[7]["cosine"] == pytest.approx(mean_cosine(true[2:3], true[1:2]).item(), abs=1e-5)
    others = mean_cosine(true[:1].expand(3, -1, -1), true[1:]).mean().item()
    assert scores[6]["cosine_to_others"] == scores[6]["cosine_between_targets"] == pytest.approx(others, abs=1e-5)
    assert "cosine" not in scores[9]
    assert not (tmp_path / SHEET_FILE).exists()


def test_parts_of_images_are_compared_with(tmp_path: Path) -> None:
    """The task visual_cot cuts a region out of its image, which the answer then shows."""
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 40).convert("RGB").save(tmp_path / "0.png")
    talk = turns("<image>\nWhat is there?", "A fractal.")
    record = {"image": ["0.png", "0.png###[8, 8, 40, 40]"], "conversations": talk}
    (tmp_path / "regions.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "mixture.yaml").write_text("- {path: regions.jsonl, task: visual_cot, options: {margin: 0}}\n")
    samples = RecordsLoader().load(tmp_path / "mixture.yaml")
    crop = load_all([ImageRef("0.png", crop=Box(8, 8, 40, 40))], FolderStore(tmp_path))[0]
    (target,) = [sample.files["target"] for sample in samples]
    assert target.startswith("data:image/png;base64,")
    assert to_pil_image(target).tobytes() == crop.tobytes()


def test_a_missing_image_is_found_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metamorph.inference.session.open_session", None)
    words = ["--model", "mini", "--output-dir", str(tmp_path / "out")]
    assert cli.main(["evaluate", "answers", "--data_path", str(folder / "own.jsonl"), *words]) == 2
    message = capsys.readouterr().err
    assert "own.jsonl" in message
    assert "is the image folder right?" in message


def test_the_command_and_its_spec(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The image folder of a file as an option of an own spec; its prompt acts."""
    (tmp_path / "own.yaml").write_text(
        f"data: {{loader: records, image_folder: images, path: {folder / 'own.jsonl'}}}\n"
        'prompt: "{question} Answer with one word."\nmetric: {name: answers}\n'
    )
    words = ["--model", "mini", "--limit", "3", "--dtype", "float32", "--device", "cpu"]
    assert cli.main(["evaluate", str(tmp_path / "own.yaml"), *words, "--output-dir", str(tmp_path / "out")]) == 0
    assert "image_when_due" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / PROMPTS_FILE).read_text().splitlines()]
    asked = [line.get("prompt") or line["messages"][-1]["content"] for line in lines]
    assert all(text.endswith(" Answer with one word.") for text in asked)
    assert load_tokens(next((tmp_path / "out" / "answers").glob("*.safetensors"))).dim() == 3
