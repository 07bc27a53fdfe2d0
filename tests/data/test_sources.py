"""Files of records: read by offset in any order, whatever their layout; what is wrong is named with its place."""

import gzip
import json
import os
import pickle

import pytest
from processing_parts import llava, write_jsonl

from metamorph.data import records
from metamorph.data.records import DataError, RecordError
from metamorph.data.sources import json_files as json_sources
from metamorph.data.sources.open import JsonArraySource, JsonlSource, expand_pattern, open_source


GOOD = llava("a", "<image> What?", "A cat.", image="a.png")


def values(source):
    return [record.value for record in source]


def test_json_lines_are_read_in_any_order(tmp_path):
    records = [llava(f"é{index}", "Hi", "Yes." * index) for index in range(20)]
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(record, ensure_ascii=index % 2 == 0) for index, record in enumerate(records)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines[:10]).encode() + b"\n \n\n" + "\n".join(lines[10:]).encode())
    source = open_source(path)
    assert isinstance(source, JsonlSource)
    assert len(source) == 20
    assert [source[index].value for index in reversed(range(20))] == records[::-1]
    assert source[0].where == f"{path}:1"
    assert source[10].where == f"{path}:13"  # the blank lines count
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert copy[11].value == records[11]
    with pytest.raises(IndexError, match="has no record 20: it has 20"):
        source[20]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
@pytest.mark.parametrize(
    "text", ['{"a":1}\n{"a":2}\n', '\n\n{"a":1}\r\n  \n\t{"a":2}', ' {"a":1}\n{"a":2}\n\n \n', '{"a":1}']
)
def test_lines_may_end_anywhere_in_a_chunk(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr(json_sources, "CHUNK_BYTES", chunk)
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode())
    expected = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    source = JsonlSource(path)
    assert values(source) == [json.loads(line) for _, line in expected]
    assert [record.where for record in source] == [f"{path}:{number}" for number, _ in expected]


def test_a_broken_line_is_an_error_of_its_record_alone(tmp_path):
    lines = [GOOD, '{"id": "b", "conv', GOOD, "[1, 2", GOOD, '{"a": 1} {"b": 2}', "1" * 5000]
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    with path.open("ab") as file:
        file.write(b'{"id": "\xff"}\n')
    source = JsonlSource(path)
    broken = {}
    for index in range(len(source)):
        try:
            assert source[index].value == GOOD
        except RecordError as error:
            broken[index] = error
    assert [(index, error.where, error.kind) for index, error in broken.items()] == [
        (index, f"{path}:{index + 1}", "broken_line") for index in (1, 3, 5, 6, 7)
    ]
    assert "data.jsonl:2: the text is not valid JSON (Unterminated string starting at column 13" in str(broken[1])
    assert "the text cannot be read (Exceeds the limit" in str(broken[6])
    assert "not UTF-8" in str(broken[7])


def test_r12_json_arrays_are_read(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, llava("b", "Hi", "Yes.")], indent=2), encoding="utf-8")
    source = open_source(path)
    assert isinstance(source, JsonArraySource)
    assert [record["id"] for record in values(source)] == ["a", "b"]
    assert source[1].where == f"{path}[1]"
    with pytest.raises(IndexError, match="has no record 2"):
        source[2]


TRICKY = [
    {"text": 'quotes " and \\ brackets ]},[{', "é": "ü€😀", "list": [[], {}, [1, {"a": None}]]},
    {},
    {"number": -1.5e-7, "long": "x" * 100},
    -1e308,
    -1e-7,
    [1, 2],
    "text, ]",
    12345,
    True,
    None,
]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_r12_arrays_are_scanned_in_chunks_of_any_size(tmp_path, monkeypatch, chunk, indent, ascii_only):
    monkeypatch.setattr(json_sources, "CHUNK_BYTES", chunk)
    path = tmp_path / "data.json"
    text = json.dumps(TRICKY, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(b"\xef\xbb\xbf \n" + text.encode() + b"\r\n")
    assert values(JsonArraySource(path)) == TRICKY


def test_a_record_that_never_ends_does_not_draw_the_file_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_sources, "CHUNK_BYTES", 64)
    monkeypatch.setattr(json_sources, "MAX_RECORD_BYTES", 1024)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1024)
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1},\n {"b": "' + "never closed " * 1000)
    with pytest.raises(DataError, match=r"data.json:2:2: .*a record is longer than"):
        open_source(path)
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n' + " " * 3000 + "\n" + json.dumps({"a": "x" * 1100}) + '\n{"a": 2}\n')
    source = open_source(path)
    assert (len(source), source[2].value) == (3, {"a": 2})
    for index, line in ((0, 1), (1, 3)):  # blank lines count as the end of the record before them
        with pytest.raises(RecordError, match=rf"data.jsonl:{line}: the record has \d+ bytes, more than 1024"):
            source[index]


def test_numbers_of_any_length_are_errors_of_their_record(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"id": ' + "9" * 5000 + '}, {"id": 7}]')
    source = open_source(path)
    assert source[1].value == {"id": 7}
    with pytest.raises(RecordError, match=r"data.json\[0\]: the text cannot be read") as error:
        source[0]
    assert error.value.kind == "broken_line"


def test_white_space_is_skipped_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(json_sources, "CHUNK_BYTES", 64)
    path = tmp_path / "data.json"
    path.write_text("[" + " \n" * 500 + "1," + "\t" * 64 + "2" + " " * 63 + "]")
    assert values(JsonArraySource(path)) == [1, 2]


@pytest.mark.parametrize("name", ["data.jsonl", "data.tar"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is not a regular file"):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"id": 1},\n {"id": }]', r"data.json:2:9: not a valid JSON array \(Expecting value\); correct the file"),
        (b'[{"id": 1}\n {"id": 2}]', r"data.json:2:2: .*a comma or the end of the array is missing"),
        (b'[{"id": 1},\n]', r"data.json:2:1: .*there is a comma before the end"),
        (b'[{"id": 1}] {"id": 2}', r"data.json:1:13: .*there is more text after the end of the array"),
        (b'[{"id": 1}, {"id": "tex', r"data.json:1:20: .*Unterminated string"),
        (b'[{"id": 1},', r"data.json:1:12: .*Expecting value"),
        (b'[{"id": 1}', r"data.json:1:11: .*a comma or the end of the array is missing"),
    ],
)
def test_what_is_no_array_is_named_with_its_place(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message):
        open_source(path)


def test_text_in_another_encoding_is_an_error_of_its_record(tmp_path):
    path = tmp_path / "latin.json"
    path.write_bytes(b'["\xe9", "e"]')
    source = open_source(path)
    assert source[1].value == "e"
    with pytest.raises(RecordError, match=r"latin.json\[0\]: the text is not UTF-8") as error:
        source[0]
    assert error.value.kind == "broken_line"


def test_what_is_no_source_is_named(tmp_path):
    with pytest.raises(DataError, match=r"--data_path .*missing.jsonl does not exist"):
        open_source(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"is a folder; give a \.json or .jsonl file"):
        open_source(tmp_path)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n'))
    with pytest.raises(DataError, match=r"data.jsonl.gz is not UTF-8 text \(compressed, perhaps"):
        open_source(tmp_path / "data.jsonl.gz")
    for name, text in (("empty.jsonl", "\n\n"), ("nothing.jsonl", ""), ("empty.json", " [ ]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="has no records"):
            open_source(tmp_path / name)


def test_patterns_of_files(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-08", "b-09", "b-10", "c"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern):
        return [path.stem for path in expand_pattern(f"{tmp_path}/{pattern}")]

    assert names("c.tar") == ["c"]
    assert names("a-{08..10}.tar") == ["a-08", "a-09", "a-10"]
    assert names("{b,a}-{10..09}.tar") == ["b-10", "b-09", "a-10", "a-09"]
    assert names("a-*.tar") == ["a-08", "a-09", "a-10"]
    assert names("{a,b}-?8.tar") == ["a-08", "b-08"]
    with pytest.raises(DataError, match=r"a-11.tar and 1 more does not exist; check the pattern"):
        names("a-{09..12}.tar")
    with pytest.raises(DataError, match=r"z-\*.tar does not exist"):
        names("z-*.tar")
    for pattern in ("a-{0..9999999999}.tar", "a-" + "{0..9}" * 40 + ".tar"):
        with pytest.raises(DataError, match="the braces name more than 1000000 files; check their numbers"):
            names(pattern)
    with pytest.raises(DataError, match=r"it has \d+ characters, more than 4096") as error:
        names("{a}" * 8000 + ".tar")
    assert len(str(error.value)) < 400
    with pytest.raises(DataError, match=r"it names .*c\.tar twice"):
        names("c{,}{,}.tar")
