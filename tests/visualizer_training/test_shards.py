"""Pictures in tar shards: found, named, reported and in the same order as everything else."""

from __future__ import annotations

import copy
import json
import logging
from itertools import islice

import numpy as np
import pytest
from visualization_parts import random_images, write_damaged_shards, write_shard

from metamorph.models.image_files import MediaError
from metamorph.visualizer_training.dataset import StreamBatches
from metamorph.visualizer_training.pictures.shards import (
    CUT_OFF,
    EMPTY,
    NO_PICTURE,
    UNREADABLE,
    WHOLE,
    ShardedImages,
    report_shards,
)
from metamorph.visualizer_training.pictures.sources import ImageFiles, JoinedImages, open_pictures, shards_of


@pytest.fixture
def three_shards(tmp_path):
    """Shards of 3, 1 and 2 pictures, among other members."""
    pictures = random_images(6)
    first = {"0.png": pictures[0], "0.txt": b"text", "sub/1.webp": pictures[1], "2.png": pictures[2]}
    write_shard(tmp_path / "a.tar", first)
    write_shard(tmp_path / "b.tar", {"0.cls": b"7", "0.png": pictures[3], ".hidden.png": b"no"})
    write_shard(tmp_path / "c.tar", {"0.PNG": pictures[4], "1.png": pictures[5]})
    (tmp_path / "shards.json").write_text(json.dumps(["a.tar", "b.tar", "c.tar"]))
    return tmp_path, pictures


def test_pictures_of_shards_in_their_order(three_shards):
    folder, pictures = three_shards
    source = open_pictures([folder / "shards.json"])
    assert isinstance(source, ShardedImages)
    names = [source.name(index).removeprefix(f"{folder}/") for index in range(len(source))]
    assert names == ["a.tar:0.png", "a.tar:sub/1.webp", "a.tar:2.png", "b.tar:0.png", "c.tar:0.PNG", "c.tar:1.png"]
    for index in (0, 2, 3, 4, 5):  # all but the lossy one
        assert np.array_equal(np.array(source.load(index)), np.array(pictures[index]))
    again = copy.deepcopy(source)  # as a worker of a data loader gets it
    assert np.array_equal(np.array(again.load(5)), np.array(pictures[5]))


def test_folders_may_hold_shards_and_files(three_shards):
    folder, pictures = three_shards
    (folder / "loose").mkdir()
    pictures[0].save(folder / "loose" / "z.png")
    source = open_pictures(image_folder=folder)
    assert isinstance(source, JoinedImages)
    assert [len(part) for part in source.parts] == [1, 6]
    assert [source.name(index).rpartition("/")[2] for index in (0, 1, 6)] == ["z.png", "a.tar:0.png", "c.tar:1.png"]
    assert len(shards_of(source).shards) == 3
    assert shards_of(ImageFiles.from_folder(folder)) is None


def test_r40_three_shards_give_every_picture_once_to_any_number_of_ranks(three_shards):
    source = open_pictures([three_shards[0] / "shards.json"])
    for world_size in (1, 2, 4, 6):  # also more than there are shards
        ranks = [StreamBatches(len(source), 1, seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
        samples = [s for rank in ranks for batch in islice(rank, 12 // world_size) for s in batch]
        for epoch in (0, 1):
            names = sorted(source.name(s.index) for s in samples if s.position // 6 == epoch)
            assert names == sorted(source.name(index) for index in range(6))


def test_shards_listed_twice_are_read_once(three_shards, caplog):
    folder, _ = three_shards
    (folder / "twice.json").write_text(json.dumps(["a.tar", "b.tar", "a.tar"]))
    assert len(open_pictures([folder / "twice.json"])) == 4
    assert "1 shards are listed more than once" in caplog.text


def test_damage_is_reported_by_shard(tmp_path, caplog):
    paths = write_damaged_shards(tmp_path, random_images(7))
    (tmp_path / "4-noise.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "5-nothing.tar").touch()
    write_shard(tmp_path / "6-texts.tar", {"0.txt": b"text", "0.jpeg_": b"x"})
    source = open_pictures(image_folder=tmp_path)
    states = [(shard.num_images, shard.state) for shard in source.shards]
    assert states[:4] == [(3, WHOLE), (1, CUT_OFF), (0, EMPTY), (3, WHOLE)]
    assert states[4:] == [(0, UNREADABLE), (0, EMPTY), (0, NO_PICTURE)]
    assert source.num_lost == 1 + 2  # one cut off, and the mean of 3, 1 and 3
    with caplog.at_level(logging.INFO):
        report_shards(source.shards)
    assert "7 shards with 7 pictures, 0 to 3 each" in caplog.text
    assert f"{paths[1]} (1 pictures) is cut off" in caplog.text
    assert f"{paths[2]} (0 pictures) is empty" in caplog.text
    assert "0-corrupt" not in caplog.text  # what is in a picture is seen when it is read
    with pytest.raises(MediaError, match=r"0-corrupt\.tar:broken\.jpg cannot be read"):
        source.load(1)


@pytest.mark.parametrize(
    ("keep", "state"),
    [(512, UNREADABLE), (514, UNREADABLE), (1024, CUT_OFF), (1100, CUT_OFF), (1536, CUT_OFF)],
)
def test_shards_cut_at_any_place_are_noticed(keep, state, tmp_path):
    """Also between two members, where Python's tarfile takes the missing header for the end."""
    path = write_shard(tmp_path / "a.tar", {"0.txt": b"text", "1.txt": b"text"})
    with path.open("r+b") as file:
        file.truncate(keep)
    write_shard(tmp_path / "b.tar", {"0.png": random_images(1)[0]})
    assert open_pictures(image_folder=tmp_path).shards[0].state == state


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_r41_every_picture_format_is_read_from_shards(suffix, tmp_path):
    write_shard(tmp_path / "a.tar", {f"0.{suffix}": random_images(1)[0], "0.json": b"{}"})
    source = open_pictures(image_folder=tmp_path)
    assert len(source) == 1
    assert source.load(0).size == (40, 32)


def test_r41_shards_without_a_known_ending_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", {"0.gif": b"GIF", "0.json": b"{}"})
    with pytest.raises(ValueError, match=r"none of 1 shards holds a picture: .*a\.tar.*members end in gif, json"):
        open_pictures(image_folder=tmp_path)


def test_missing_shards_are_named(tmp_path):
    (tmp_path / "list.json").write_text('["gone.tar"]')
    with pytest.raises(FileNotFoundError, match=r"record 1: shard .*gone\.tar does not exist"):
        open_pictures([tmp_path / "list.json"])


def test_digest_follows_the_pictures_and_not_the_place(three_shards, tmp_path):
    folder, pictures = three_shards
    digest = open_pictures([folder / "shards.json"]).digest()
    (tmp_path / "moved").mkdir()
    for name in ("a.tar", "b.tar", "c.tar", "shards.json"):
        (tmp_path / "moved" / name).write_bytes((folder / name).read_bytes())
    assert open_pictures([tmp_path / "moved" / "shards.json"]).digest() == digest
    write_shard(folder / "b.tar", {"1.png": pictures[3]})
    assert open_pictures([folder / "shards.json"]).digest() != digest
