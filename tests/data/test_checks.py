"""The checks find every fault of a deliberately broken set, and none in a clean one."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processing_parts import build_processor, llava, write_jsonl

from metamorph.data.checks.check import WARNINGS, check_dataset
from metamorph.data.checks.report import make_report, pick_samples, write_reports
from metamorph.data.checks.samples import images_of, split_example, text_of, token_rows
from metamorph.data.dataset import load_data
from metamorph.data.records import BAD_RECORD_KINDS, DataError


LIMIT = 120


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def folder(tmp_path):
    """A folder with a good image and broken ones."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "good.png")
    image.save(tmp_path / "whole.jpg", quality=95)
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-1500])
    (tmp_path / "text.jpg").write_text("<html>404 Not Found</html>")
    (tmp_path / "empty.png").touch()
    return tmp_path


def turns(*pairs: tuple[str, object]) -> list[dict]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


def broken_records() -> dict[str, tuple[object, str, str]]:
    """Id of each broken record, the record (or line), the kind of its fault, and words of the detail."""
    ask = ("<image>", "A cat.")
    return {
        "no-json": ('{"id": "no-json", "conversations": [', "broken_line", "not valid JSON"),
        "list": (["a"], "not_an_object", "must be a JSON object, not list"),
        "bare": ({"id": "bare"}, "no_conversations", 'needs "conversations"'),
        "no-turns": ({"id": "no-turns", "conversations": []}, "no_conversations", 'needs "conversations"'),
        "word": ({"id": "word", "conversations": ["Hi"]}, "bad_turn", "turn 1 must be a JSON object"),
        "number": (
            {"id": "number", "conversations": turns(("human", 3), ("gpt", "Hi"))},
            "bad_turn",
            "must be a string",
        ),
        "robot": (
            {"id": "robot", "conversations": turns(("robot", "Hi"), ("gpt", "Hi"))},
            "unknown_speaker",
            "'robot'; use one of",
        ),
        "path": (llava("path", *ask, image=7), "bad_image_field", "must be a path or a list"),
        "movies": ({**llava("movies", "Hi", "Hi."), "video": ["a.mp4", "b.mp4"]}, "bad_video_field", "at most one"),
        "gpt-first": (
            {"id": "gpt-first", "conversations": turns(("gpt", "Hi"), ("human", "Hi"))},
            "role_order",
            "turn 1 is spoken by the assistant",
        ),
        "twice": (
            {"id": "twice", "conversations": turns(("human", "Hi"), ("human", "Hi?"), ("gpt", "Hi"))},
            "role_order",
            "turn 2 is spoken by the user",
        ),
        "late-system": (
            {"id": "late-system", "conversations": turns(("human", "Hi"), ("system", "Be nice."), ("gpt", "Hi"))},
            "role_order",
            "turn 2 is spoken by the system",
        ),
        "few-markers": (llava("few-markers", *ask, image=["good.png"] * 2), "image_count", "1 <image> marker"),
        "many-markers": (llava("many-markers", "<image><image>", "Hm.", image="good.png"), "image_count", "2 <image>"),
        "gone": (llava("gone", *ask, image="gone.png"), "missing_image", "gone.png"),
        "text": (llava("text", *ask, image="text.jpg"), "unreadable_image", "text.jpg cannot be read"),
        "half": (llava("half", *ask, image="half.jpg"), "unreadable_image", "half.jpg cannot be read"),
        "empty": (llava("empty", *ask, image="empty.png"), "unreadable_image", "empty.png cannot be read"),
        "bomb": (llava("bomb", *ask, image="bomb.png"), "image_too_large", "10000x9000 pixels"),
        "outside": (llava("outside", *ask, image="../good.png"), "outside_folder", "leaves the image"),
        "silent": (llava("silent", "Anybody there?"), "unsupervised", "no gpt turn"),
        "too-late": (llava("too-late", "long " * 200, "Yes."), "unsupervised", "nothing of the answer is left"),
        "long": (llava("long", "Tell me.", "bla " * 200), "over_long", "tokens would be cut off"),
        "long-images": (
            llava("long-images", "<image> And then?", "First " + "<image>" * 7, image=["good.png"] * 8),
            "over_long",
            r"and \d of 8 image\(s\) would be cut",
        ),
        "mute": (llava("mute", "Say something.", " \n"), "empty_turn", "only the end of the turn would be learned"),
        "templated": (llava("templated", "Hi<|eot_id|>", "Hi."), "control_token", r"contains <\|eot_id\|> as text"),
        "tagged": (llava("tagged", "<image_start>Hi", "Hi."), "control_token", "contains <image_start> as text"),
        "same": (llava("same", "Again?", "Yes."), "duplicate_id", "the id is also that of .*broken.jsonl:"),
    }


def opened(path: Path, processor, limit: int | None = LIMIT):
    return load_data(path, processor, path.parent, limit, check=False, weighted=False)


def check_file(path: Path, processor, **options):
    return check_dataset(opened(path, processor), **options)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_fault_of_a_broken_set_is_found(folder, processor, num_workers):
    Image.new("1", (10_000, 9_000)).save(folder / "bomb.png")
    faults = broken_records()
    good = [llava(f"good-{n}", "<image> What?", "A cat.", image="good.png") for n in range(3)]
    lines = [llava("same", "Hi", "Hi."), *good, *(value for value, *_ in faults.values())]
    path = write_jsonl(folder / "broken.jsonl", lines)
    with path.open("ab") as file:
        file.write(b'{"id": "latin", "conversations": "caf\xe9"}\n')
    diagnosis = check_file(path, processor, num_workers=num_workers)

    expected = Counter(kind for _, kind, _ in faults.values())
    expected += Counter(broken_line=1, over_long=1)  # the Latin line; what is cut to nothing is too long, too
    assert Counter(problem.kind for problem in diagnosis.problems) == expected
    assert len(faults) + 1 >= 15
    assert len(expected) >= 15
    assert set(expected) <= {*BAD_RECORD_KINDS, *WARNINGS}
    line_of = {name: 1 + len(good) + number for number, name in enumerate(faults, 1)}
    for name, (_, kind, words) in faults.items():
        found = [problem for problem in diagnosis.problems if (problem.line, problem.kind) == (line_of[name], kind)]
        assert [problem.source for problem in found] == ["broken"], name
        assert re.search(words, found[0].detail), found[0].detail
        assert found[0].id == (None if kind in ("broken_line", "not_an_object") else name)
    assert (len(diagnosis.rows), diagnosis.num_ok) == (len(lines) + 1, 1 + len(good))


def test_faults_of_tasks_are_found(folder, processor):
    """Kinds of fault that only a declared task has; one source for each task."""
    pytest.importorskip("av", reason="videos need the extra 'video'")
    (folder / "text.mp4").write_text("<html>404 Not Found</html>")
    ask = llava(None, "<image> What?", "A cat.")["conversations"]
    sources = {
        "visual_cot": {
            "good": {"image": ["good.png", "good.png###[1, 1, 9, 9]"], "conversations": ask},
            "bad_box": {"image": ["good.png", "good.png###[9, 9, 1, 1]"], "conversations": ask},
        },
        "vstar": {"bad_field": {"image": "good.png", "target_instances": "cup", "conversations": ask}},
        "text_to_image": {
            "good": {"image": "good.png", "caption": "A cat."},
            "bad_field": {"image": "good.png", "caption": 3},
            "missing_image": {"image": "gone.png", "caption": "A cat."},
        },
        "video_qa": {
            "no-video": {"conversations": ask},
            "missing_video": {"video": "gone.mp4", "conversations": ask},
            "unreadable_video": {"video": "text.mp4", "conversations": ask},
        },
    }
    kinds = {"no-video": "missing_video"}
    for task, records in sources.items():
        write_jsonl(folder / f"{task}.jsonl", [{"id": name, **record} for name, record in records.items()])
    mixture = folder / "mixture.yaml"
    mixture.write_text(json.dumps([{"path": f"{task}.jsonl", "task": task} for task in sources]))
    diagnosis = check_file(mixture, processor)
    found = [(problem.source, problem.id, problem.kind) for problem in diagnosis.problems]
    expected = [
        (task, name, kinds.get(name, name)) for task, records in sources.items() for name in records if name != "good"
    ]
    assert found == expected
    assert all(kind in BAD_RECORD_KINDS for *_, kind in found)


BOXES = {
    "shares as pixels": ("visual_cot", [0.2, 0.1, 0.8, 0.9], {}, "box_units", "set box_units: relative"),
    "pixels as shares": (
        "visual_cot",
        [20, 10, 40, 30],
        {"box_units": "relative"},
        "box_units",
        "set box_units: pixels",
    ),
    "xyxy as xywh": ("vstar", [20, 10, 50, 35], {}, "box_format", "set box_format: xyxy"),
    "xywh as xyxy": ("visual_cot", [20, 10, 15, 8], {}, "bad_box", "set box_format: xywh"),
    "partly outside": ("visual_cot", [20, 10, 90, 30], {}, "box_outside", "is clipped"),
    "a share too large": (
        "visual_cot",
        [0.2, 0.1, 1.2, 0.9],
        {"box_units": "relative"},
        "box_outside",
        "is clipped",
    ),
    "outside": ("visual_cot", [70, 50, 90, 60], {}, "bad_box", "lies outside the image of 60x40 pixels"),
    "negative size": ("vstar", [20, 10, -5, 8], {}, "bad_box", "width and height above 0"),
    "negative place": ("vstar", [-20, 10, 35, 8], {}, "box_outside", "is clipped"),
    "right": ("visual_cot", [20, 10, 40, 30], {}, None, ""),
    "right as shares": ("visual_cot", [0.2, 0.1, 0.8, 0.9], {"box_units": "relative"}, None, ""),
    "right with a margin beyond": ("visual_cot", [2, 1, 58, 39], {"margin": 0.5}, None, ""),
    "right by a hair": ("vstar", [20, 10, 40.4, 30.9], {}, None, ""),
    "right as width and height": ("visual_cot", [20, 10, 15, 8], {"box_format": "xywh"}, None, ""),
}


@pytest.mark.parametrize("case", BOXES)
def test_boxes_of_another_unit_or_form_are_found_with_the_fix(case, folder, processor):
    task, box, options, kind, words = BOXES[case]
    ask = llava(None, "<image> What?", "A cat.")["conversations"]
    media = {
        "visual_cot": {"image": ["good.png", f"good.png###{box}"]},
        "vstar": {"image": "good.png", "target_instances": [{"name": "cat", "bbox": box}]},
    }
    write_jsonl(folder / "data.jsonl", [{"id": "r", "conversations": ask, **media[task]}])
    (folder / "mixture.yaml").write_text(json.dumps([{"path": "data.jsonl", "task": task, "options": options}]))
    diagnosis = check_file(folder / "mixture.yaml", processor, num_workers=0)
    assert [(problem.kind, words in problem.detail) for problem in diagnosis.problems] == (
        [(kind, True)] if kind else []
    )
    if kind in ("box_units", "bad_box") and case != "outside":  # seen when training starts, before an image is opened
        with pytest.raises(DataError, match=words):
            load_data(folder / "mixture.yaml", processor)


def test_areas_of_boxes_are_in_the_report(folder, processor):
    boxes = [[0, 0, 60, 40], [0, 0, 30, 20], [0, 0, 30, 20], [0, 0, 3, 2], [0, 0, 1, 2]]
    instances = [{"name": "cat", "bbox": box} for box in boxes]
    ask = llava(None, "What?", "A cat.")["conversations"]
    write_jsonl(folder / "data.jsonl", [{"image": "good.png", "target_instances": instances, "conversations": ask}])
    (folder / "mixture.yaml").write_text(json.dumps([{"path": "data.jsonl", "task": "vstar"}]))
    diagnosis = check_file(folder / "mixture.yaml", processor)
    assert diagnosis.box_shares.tolist() == pytest.approx([1, 0.25, 0.25, 1 / 400, 1 / 1200])
    paths = write_reports(folder / "report", diagnosis, [], processor)
    areas = json.loads(paths[0].read_text())["statistics"]["box_shares"]
    assert (areas["boxes"], areas["median"]) == (5, 25)
    assert dict(zip(areas["at_least"], areas["count"], strict=True)) == {
        **dict.fromkeys((0, 0.01, 1, 5, 50), 0),
        0.1: 1,
        0.01: 1,
        20: 2,
        99: 1,
    }
    assert "Area of a box, in per cent of its image" in paths[1].read_text()
    write_jsonl(folder / "plain.jsonl", [llava("x", "Hi", "Hi.")])
    assert make_report(check_file(folder / "plain.jsonl", processor))["statistics"]["box_shares"] is None


def test_a_source_without_any_of_its_files_is_unusable(folder, processor):
    sources = {"good": "good.png", "moved": "elsewhere/good.png"}
    for name, image in sources.items():
        write_jsonl(folder / f"{name}.jsonl", [llava(number, "<image>", "A cat.", image=image) for number in range(3)])
    mixture = folder / "mixture.yaml"
    mixture.write_text(json.dumps([{"path": f"{name}.jsonl"} for name in sources]))
    with pytest.raises(DataError, match=r"none of the 3 records of moved .* has its files, so --image-folder is wrong"):
        check_file(mixture, processor)


def test_truncated_examples_are_measured_in_full(folder, processor):
    """Wherever an example is truncated, in a text or before an image, its original length is reported."""
    answer = "First <image> then <image> and last <image>."
    path = write_jsonl(folder / "data.jsonl", [llava("x", "Hi", answer, image=["good.png"] * 3)])
    tokens, images, answers, _ = opened(path, processor, None).datasets[0].measure(0)
    for limit in range(30, tokens + 2):
        (row,) = check_dataset(opened(path, processor, limit)).rows
        assert (row["tokens"], row["images"], row["answer_images"]) == (tokens, images, answers)
        assert row["problems"] == (limit < tokens)


def test_report_has_the_promised_form(folder, processor):
    records = [llava("a", "<image>", "Hi.", image="good.png"), llava("b", "Hi"), llava(None, "Hi", "<image>")]
    path = write_jsonl(folder / "data.jsonl", records)
    diagnosis = check_file(path, processor)
    report = json.loads(write_reports(folder / "report", diagnosis, [], processor)[0].read_text())
    assert report == make_report(diagnosis)
    assert set(report) == {"records", "ok", "problems", "by_kind", "statistics"}
    assert (report["records"], report["ok"]) == (3, 1)
    assert report["by_kind"] == {"unsupervised": 1, "image_count": 1}
    assert report["problems"][0] == {
        "kind": "unsupervised",
        "source": "data",
        "line": 2,
        "id": "b",
        "detail": "the record has no gpt turn, so there is nothing to learn; add an answer or remove the record",
    }
    assert report["problems"][1]["id"] is None
    assert report["problems"][1]["line"] == 3


def test_half_a_character_breaks_no_report(folder, processor):
    """JSON can spell it; neither a tokenizer nor a file takes it."""
    odd = llava("id \ud83d", "Hi", "Hi.")
    path = write_jsonl(folder / "data.jsonl", [odd, odd, llava("b", "Hi \ude00", "Hi."), llava("c", "Hi", "Hi.")])
    diagnosis = check_file(path, processor)
    assert diagnosis.by_kind() == {"duplicate_id": 1, "broken_line": 1}
    paths = write_reports(folder / "report", diagnosis, pick_samples(opened(path, processor), diagnosis, 4), processor)
    assert json.loads(paths[0].read_text())["problems"][0]["id"] == r"id \ud83d"
    assert r"id \ud83d" in paths[1].read_text()


def test_statistics_are_those_of_the_examples(folder, processor):
    records = [
        llava("text", "Hi", "Hello."),
        llava("read", "<image> What?", "A cat.", image="good.png"),
        llava("draw", "Draw it.", "<image><image>", image=["good.png"] * 2),
        llava("long", "Hi", "bla " * 200),
    ]
    path = write_jsonl(folder / "data.jsonl", records)
    data = opened(path, processor)
    statistics = make_report(check_dataset(data))["statistics"]
    examples = [data[index] for index in range(4)]
    whole = opened(path, processor, None)
    lengths = [len(whole[index]["input_ids"]) for index in range(4)]
    assert statistics["tokens"]["total"] == sum(lengths)
    assert statistics["tokens"]["max"] == lengths[3] > LIMIT
    learned = sum(int((example["labels"] != -100).sum()) for example in examples)
    assert statistics["text_targets"]["total"] == learned
    assert (statistics["images"]["total"], statistics["answer_images"]["total"]) == (3, 2)
    assert statistics["sources"]["data"]["records"] == 4
    kept = sum(len(example["input_ids"]) for example in examples)
    packing = statistics["packing"]
    assert packing["efficiency"] == pytest.approx(kept / (packing["rows"] * LIMIT), abs=1e-4)
    assert packing["unpacked_efficiency"] == pytest.approx(kept / (4 * LIMIT), abs=1e-4)


def test_a_clean_set_has_no_problem(folder, processor):
    records = [llava(number, "<image> What?", "A cat.", image="good.png") for number in range(5)]
    records += [llava(None, "Hi", "Hi."), llava(None, "Hi", "Hi.")]  # records without id are no duplicates
    diagnosis = check_file(write_jsonl(folder / "data.jsonl", records), processor)
    assert (diagnosis.problems, diagnosis.num_ok) == ([], 7)


def test_a_limit_spreads_over_the_file(folder, processor):
    path = write_jsonl(folder / "data.jsonl", [llava(number, "Hi", "Hi.") for number in range(100)])
    diagnosis = check_file(path, processor, limit=5)
    assert diagnosis.rows["index"].tolist() == [0, 24, 49, 74, 99]
    assert make_report(diagnosis)["statistics"]["total_records"] == 100
    with pytest.raises(ValueError, match="--limit 0 must be at least 1"):
        check_file(path, processor, limit=0)


def test_page_shows_problems_samples_and_masks(folder, processor):
    records = [
        llava("<b>read", "<image> What <i>is</i> it?", "A cat.", image="good.png"),
        llava("draw", "Draw it.", "Here: <image>", image="good.png"),
        *[llava("same", "Hi", "Hi.")] * 30,
    ]
    path = write_jsonl(folder / "data.jsonl", records)
    data = opened(path, processor)
    diagnosis = check_dataset(data)
    samples = pick_samples(data, diagnosis, 3)
    page = write_reports(folder / "report", diagnosis, samples, processor)[1].read_text()
    assert "<b>read" not in page
    assert "&lt;b&gt;read" in page
    assert "<b>duplicate_id</b> × 29" in page
    assert "9 more are in" in page
    assert re.search(r'<span class="learned">A cat\.(&lt;\|eot_id\|&gt;)?</span>', page)
    assert page.count('<figure class="image">') == page.count('<figure class="answer_image">') == 1
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert "http" not in page  # nothing is loaded from a network


def test_pieces_cover_the_example_and_agree_with_its_masks(folder, processor):
    record = llava("x", "<image><image> Which?", "This: <image> or that.", image=["good.png"] * 3)
    data = opened(write_jsonl(folder / "data.jsonl", [record]), processor, None)
    example = data[0]
    pieces = split_example(example, processor)
    assert [token for piece in pieces for token in piece.ids] == example["input_ids"].tolist()
    for piece in pieces:
        span = slice(piece.start, piece.start + len(piece.ids))
        mask = example["visual_target_mask"][span] if piece.image is not None else example["labels"][span] != -100
        assert mask.tolist() == [piece.is_learned] * len(piece.ids)
    assert [piece.kind for piece in pieces if piece.image is not None] == ["image", "image", "answer_image"]
    assert "".join(text_of(piece.ids, processor) for piece in pieces if piece.kind == "learned").startswith("This:")
    rows = list(token_rows(pieces, processor))
    assert sum(loss == "text" for *_, loss in rows) == int((example["labels"] != -100).sum())
    assert [row[2:] for row in rows if row[3] == "visual target"] == [("image 2: 16 visual tokens", "visual target")]


def test_images_are_those_the_tower_sees(folder, processor):
    path = write_jsonl(folder / "data.jsonl", [llava("x", "<image>", "A cat.", image="good.png")])
    (image,) = images_of(opened(path, processor, None)[0], processor.image_processor)
    expected = Image.open(folder / "good.png").resize((112, 112), resample=processor.image_processor.resample)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
