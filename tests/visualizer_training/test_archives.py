"""Images in tar archives: found, named, reported and in the same order as everything else."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
from visualization_parts import random_images, write_archive, write_damaged_archives

from metamorph.models.image_files import MediaError
from metamorph.visualizer_training.dataset import StreamBatches
from metamorph.visualizer_training.images.archives import COMPLETE, CUT_OFF, EMPTY, NO_IMAGE, UNREADABLE
from metamorph.visualizer_training.images.sources import open_images


@pytest.fixture
def three_archives(tmp_path):
    """Archives of 3, 1 and 2 images, among other members."""
    images = random_images(6)
    first = {"0.png": images[0], "0.txt": b"text", "sub/1.webp": images[1], "2.png": images[2]}
    write_archive(tmp_path / "a.tar", first)
    write_archive(tmp_path / "b.tar", {"0.cls": b"7", "0.png": images[3], ".hidden.png": b"no"})
    write_archive(tmp_path / "c.tar", {"0.PNG": images[4], "1.png": images[5]})
    (tmp_path / "archives.json").write_text(json.dumps(["a.tar", "b.tar", "c.tar"]))
    return tmp_path, images


def test_images_of_archives_in_their_order(three_archives):
    folder, images = three_archives
    source = open_images([folder / "archives.json"])
    names = [source.archives.name(index).removeprefix(f"{folder}/") for index in range(len(source))]
    assert names == ["a.tar:0.png", "a.tar:sub/1.webp", "a.tar:2.png", "b.tar:0.png", "c.tar:0.PNG", "c.tar:1.png"]
    for index in (0, 2, 3, 4, 5):  # all but the lossy one
        assert np.array_equal(np.array(source.load(index)), np.array(images[index]))
    again = copy.deepcopy(source)  # as a worker of a data loader gets it
    assert np.array_equal(np.array(again.load(5)), np.array(images[5]))


def test_folders_may_hold_archives_and_files(three_archives):
    folder, images = three_archives
    (folder / "loose").mkdir()
    images[0].save(folder / "loose" / "z.png")
    source = open_images(image_folder=folder)
    assert (len(source), source.files, len(source.archives.archives)) == (7, [folder / "loose" / "z.png"], 3)
    for index, expected in ((0, 0), (1, 0), (3, 2), (6, 5)):  # the loose file, then a.tar to c.tar
        assert np.array_equal(np.array(source.load(index)), np.array(images[expected]))
    assert open_images(image_folder=folder / "loose").archives is None


def test_r40_three_archives_give_every_image_once_to_any_number_of_ranks(three_archives):
    source = open_images([three_archives[0] / "archives.json"])
    for world_size in (1, 2, 4, 6):  # also more than there are archives
        ranks = [StreamBatches(len(source), 1, 12 // world_size, 0, rank, world_size) for rank in range(world_size)]
        samples = [s for rank in ranks for batch in rank for s in batch]
        for epoch in (0, 1):
            assert sorted(s.index for s in samples if s.position // 6 == epoch) == list(range(6))


def test_archives_listed_twice_are_read_once(three_archives, caplog):
    folder, _ = three_archives
    (folder / "twice.json").write_text(json.dumps(["a.tar", "b.tar", "a.tar"]))
    assert len(open_images([folder / "twice.json"])) == 4
    assert "1 archives are listed more than once" in caplog.text


def test_damage_is_reported_by_archive(tmp_path, caplog):
    paths = write_damaged_archives(tmp_path, random_images(7))
    (tmp_path / "4-noise.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "5-nothing.tar").touch()
    write_archive(tmp_path / "6-texts.tar", {"0.txt": b"text", "0.jpeg_": b"x"})
    source = open_images(image_folder=tmp_path).archives
    states = [(archive.num_images, archive.state) for archive in source.archives]
    assert states[:4] == [(3, COMPLETE), (1, CUT_OFF), (0, EMPTY), (3, COMPLETE)]
    assert states[4:] == [(0, UNREADABLE), (0, EMPTY), (0, NO_IMAGE)]
    assert source.num_lost == 1 + 2  # one cut off, and the mean of 3, 1 and 3
    with caplog.at_level(logging.INFO):
        source.report()
    assert "7 archives with 7 images, 0 to 3 each" in caplog.text
    assert f"{paths[1]} (1 images) is cut off" in caplog.text
    assert f"{paths[2]} (0 images) is empty" in caplog.text
    assert "0-corrupt" not in caplog.text  # the content of an image is checked when it is read
    with pytest.raises(MediaError, match=r"0-corrupt\.tar:broken\.jpg cannot be read"):
        source.load(1)


@pytest.mark.parametrize(
    ("keep", "state"),
    [(512, UNREADABLE), (514, UNREADABLE), (1024, CUT_OFF), (1100, CUT_OFF), (1536, CUT_OFF)],
)
def test_archives_cut_at_any_place_are_noticed(keep, state, tmp_path):
    """Also between two members, where Python's tarfile takes the missing header for the end."""
    path = write_archive(tmp_path / "a.tar", {"0.txt": b"text", "1.txt": b"text"})
    with path.open("r+b") as file:
        file.truncate(keep)
    write_archive(tmp_path / "b.tar", {"0.png": random_images(1)[0]})
    assert open_images(image_folder=tmp_path).archives.archives[0].state == state


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_r41_every_image_format_is_read_from_archives(suffix, tmp_path):
    write_archive(tmp_path / "a.tar", {f"0.{suffix}": random_images(1)[0], "0.json": b"{}"})
    source = open_images(image_folder=tmp_path)
    assert len(source) == 1
    assert source.load(0).size == (40, 32)


def test_r41_archives_without_a_known_ending_are_refused(tmp_path):
    write_archive(tmp_path / "a.tar", {"0.gif": b"GIF", "0.json": b"{}"})
    with pytest.raises(ValueError, match=r"none of 1 archives holds an image: .*a\.tar.*members end in gif, json"):
        open_images(image_folder=tmp_path)


def test_missing_archives_are_named(tmp_path):
    (tmp_path / "list.json").write_text('["gone.tar"]')
    with pytest.raises(FileNotFoundError, match=r"record 1: archive .*gone\.tar does not exist"):
        open_images([tmp_path / "list.json"])


def test_digest_follows_the_images_and_not_the_place(three_archives, tmp_path):
    folder, images = three_archives
    digest = open_images([folder / "archives.json"]).digest()
    (tmp_path / "moved").mkdir()
    for name in ("a.tar", "b.tar", "c.tar", "archives.json"):
        (tmp_path / "moved" / name).write_bytes((folder / name).read_bytes())
    assert open_images([tmp_path / "moved" / "archives.json"]).digest() == digest
    write_archive(folder / "b.tar", {"1.png": images[3]})
    assert open_images([folder / "archives.json"]).digest() != digest
