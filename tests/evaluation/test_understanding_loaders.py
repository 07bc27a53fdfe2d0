"""Loaders and specs of understanding benchmarks, on small files with the layouts that their owners publish."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from understanding_parts import (
    LAYOUTS,
    hub_image,
    mmbench_rows,
    mmmu_rows,
    png,
    text_png,
    write,
    write_lines,
    write_parquet,
    write_separated,
)

from metamorph.evaluation.benchmarks.spec import Spec, read_spec
from metamorph.evaluation.loaders.chartqa import ChartQALoader
from metamorph.evaluation.loaders.mmbench import MMBenchLoader
from metamorph.evaluation.loaders.mmmu import MMMULoader
from metamorph.evaluation.loaders.table import TableLoader
from metamorph.evaluation.loaders.textvqa import TextVQALoader
from metamorph.evaluation.samples import Sample
from metamorph.models.image_inputs import to_pil_image


LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
COLOURS = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}


def colours(sample: Sample) -> list[str]:
    """The colours of a sample's images, which are opened as in a run."""
    assert all(image.startswith("data:") or Path(image).is_absolute() for image in sample.images)
    return [COLOURS[to_pil_image(image).getpixel((0, 0))] for image in sample.images]


def load(name: str, folder: Path) -> tuple[Spec, list[Sample]]:
    """The shipped spec of that name, and its samples in files of its layout; its metric accepts them."""
    spec = read_spec(name)
    samples = list(spec.load(LAYOUTS[name](folder)))
    spec.metric.check(samples)
    return spec, samples


def test_mmbench_asks_each_question_with_its_rotations(tmp_path):
    spec, samples = load("mmbench", tmp_path)
    assert [sample.id for sample in samples] == ["241", "1000241", "252", "1000252", "2000252"]
    assert [sample.reference["group"] for sample in samples] == ["241", "241", "252", "252", "252"]
    assert spec.prompt_of(samples[0]) == f"What is it?\nA. circle\nB. square\n{LETTER}"
    assert spec.prompt_of(samples[3]) == f"Look.\nWhich colour?\nA. green\nB. blue\nC. red\n{LETTER}"
    assert {sample.reference["options"][sample.reference["answer"]] for sample in samples[2:]} == {"blue"}
    assert [colours(sample) for sample in samples] == [["red"]] * 2 + [["blue"]] * 3
    assert samples[2].categories == {"category": "color", "l2-category": "fine"}


def test_mmbench_makes_the_rotations_that_a_file_lacks(tmp_path):
    given = MMBenchLoader().load(LAYOUTS["mmbench"](tmp_path / "with"))
    plain = write_separated(tmp_path / "without.tsv", mmbench_rows()[:2], "\t")
    made = MMBenchLoader().load(plain)
    assert [sample.id for sample in made] == ["241", "241+1", "252", "252+1", "252+2"]
    assert [(sample.fields, sample.reference) for sample in made] == [(s.fields, s.reference) for s in given]
    assert [sample.id for sample in MMBenchLoader(circular=False).load(plain)] == ["241", "252"]
    assert [sample.id for sample in MMBenchLoader(circular=False).load(tmp_path / "with/mmbench_dev.tsv")] == [
        "241",
        "252",
    ]


def test_mmvp_has_pairs(tmp_path):
    spec, samples = load("mmvp", tmp_path)
    assert spec.prompt_of(samples[0]) == f"Open or closed?\nA. Open\nB. Closed\n{LETTER}"
    options = {"A": "Open", "B": "Closed"}
    assert [sample.reference for sample in samples] == [
        {"answer": letter, "options": options, "group": "1"} for letter in "AB"
    ]
    assert [colours(sample) for sample in samples] == [["red"], ["blue"]]


def test_mmmu_places_images_where_the_text_names_them(tmp_path):
    spec, (choice, question) = load("mmmu", tmp_path)
    assert spec.prompt_of(choice) == f"What does <image> show?\nA. a vase\nB. <image>\nC. nothing\n\n{LETTER}"
    assert spec.prompt_of(question) == f"<image>\nHow much?\n\n{SHORT}"
    assert (colours(choice), colours(question)) == (["red", "blue"], ["green"])
    assert question.reference == {"answer": ["3.50", "three fifty"], "options": {}}
    assert choice.categories == {"subject": "Art", "type": "multiple-choice", "subfield": "Drawing"}


@pytest.mark.parametrize("layout", ["authors", "HuggingFaceM4", "lmms-lab"])
def test_chartqa_in_three_layouts(layout, tmp_path):
    folder = tmp_path / "data"
    if layout == "authors":
        LAYOUTS["chartqa"](folder)
    elif layout == "HuggingFaceM4":
        rows = [("red", "How many, human?", ["14"], 0), ("blue", "How many, augmented?", ["12%"], 1)]
        names = ("query", "label", "human_or_machine")
    else:
        rows = [
            ("red", "How many, human?", "14", "human_test"),
            ("blue", "How many, augmented?", "12%", "augmented_test"),
        ]
        names = ("question", "answer", "type")
    if layout != "authors":
        columns = [{"image": hub_image(image), **dict(zip(names, rest, strict=True))} for image, *rest in rows]
        write_parquet(folder / "data" / "test-00000-of-00001.parquet", columns)
    spec = read_spec("chartqa")
    samples = spec.load(folder)
    assert spec.prompt_of(samples[0]) == f"How many, human?\n{SHORT}"
    assert [(sample.reference, sample.categories["source"]) for sample in samples] == [
        (["14"], "human"),
        (["12%"], "augmented"),
    ]
    assert [colours(sample) for sample in samples] == [["red"], ["blue"]]


def test_textvqa_with_and_without_words_of_an_ocr_program(tmp_path):
    spec, (sample,) = load("textvqa", tmp_path)
    assert spec.prompt_of(sample) == f"what is written?\n{SHORT}"
    assert (sample.id, sample.reference, colours(sample)) == ("34602", ["nokia"] * 9 + ["a phone"], ["red"])
    (sample,) = TextVQALoader(ocr="TextVQA_Rosetta_OCR_v0.2_val.json").load(tmp_path)
    assert sample.fields["ocr_tokens"] == "NOKIA, 12:00"


def test_seed_has_only_questions_about_images(tmp_path):
    spec, (sample,) = load("seed", tmp_path)
    assert spec.prompt_of(sample) == (f"How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}")
    assert (sample.id, sample.categories, colours(sample)) == ("101669", {"question_type": "5"}, ["red"])


def test_vstar_reads_options_in_the_question(tmp_path):
    spec, (sample,) = load("vstar", tmp_path)
    assert spec.prompt_of(sample).endswith(f"(D) leather\n{LETTER}")
    options = {"A": "rubber", "B": "cotton", "C": "kevlar", "D": "leather"}
    assert sample.reference == {"answer": "A", "options": options}


def test_scienceqa_has_only_questions_with_an_image(tmp_path):
    spec, (first, second) = load("scienceqa", tmp_path)
    assert spec.prompt_of(first) == f"Context: A map.\nWhich is it?\nA. Utah\nB. Ohio\n{LETTER}"
    assert spec.prompt_of(second) == f"Which is it?\nA. Utah\nB. Ohio\n{LETTER}"
    assert (first.reference["answer"], second.reference["answer"]) == ("B", "A")
    assert (first.id, second.id, colours(second)) == ("1", "3", ["blue"])


def test_realworldqa_has_open_questions_too(tmp_path):
    _, (choice, question) = load("realworldqa", tmp_path)
    assert choice.reference == {"answer": "B", "options": {"A": "Left", "B": "Right"}}
    assert question.reference == {"answer": "No", "options": {}}
    assert choice.id != question.id


def test_mvbench_finds_the_videos_of_each_task(tmp_path):
    spec, (first, second) = load("mvbench", tmp_path)
    assert spec.prompt_of(first) == f"Question:What happened?\nOption:\n(A) A fall.\n(B) A\n(C) B\n{LETTER}"
    assert first.reference["answer"] == "B"  # the option whose text is "A"
    assert first.videos == (str(tmp_path / "star/Charades_segment/action_sequence.mp4"),)
    assert [sample.categories for sample in (first, second)] == [
        {"task": "action_sequence"},
        {"task": "object_shuffle"},
    ]


def test_pope_tells_its_three_files_apart(tmp_path):
    spec, samples = load("pope", tmp_path)
    assert spec.prompt_of(samples[0]) == f"Is there a adversarial dog in the image?\n{SHORT}"
    assert [sample.id for sample in samples[:3]] == [
        "coco_pope_adversarial-1",
        "coco_pope_adversarial-2",
        "coco_pope_popular-1",
    ]
    assert [sample.reference for sample in samples] == ["no", "yes", "no", "yes", "yes", "yes"]


ROWS = [
    {"name": "one", "q": "What?", "a": "B", "first": "red", "second": "blue", "picture": "red.png", "kind": "x"},
    {"name": "two", "q": "Who, then?", "a": "A", "first": "cat", "second": "dog", "picture": "blue.png", "kind": "y"},
]
TABLE = TableLoader(
    id="name", question="q", answer="a", options=("first", "second"), images="picture", categories={"kind": "kind"}
)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("images", ["paths", "content"])
def test_a_table_is_the_same_in_every_format(ending, images, tmp_path):
    rows = ROWS
    for name in ("red", "blue"):
        write(tmp_path / f"{name}.png", png(name))
    if images == "content":
        made = hub_image if ending == "parquet" else text_png
        rows = [{**row, "picture": made(Path(row["picture"]).stem)} for row in ROWS]
    file = tmp_path / f"table.{ending}"
    if ending in ("csv", "tsv"):
        write_separated(file, rows, "," if ending == "csv" else "\t")
    elif ending == "parquet":
        write_parquet(file, rows)
    else:
        (write_lines if ending == "jsonl" else lambda path, value: write(path, json.dumps(value)))(file, rows)
    first, second = TABLE.load(file)
    assert first.reference == {"answer": "B", "options": {"A": "red", "B": "blue"}}
    assert second.fields["options"] == "A. cat\nB. dog"
    assert [colours(sample) for sample in (first, second)] == [["red"], ["blue"]]
    assert (first.id, second.categories) == ("one", {"kind": "y"})


def test_bytes_and_lists_of_images(tmp_path):
    file = write_parquet(
        tmp_path / "t.parquet", [{"q": "?", "a": "x", "p": [png("red"), png("blue")], "r": png("green")}]
    )
    (sample,) = TableLoader(question="q", answer="a", images=("p", "r")).load(file)
    assert (colours(sample), sample.reference) == (["red", "blue", "green"], "x")


def write_other_columns(file: Path) -> None:
    """Replace a table by one that lacks the needed columns."""
    row = {"other": 1, "image_id": "x"}
    if file.suffix == ".parquet":
        write_parquet(file, [{**row, "image": hub_image("red")}])
    elif file.suffix in (".csv", ".tsv"):
        write_separated(file, [row], "," if file.suffix == ".csv" else "\t")
    elif file.suffix == ".jsonl":
        write_lines(file, [row])
    else:
        key = {"SEED-Bench": "questions", "TextVQA_0.5.1_val": "data"}.get(file.stem)
        write(file, json.dumps({key: [row]} if key else [row]))


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("mmbench", "mmbench_dev.tsv", "index, question, answer, A, B, image"),
        ("mmvp", "Questions.csv", "Question, Options, Correct Answer"),
        ("mmmu", "validation-00000-of-00001.parquet", "id, question, options, answer, question_type, image_1"),
        ("chartqa", "test_augmented.json", "imgname, query, label"),
        ("textvqa", "TextVQA_0.5.1_val.json", "question_id, question, image_id, answers"),
        ("seed", "SEED-Bench.json", "question_id, question, answer, choice_a"),
        ("vstar", "test_questions.jsonl", "text, label, image, category"),
        ("scienceqa", "test-00000-of-00001-f0e719.parquet", "question, answer, choices, image"),
        ("realworldqa", "test-00001-of-00002.parquet", "question, answer, image"),
        ("mvbench", "object_shuffle.json", "question, answer, candidates, video"),
        ("pope", "coco_pope_random.json", "text, label, image"),
    ],
)
def test_missing_columns_are_named_with_file_and_what_was_found(name, file, expected, tmp_path):
    path = LAYOUTS[name](tmp_path)
    write_other_columns(next(tmp_path.rglob(file)))
    with pytest.raises(ValueError, match=f"expected columns: {expected}.*found: .*other") as error:
        read_spec(name).load(path)
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("name", "removed", "message"),
    [
        ("mmvp", "Questions.csv", "there is no file .*Questions.csv"),
        ("mmvp", "MMVP Images/2.jpg", r"Questions.csv, row 2: there is no file 2.jpg in .*MMVP Images"),
        (
            "mmmu",
            "Art/validation-00000-of-00001.parquet",
            r"expected to have files \*\*/validation-\*.parquet, .* Art/",
        ),
        ("chartqa", "test/test_human.json", "expected to have test/test_human.json .*imgname, query, label.* or data/"),
        ("chartqa", "test/png/augmented.png", "row 1: there is no file augmented.png in .*png"),
        (
            "textvqa",
            "train_images/0054c91397f2fe05.jpg",
            "row 1: there is no file 0054c91397f2fe05.jpg in .*train_images",
        ),
        ("seed", "SEED-Bench-image/1454426_2591111986", "row 1: there is no file 1454426_2591111986"),
        (
            "mvbench",
            "perception/videos/object_shuffle.mp4",
            "object_shuffle.json, row 1: there is no video 'object_shuf",
        ),
    ],
)
def test_missing_files_are_named(name, removed, message, tmp_path):
    path = LAYOUTS[name](tmp_path)
    (tmp_path / removed).unlink()
    with pytest.raises(ValueError, match=message):
        read_spec(name).load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": "x1"}, "row 5: the index must be a number, not 'x1'"),
        ({"index": 1000999}, "row 5: this is a rotation of the question 999, which the file lacks"),
        ({"answer": "D"}, "row 5: the right answer 'D' is none of the options A, B, C"),
        ({"answer": ""}, "row 5: the column 'answer' is empty"),
        ({"image": "77"}, "row 5: the image must be base64, or the index of another row, not '77'"),
        ({"index": 241}, "row 5: another row has the same index, 241"),
    ],
)
def test_wrong_rows_of_mmbench(change, message, tmp_path):
    rows = mmbench_rows()
    file = write_separated(tmp_path / "t.tsv", [*rows[:-1], {**rows[-1], **change}], "\t")
    with pytest.raises(ValueError, match=message):
        MMBenchLoader().load(file)


def test_nan_in_a_file_of_mmbench_is_an_empty_cell(tmp_path):
    row = {**mmbench_rows()[0], "C": "nan", "hint": "nan"}
    (sample,) = MMBenchLoader(circular=False).load(write_separated(tmp_path / "t.tsv", [row], "\t"))
    assert (sample.fields["hint"], list(sample.reference["options"])) == ("", ["A", "B"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": "__import__('os').listdir('/')"}, "row 1: the column 'options' must hold a list"),
        ({"options": "[" * 5000}, "row 1: the column 'options' must hold a list"),
        ({"question_type": "essay"}, "row 1: expected an id such as validation_Art_1 and the question_type"),
        ({"image_2": None}, "row 1: the question shows image_2, but the row has no such image"),
    ],
)
def test_wrong_rows_of_mmmu(change, message, tmp_path):
    rows = [{**mmmu_rows()[0], **change}, {**mmmu_rows()[0], "id": "validation_Art_3"}]
    write_parquet(tmp_path / "validation-0.parquet", rows)
    with pytest.raises(ValueError, match=message):
        MMMULoader().load(tmp_path)


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        ({}, {"a": "C"}, "row 1: the right answer 'C' is none of the options A, B"),
        ({"answer_is": "index"}, {"a": "2"}, "row 1: the right answer must be from 0 to 1, not '2'"),
        ({"answer_is": "text"}, {"a": "pink"}, "row 1: the right answer 'pink' is the text of 0 of the options"),
        ({}, {"picture": "none.png"}, "row 1: there is no file none.png in .*, and the text is not an image"),
        ({}, {"picture": "../x.png"}, "row 1: the path '../x.png' leaves the image folder"),
        ({}, {"picture": "https://a.org/x.png"}, "row 1: 'https://a.org/x.png' is an address"),
        ({}, {"q": ""}, "row 1: the column 'q' is empty"),
        ({"options": ("first",)}, {}, "row 1: the column 'first' must hold a list such as .*, not 'red'"),
        ({"media_folder": {"other": "x"}}, {}, "media_folder names no folder for table, only for other"),
        ({"only_rows_where": {"kind": "z"}}, {}, "only_rows_with and only_rows_where leave no row of"),
        ({"id": "first"}, {"first": "cat"}, "row 2: another row has the same first, 'cat'"),
    ],
)
def test_wrong_rows_of_a_table(options, row, message, tmp_path):
    for name in ("red", "blue"):
        write(tmp_path / f"{name}.png", png(name))
    file = write_separated(tmp_path / "table.csv", [{**ROWS[0], **row}, ROWS[1]], ",")
    with pytest.raises(ValueError, match=message):
        replace(TABLE, **options).load(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", b"PK", "is not a table: expected .csv, .tsv, .json, .jsonl or .parquet"),
        ("t.parquet", b"PAR1", "cannot be read as parquet"),
        ("t.csv", b"question,answer\n", "has no rows; expected columns: question, answer"),
        ("t.csv", b"question,answer\na,b,c\n", "row 1 has more values than the first line has columns"),
        ("t.csv", "question,answer\nä,b\n".encode("latin-1"), "cannot be read .*expected a table in UTF-8"),
        ("t.json", b'{"items": []}', "must hold a list of objects, not an object with the keys items"),
        ("t.json", b"[1]", "row 1 must be an object, not 1"),
        ("t.jsonl", b'{"question": "x"', "is not JSON in UTF-8"),
        ("t.jsonl", b'{"question": "x", "answer": NaN}', "row 1: the column 'answer' is empty"),
        ("t.csv", b'question,answer\na,b\n"a "b" c",d\n', "after line 2, is not a table"),
        ("t.csv", b"question,answer,answer\na,b,c\n", "has two columns named 'answer'"),
    ],
)
def test_unreadable_tables(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        TableLoader().load(write(tmp_path / name, content))
    assert name in str(error.value)


def test_json_lines_may_have_other_separators_of_lines_in_a_text(tmp_path):
    row = {"question": "one\u2028two\x85three", "answer": "x"}
    file = write(tmp_path / "t.jsonl", f"{json.dumps(row, ensure_ascii=False)}\r\n")
    (sample,) = TableLoader().load(file)
    assert sample.fields["question"] == row["question"]


def test_options_in_a_cell_are_json_or_python(tmp_path):
    lists = [json.dumps(["\U0001f600 smile", None, "sad"]), "['\U0001f600 smile', None, 'sad']"]
    rows = [{"question": "?", "answer": "C", "options": each} for each in lists]
    for sample in TableLoader(options="options").load(write_separated(tmp_path / "t.csv", rows, ",")):
        assert sample.reference == {"answer": "C", "options": {"A": "\U0001f600 smile", "C": "sad"}}


def test_a_folder_needs_a_pattern(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name its tables by files"):
        TableLoader().load(tmp_path)
    with pytest.raises(ValueError, match="give options or options_in, not both"):
        TableLoader(options="a", options_in="b")


def test_chartqa_names_the_columns_of_both_hubs(tmp_path):
    write_parquet(tmp_path / "data/test-0.parquet", [{"image": hub_image("red"), "query": "?"}])
    with pytest.raises(
        ValueError, match="expected the columns image, query, label, human_or_machine or image, question"
    ):
        ChartQALoader().load(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "t.parquet", [{"question": "?", "answer": "x"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"t.parquet needs pyarrow: pip install .*\[evaluate\]"):
        TableLoader().load(file)
