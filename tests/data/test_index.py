"""Indexes: made once, shared by processes, made again when a file changes."""

import errno
import json
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from processing_parts import llava, write_jsonl

from metamorph.data.records import DataError
from metamorph.data.sources import index as index_module
from metamorph.data.sources.index import cache_folder, index_files
from metamorph.data.sources.open import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, in which small files are kept, too."""
    monkeypatch.setenv("METAMORPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "MIN_CACHED_BYTES", 0)
    return tmp_path / "cache" / "index"


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "data.jsonl", [llava(number, "Hi", "Yes.") for number in range(100)])


def folders(cache):
    return [folder for folder in cache.iterdir() if folder.is_dir()]


def test_an_index_is_uint64_mapped_and_made_once(path, cache):
    calls = []

    def build():
        calls.append(1)
        return {"offsets": np.arange(10, dtype=np.uint64)}

    for _ in range(2):
        index = index_files([path], "test", build)
        assert isinstance(index["offsets"], np.memmap)
        assert index["offsets"].dtype == np.uint64
        assert index["offsets"].tolist() == list(range(10))
    assert len(calls) == 1
    assert json.loads((folders(cache)[0] / "index.json").read_text())["files"][0]["path"] == str(path)
    index_files([path], "other", build)
    assert len(calls) == 2


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_changed_file_is_indexed_again(tmp_path, cache, caplog, layout):
    path = tmp_path / "data.json"

    def write(records):
        path.write_text(json.dumps(records) if layout == "array" else "\n".join(map(json.dumps, records)))

    write([{"id": 1}, {"id": 2}])
    old = open_source(path)
    write([{"id": 3}, {"id": 4}, {"id": 5}])
    with caplog.at_level(logging.INFO):
        assert [record.value["id"] for record in open_source(path)] == [3, 4, 5]
    assert f"{path} has changed: it was indexed again" in caplog.text
    assert len(folders(cache)) == 1
    with pytest.raises(DataError, match=r"data.json has changed since it was indexed; restart"):
        old[0]
    os.utime(path, ns=(0, 0))
    open_source(path)
    assert len(folders(cache)) == 1


def test_copies_map_the_same_memory(path):
    source = open_source(path)
    assert source[7].value["id"] == 7  # its file is open now
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert len(pickle.dumps(source)) < 2000
    assert isinstance(copy.index["offsets"], np.memmap)
    assert copy[99].value == source[99].value
    assert copy.index.fingerprint() == source.index.fingerprint()


RANK = """
import logging, sys
from metamorph.data.sources import index
from metamorph.data.sources import json_files as json_sources
from metamorph.data.sources.open import open_source
index.MIN_CACHED_BYTES = 0
scan = json_sources.scan_lines
def scan_lines(path):
    print("scanning", flush=True)
    return scan(path)
json_sources.scan_lines = scan_lines
source = open_source(sys.argv[1])
print("records", len(source), source[99].value["id"])
"""


def test_r21_one_process_scans_the_file_and_the_others_wait(path):
    """The original's ranks each scanned the whole file."""
    command = [sys.executable, "-c", RANK, str(path)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [rank.communicate()[0].splitlines() for rank in ranks]
    assert [output[-1] for output in outputs] == ["records 100 99"] * 3
    assert sum("scanning" in output for output in outputs) == 1


def test_where_nothing_can_be_saved_every_process_has_its_own(path, cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    source = open_source(path)
    assert len(source) == 100
    assert "set METAMORPH_CACHE to a writable folder" in caplog.text
    assert pickle.loads(pickle.dumps(source))[3].value["id"] == 3  # noqa: S301


def test_a_full_disk_costs_time_but_not_the_run(path, cache, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    assert len(open_source(path)) == 100
    assert "No space left on device" in caplog.text
    assert not folders(cache)


def test_a_file_that_changes_while_it_is_indexed_is_refused(path, cache):
    def build():
        path.write_text("other")
        return {"offsets": np.arange(10, dtype=np.uint64)}

    with pytest.raises(DataError, match="changed while it was indexed; wait until it is complete"):
        index_files([path], "test", build)
    assert not folders(cache)


def test_what_a_killed_process_left_is_no_index(path, cache):
    open_source(path)
    complete = folders(cache)[0]
    (cache / f".new-{complete.name.rpartition('-')[0]}").mkdir()
    (cache / f".new-{complete.name.rpartition('-')[0]}" / "offsets.npy").write_bytes(b"half")
    path.write_text('{"id": 1}\n')
    assert [record.value for record in open_source(path)] == [{"id": 1}]
    assert len(folders(cache)) == 1


@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "other values", "missing", "no list", "broken list"])
def test_a_damaged_index_is_told_and_made_again(path, cache, caplog, damage):
    expected = [record.value for record in open_source(path)]
    (folder,) = folders(cache)
    file = folder / ("index.json" if "list" in damage else "offsets.npy")
    content = file.read_bytes()
    if damage in ("missing", "no list"):
        file.unlink()
    elif damage == "other values":
        np.save(file, np.array([0, 2**62], dtype=np.uint64))
    else:
        file.write_bytes({"empty": b"", "zeros": bytes(len(content))}.get(damage, content[: len(content) // 2]))
    assert [record.value for record in open_source(path)] == expected
    assert f"The index of {path} in {folder} is damaged: it is made again" in caplog.text
    caplog.clear()
    assert [record.value for record in open_source(path)] == expected
    assert not caplog.text
    assert folders(cache) == [folder]


def test_bytes_outside_of_a_file_are_not_read(path):
    index = index_files([path], "test", lambda: {"offsets": np.arange(3)})
    for start, end in ((0, 2**62), (-1, 5), (5, 1)):
        with pytest.raises(DataError, match=r"data.jsonl has no bytes .*its index is damaged; delete"):
            index.read(start, end)


def test_small_files_leave_nothing_behind(path, cache, monkeypatch):
    monkeypatch.setattr(index_module, "MIN_CACHED_BYTES", 16 * 2**20)
    assert len(open_source(path)) == 100
    assert not cache.exists()


def test_the_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("METAMORPH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "metamorph"
