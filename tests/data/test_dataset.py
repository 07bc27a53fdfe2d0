"""Examples and batches: one index is one record, and pixels follow their placeholders."""

import logging

import pytest
import torch
from PIL import Image
from processing_parts import GOLDEN, build_processor, golden_image, llava, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from metamorph.data.bad_records import RecordCounts, TooManyBadRecordsError
from metamorph.data.batching.collation import PaddedCollator
from metamorph.data.dataset import ConversationDataset
from metamorph.data.records import DataError, RecordError, UnsupervisedRecordError


IMAGES = GOLDEN / "images"
VQA = llava("vqa", "<image>\nWhat is shown?", "A red square.", image="vqa.png")
DRAW = llava("draw", "Draw a cat.", "Here: <image>", image="gen.png")
EDIT = llava("edit", "<image> Make it rain.", "<image>", image=["src.png", "dst.png"])
TEXT = llava("text", "Hi", "Hello.")


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def build(tmp_path, processor):
    """Makes a data set of records; the images are the golden ones."""

    def build(*records, image_folder=IMAGES, **options):
        return ConversationDataset(write_jsonl(tmp_path / "data.jsonl", records), processor, image_folder, **options)

    return build


@pytest.fixture
def collate(processor):
    return PaddedCollator(processor.pad_token_id)


def test_examples_are_the_records_in_their_order(build, processor):
    dataset = build(VQA, DRAW, EDIT, TEXT)
    assert [dataset[index]["id"] for index in range(len(dataset))] == ["vqa", "draw", "edit", "text"]
    example = dataset[2]
    messages = [turn.as_message() for turn in dataset.record(2).turns]
    expected = processor.encode_conversation(messages, [golden_image("src"), golden_image("dst")])
    for name in ("input_ids", "labels", "visual_target_mask", "pixel_values"):
        assert torch.equal(example[name], getattr(expected, name))
    assert "pixel_values" not in dataset[3]


def test_the_image_folder_is_the_files_own_by_default(tmp_path, processor):
    golden_image("vqa").save(tmp_path / "vqa.png")
    dataset = ConversationDataset(write_jsonl(tmp_path / "data.jsonl", [VQA]), processor)
    assert dataset[0]["pixel_values"].shape == (1, 3, 112, 112)


def test_batches_are_padded_on_the_right_by_length(build, collate):
    dataset = build(VQA, DRAW, EDIT, TEXT)
    examples = [dataset[index] for index in range(4)]
    batch = collate(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["input_ids"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, example in enumerate(examples):
        count = lengths[row]
        for name, fill in (("input_ids", collate.pad_token_id), ("labels", -100), ("visual_target_mask", False)):
            assert torch.equal(batch[name][row, :count], example[name])
            assert (batch[name][row, count:] == fill).all()
    expected = torch.cat([example["pixel_values"] for example in examples if "pixel_values" in example])
    assert torch.equal(batch["pixel_values"], expected)


def test_r04_later_samples_keep_their_own_images(build, collate, processor):
    """The first record is cut before its second image; the original gave that image to the second record."""
    long = llava("long", "<image> and then " + "what " * 40 + "<image>", "A cat.", image=["src.png", "dst.png"])
    limit = 60
    whole = build(VQA)[0]["pixel_values"]
    dataset = build(
        llava("long", "<image> Hi", "A cat. " * 3 + "<image>", image=["src.png", "dst.png"]),
        VQA,
        model_max_length=limit,
    )
    batch = collate([dataset[0], dataset[1]])
    assert len(batch["pixel_values"]) == 2
    assert torch.equal(batch["pixel_values"][1:], whole)
    assert (batch["input_ids"] == processor.image_tokens.image).sum(1).tolist() == [16, 16]
    assert dataset.statistics() == {"records": 2, "bad": {}, "truncated": 1, "dropped_images": 1}
    with pytest.raises(UnsupervisedRecordError, match="within --model_max_length 60; raise it"):
        build(long, model_max_length=limit)[0]


def test_a_cut_is_logged_once_with_its_id(build, caplog):
    dataset = build(VQA, {**VQA, "id": "again"}, model_max_length=50)
    with caplog.at_level(logging.WARNING, logger="metamorph.data.examples"):
        for index in (0, 1, 0):
            dataset[index]
    assert [record.getMessage() for record in caplog.records if "was truncated" in record.getMessage()] == [
        f"{dataset.source.path}:1 (id 'vqa') was truncated to --model_max_length 50; 0 image(s) dropped. "
        "Further ones are only counted."
    ]
    assert dataset.statistics()["truncated"] == 2


def test_a_record_without_an_answer_is_rejected_with_its_id(build):
    with pytest.raises(UnsupervisedRecordError, match=r"data.jsonl:1 \(id 'question'\): .*nothing to learn"):
        build(llava("question", "Hi"))[0]


def test_r11_a_bad_record_is_never_replaced_by_its_neighbour(build, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    good = llava("good", "<image>", "Yes.", image="good.png")
    bad = llava("bad", "<image>", "Yes.", image="broken.png")
    dataset = build(good, bad, good, image_folder=tmp_path)
    with pytest.raises(RecordError, match=r"data.jsonl:2 \(id 'bad'\): .*broken.png cannot be read as an image"):
        dataset[1]
    dataset = build(good, bad, good, image_folder=tmp_path, on_bad_record="skip", max_bad_fraction=0.5)
    for _ in range(2):  # a second epoch counts nothing twice
        assert dataset[1] == {"id": "bad", "source": "data", "skipped": "unreadable_image"}
    assert dataset.statistics()["bad"] == {"unreadable_image": 1}
    batch = PaddedCollator(0)([dataset[0], dataset[1], dataset[2]])
    assert [row.tolist() for row in batch["input_ids"]] == [dataset[0]["input_ids"].tolist()] * 2


def test_r11_too_many_bad_records_stop_the_run(build):
    records = [TEXT] * 98 + [llava("silent", "Hi")] * 2
    dataset = build(*records, on_bad_record="skip")
    assert dataset[98]["skipped"] == "unsupervised"
    with pytest.raises(TooManyBadRecordsError, match=r"2 of 100 .* --max_bad_fraction 0.01 .*'unsupervised': 2"):
        dataset[99]


def test_r11_skipped_records_are_logged_with_id_and_counted_over_workers(build, collate, caplog):
    silent = llava("silent", "Hi")
    dataset = build(TEXT, silent, TEXT, silent, on_bad_record="skip", max_bad_fraction=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # two epochs
            assert dataset[1]["skipped"] == "unsupervised"
    assert caplog.text.count("id 'silent'") == 1
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=2)
    text = dataset[0]["input_ids"].tolist()
    assert [batch["input_ids"].tolist() for batch in loader] == [[text], [text]]
    assert dataset.statistics()["bad"] == {"unsupervised": 2}
    assert dataset.counts.num_bad == 2  # the first was met here and in a worker


def test_a_batch_of_skipped_records_has_nothing_to_learn(build, collate):
    dataset = build(llava("silent", "Hi"), on_bad_record="skip", max_bad_fraction=1)
    batch = collate([dataset[0]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 1)
    assert (batch["labels"] == -100).all()
    assert not batch["visual_target_mask"].any()


@pytest.mark.parametrize("on_bad_record", ["raise", "skip"])
def test_r11_r12_a_wrong_image_folder_is_an_error_at_once(build, tmp_path, on_bad_record):
    with pytest.raises(DataError, match=rf"none of the 4 image.*--image_folder {tmp_path} is wrong.*vqa.png"):
        build(VQA, DRAW, EDIT, image_folder=tmp_path, on_bad_record=on_bad_record, max_bad_fraction=1)
    with pytest.raises(DataError, match=r"--image_folder .*nowhere is not a folder"):
        build(VQA, image_folder=tmp_path / "nowhere")


def test_missing_files_and_bad_fields_are_listed_before_training(build):
    records = [VQA, llava("gone", "<image>", "Yes.", image="gone.png"), '{"id": 3', {"id": "empty"}, TEXT]
    with pytest.raises(
        DataError, match=r"has 3 bad record\(s\), and 1 of 2 media file\(s\) are missing; .*--on_bad_record skip"
    ) as error:
        build(*records)
    message = str(error.value)
    assert "data.jsonl:2 (id 'gone'): there is no image file" in message
    assert "data.jsonl:3: the text is not valid JSON" in message
    assert "data.jsonl:4 (id 'empty'): the record needs \"conversations\"" in message
    dataset = build(*records, on_bad_record="skip", max_bad_fraction=0.6)
    assert dataset.statistics()["bad"] == {"broken_line": 1, "no_conversations": 1, "missing_image": 1}


def test_missing_files_are_found_however_late_they_come(build):
    gone = [llava(f"gone{number}", "<image>", "Yes.", image=f"gone{number}.png") for number in range(12)]
    with pytest.raises(DataError, match=r"has 12 bad .* and 12 of 13 media file\(s\) are missing") as error:
        build(VQA, *[TEXT] * 1100, *gone)
    assert "data.jsonl:1102 (id 'gone0'): there is no image file" in str(error.value)
    assert "gone9.png" in str(error.value)
    assert str(error.value).endswith("and 2 more")


def test_reading_stops_after_a_thousand_missing_files(build):
    gone = llava("gone", "<image>", "Yes.", image="gone.png")
    with pytest.raises(DataError, match=r"none of the 1000 image\(s\) or video\(s\) that were looked for is there"):
        build(*[gone] * 1001)


def test_files_that_vanish_later_are_errors_of_their_record(build, tmp_path):
    golden_image("vqa").save(tmp_path / "vqa.png")
    dataset = build(VQA, image_folder=tmp_path)
    (tmp_path / "vqa.png").unlink()
    with pytest.raises(RecordError, match=r"data.jsonl:1 \(id 'vqa'\): there is no image file"):
        dataset[0]


def test_totals_of_the_log_are_read_without_a_look_at_every_record():
    log = RecordCounts(100_000)
    for index in (7, 7, 99_999):
        log.note_bad(index, "missing_image")
        log.note_truncated(index, 1)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.largest = max(self.largest, *(arg.numel() for arg in args if isinstance(arg, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    with Sizes() as sizes:
        assert (log.num_bad, log.num_truncated) == (2, 2)
    assert 0 < sizes.largest < 1000


def test_a_path_that_leaves_the_folder_is_refused(build):
    with pytest.raises(DataError, match=r"'\.\./vqa.png' leaves the image folder"):
        build(VQA, llava("x", "<image>", "Yes.", image="../vqa.png"))


def test_r18_the_pad_token_is_no_padding_inside_samples(tmp_path):
    """The original's mask came from ids: the end of turn vanished when it was the pad token, too."""
    processor = build_processor()
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    dataset = ConversationDataset(write_jsonl(tmp_path / "data.jsonl", [TEXT, VQA]), processor, IMAGES)
    batch = PaddedCollator(processor.pad_token_id)([dataset[0], dataset[1]])
    is_pad_id = batch["input_ids"] == processor.pad_token_id
    assert batch["attention_mask"][0].sum() == len(dataset[0]["input_ids"])
    assert (is_pad_id & batch["attention_mask"].bool()).sum() == 4  # two turns in each of two samples
    assert (batch["labels"] == processor.pad_token_id).sum() == 2


def test_r19_a_hundred_images_in_one_sample(build, processor):
    """The original dropped samples with more than 70 images without a word."""
    record = llava("many", "<image>" * 50, "<image>" * 50, image=["vqa.png", "gen.png"] * 50)
    example = build(record)[0]
    assert example["pixel_values"].shape[0] == 100
    assert example["visual_target_mask"].sum() == 50 * processor.num_image_tokens
    dataset = build(record, model_max_length=1000)
    cut = dataset[0]
    assert (
        len(cut["pixel_values"]) * processor.num_image_tokens
        == (cut["input_ids"] == processor.image_tokens.image).sum()
    )
    assert dataset.statistics()["dropped_images"] == 100 - len(cut["pixel_values"])


def test_r20_text_only_samples_bring_no_pixels(build, collate):
    dataset = build(TEXT, VQA, TEXT)
    assert "pixel_values" not in collate([dataset[0], dataset[2]])
    assert len(collate([dataset[0], dataset[1], dataset[2]])["pixel_values"]) == 1


def test_r22_images_at_the_start_of_a_turn_without_start_and_end_tokens(tmp_path):
    processor = build_processor(mm_use_im_start_end=False)
    record = llava("x", "<image><image>", "<image>", image=["src.png", "dst.png", "vqa.png"])
    dataset = ConversationDataset(write_jsonl(tmp_path / "data.jsonl", [record]), processor, IMAGES)
    assert dataset[0]["visual_target_mask"].sum() == 16
    assert len(dataset[0]["pixel_values"]) == 3


def test_errors_of_workers_keep_their_words(build, collate):
    dataset = build(TEXT, llava("silent", "Hi"))
    loader = DataLoader(dataset, batch_size=1, collate_fn=collate, num_workers=1)
    with pytest.raises(RecordError, match="id 'silent'"):
        list(loader)


def test_bad_settings_name_their_flag(build):
    with pytest.raises(ValueError, match="--on_bad_record 'replace' is unknown; use one of raise, skip"):
        build(TEXT, on_bad_record="replace")
    with pytest.raises(ValueError, match="--max_bad_fraction must be between 0 and 1, not 5"):
        build(TEXT, max_bad_fraction=5)
