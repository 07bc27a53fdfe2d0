"""Lengths measured by tokenization are those of the examples, and are saved until something changes."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processing_parts import DATE_JINJA, build_processor, chat, golden_image, llava, tokenizer_with, write_jsonl

from metamorph.data.batching import lengths as lengths_module
from metamorph.data.batching.lengths import measure
from metamorph.data.dataset import ConversationDataset
from metamorph.models.sequence.constants import IGNORE_INDEX
from metamorph.training.arguments import MetaMorphTrainingArguments
from metamorph.training.build import measuring_workers


def records(count: int = 6) -> list[dict]:
    kinds = [
        llava(None, "<image>\nWhat is this?", "A cat.", image="a.png"),
        llava(None, "Draw a cat.", "Here: <image>", image="a.png"),
        llava(None, "<image> Make it red.", "<image>", image=["a.png", "a.png"]),
        llava(None, "What is 2 + 2?", "4.", "And 3 + 3?", "6."),
    ]
    return [{**kinds[index % 4], "id": f"r{index}"} for index in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def dataset_of(folder: Path, count: int = 6, **processor) -> ConversationDataset:
    return ConversationDataset(write_jsonl(folder / "data.jsonl", records(count)), build_processor(**processor))


def test_measured_is_encoded(folder: Path) -> None:
    dataset = dataset_of(folder)
    lengths = measure(dataset)
    for index in range(len(dataset)):
        example = dataset[index]
        assert lengths.tokens[index] == len(example["input_ids"])
        assert lengths.images[index] == len(example.get("pixel_values", ()))
        assert lengths.answer_images[index] == example["visual_target_mask"].sum() // 16
        assert lengths.text_targets[index] == (example["labels"] != IGNORE_INDEX).sum()
    assert all(values.dtype == np.int32 for values in vars(lengths).values())


def test_the_processor_measures_every_template() -> None:
    messages = chat("<image> Make it red.", "Here: <image> Done.", system="Be kind.")
    for version in ("llama3", "llama3_original", "chatml", "plain", "auto"):
        processor = build_processor(tokenizer_with("qwen"), version=version)
        encoded = processor.encode_conversation(messages, [golden_image("src"), golden_image("dst")])
        text_targets = int((encoded.labels != IGNORE_INDEX).sum())
        assert processor.measure_conversation(messages) == (len(encoded.input_ids), 2, 1, text_targets)


def test_no_image_is_opened(folder: Path) -> None:
    dataset = dataset_of(folder)
    expected = measure(dataset)
    (folder / "a.png").unlink()
    assert np.array_equal(measure(dataset).tokens, expected.tokens)


def test_a_bad_record_counts_as_nothing(folder: Path) -> None:
    lines = [*records(2), llava("bad", "<image> No picture.", "None.")]
    path = write_jsonl(folder / "data.jsonl", lines)
    dataset = ConversationDataset(path, build_processor(), on_bad_record="skip", max_bad_fraction=1)
    assert (measure(dataset).tokens > 0).tolist() == [True, True, False]


def test_workers_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "_CHUNK", 4)
    monkeypatch.setattr(lengths_module, "_WORTH_WORKERS", 1)
    dataset = dataset_of(folder, count=19)
    alone, shared = measure(dataset), measure(dataset, num_workers=2)
    assert len(shared) == 19
    for name in ("tokens", "images", "answer_images", "text_targets"):
        assert np.array_equal(getattr(alone, name), getattr(shared, name))


def test_lengths_are_kept_until_something_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "_WORTH_KEEPING", 1)
    cache = folder / "cache"
    first = measure(dataset_of(folder), cache_dir=cache)
    (kept,) = cache.iterdir()
    stamp = kept.stat().st_mtime_ns
    again = measure(ConversationDataset(folder / "data.jsonl", build_processor()), cache_dir=cache)
    assert np.array_equal(first.tokens, again.tokens)
    assert isinstance(again.tokens.base, np.memmap)  # shared by the ranks of a machine
    assert kept.stat().st_mtime_ns == stamp

    def number(**processor) -> int:
        dataset = ConversationDataset(folder / "data.jsonl", build_processor(**processor))
        measure(dataset, cache_dir=cache)
        return len(list(cache.iterdir()))

    assert number(num_image_tokens=4) == 2
    assert number(version="plain") == 3
    assert number(tokenizer=tokenizer_with("qwen")) == 4
    write_jsonl(folder / "data.jsonl", records(7))
    assert number() == 5
    for count, day in ((6, "1 May"), (7, "12 May")):  # a template with a date is one with the date of its day
        template = DATE_JINJA.replace("strftime_now('%d %B %Y')", repr(day))
        assert number(tokenizer=tokenizer_with(template), version="auto") == count


def test_what_could_not_be_measured_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video that is copied later would else count as nothing, and overfill its row."""
    av = pytest.importorskip("av", reason="videos need the extra 'video'")
    monkeypatch.setattr(lengths_module, "_WORTH_KEEPING", 1)
    path = write_jsonl(folder / "data.jsonl", [{"id": "clip", "video": "clip.mp4"}])

    def measured() -> list[int]:
        data = ConversationDataset(path, build_processor(), task="frame_prediction", check=False)
        return measure(data, cache_dir=folder / "cache").tokens.tolist()

    assert measured() == [0]
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (16, 16)))))
        container.mux(stream.encode())
    (now,) = measured()
    assert now > 16
    (folder / "clip.mp4").unlink()
    assert measured() == [now]  # kept


@pytest.mark.parametrize("kept_bytes", [0, 20, 135])
def test_a_broken_cache_is_made_again(
    kept_bytes: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lengths_module, "_WORTH_KEEPING", 1)
    cache = folder / "cache"
    dataset = dataset_of(folder)
    expected = measure(dataset, cache_dir=cache)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:kept_bytes])
    assert np.array_equal(measure(dataset, cache_dir=cache).tokens, expected.tokens)
    assert "measuring lengths again" in caplog.text
    assert np.array_equal(measure(dataset, cache_dir=cache).tokens, expected.tokens)


def test_lengths_are_measured_in_parallel_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def workers(**flags: object) -> int:
        return measuring_workers(
            MetaMorphTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, **flags)
        )

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12), raising=False)
    assert workers() == 12
    assert workers(dataloader_num_workers=3) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers(dataloader_num_workers=3) == 12


def test_few_lengths_are_not_kept(folder: Path) -> None:
    measure(dataset_of(folder), cache_dir=folder / "cache")
    assert not (folder / "cache").exists()
