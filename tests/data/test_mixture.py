"""Mixtures: several sources, each with its task and its share, the same wherever they are opened."""

import io
import logging
import pickle
import tarfile

import numpy as np
import pytest
import torch
import yaml
from processing_parts import GOLDEN, build_processor, golden_image, llava, write_jsonl
from torch.utils.data import DataLoader

from metamorph.data.bad_records import TooManyBadRecordsError
from metamorph.data.batching.collation import PaddedCollator
from metamorph.data.dataset import ConversationDataset, MixtureDataset, load_data
from metamorph.data.mixture import SourceSpec, read_specs
from metamorph.data.records import DataError


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def folder(tmp_path):
    """Two JSONL files, one of them next to its images, and a tar."""
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "chat.jsonl", [llava(f"chat{n}", f"Hi {n}", "Yes.") for n in range(10)])
    (tmp_path / "vqa").mkdir()
    golden_image("vqa").save(tmp_path / "vqa" / "vqa.png")
    records = [llava(f"vqa{n}", "<image> What?", f"A {n}.", image="vqa.png") for n in range(4)]
    write_jsonl(tmp_path / "vqa" / "train.jsonl", records)
    with tarfile.open(tmp_path / "captions-0.tar", "w") as tar:
        for name, content in (("0.png", (GOLDEN / "images" / "gen.png").read_bytes()), ("0.txt", b"A cat.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return tmp_path


def write_mixture(folder, *entries):
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path


CHAT = {"path": "text/chat.jsonl"}
VQA = {"path": "vqa/train.jsonl"}
CAPTIONS = {"path": "captions-{0..0}.tar", "task": "text_to_image"}


def ids(dataset):
    places = map(dataset.locate, range(len(dataset)))
    return [source.record(number).id for source, number in places]


def test_a_mixture_of_three_kinds_of_sources(folder, processor, caplog):
    with caplog.at_level(logging.INFO, logger="metamorph.data.dataset"):
        dataset = load_data(write_mixture(folder, CHAT, VQA, CAPTIONS), processor, model_max_length=512)
    assert dataset.sources == {"chat": 10, "train": 4, "captions-{0..0}": 1}
    assert "source chat: 10 samples of 10 records, task instruction" in caplog.text
    assert len(dataset) == 15
    assert ids(dataset) == [f"chat{n}" for n in range(10)] + [f"vqa{n}" for n in range(4)] + ["0"]
    examples = [dataset[index] for index in (0, 10, 14)]
    assert [example["source"] for example in examples] == list(dataset.sources)
    assert [example["visual_target_mask"].any().item() for example in examples] == [False, False, True]
    assert [len(example.get("pixel_values", ())) for example in examples] == [0, 1, 1]
    for index, example in zip((0, 10, 14), examples, strict=True):
        source, number = dataset.locate(index)
        assert source.measure(number)[0] == len(example["input_ids"])
        assert source.name == example["source"]
    with pytest.raises(IndexError, match="no sample 15: the sources have 15"):
        dataset[15]


def test_a_single_file_is_a_mixture_of_one(folder, processor):
    dataset = load_data(folder / "text" / "chat.jsonl", processor)
    assert isinstance(dataset, MixtureDataset)
    assert dataset.sources == {"chat": 10}


def test_captions_without_a_declared_task_are_refused_with_the_fix(folder, processor):
    with pytest.raises(
        DataError, match=r"captions-0.tar:0 \(id '0'\): the record needs .*declare its task in a mixture"
    ):
        load_data(folder / "captions-{0..0}.tar", processor)


def test_the_image_folder_of_a_source_comes_before_the_flag(folder, processor):
    (folder / "empty").mkdir()
    entry = {**VQA, "image_folder": "vqa"}
    assert len(load_data(write_mixture(folder, entry), processor, image_folder=folder / "empty")) == 4
    with pytest.raises(DataError, match=rf"--image_folder {folder / 'empty'} is wrong"):
        load_data(write_mixture(folder, VQA), processor, image_folder=folder / "empty")


@pytest.mark.parametrize(
    ("share", "count", "most"),
    [({"weight": 2}, 20, 2), ({"weight": 0.5}, 5, 1), ({"weight": 2.5}, 25, 3), ({"max_samples": 3}, 3, 1)],
)
def test_shares_are_chosen_by_the_seed(folder, processor, share, count, most):
    path = write_mixture(folder, VQA, {**CHAT, **share})
    first, again = (ids(load_data(path, processor, seed=1)) for _ in range(2))
    other = ids(load_data(path, processor, seed=2))
    assert first == again
    chosen = first[4:]
    assert len(chosen) == count
    assert set(np.unique(chosen, return_counts=True)[1].tolist()) <= {most, max(1, most - 1)}
    if count != 20:
        assert other != first
    assert len(load_data(path, processor, weighted=False)) == 14


def test_max_samples_above_the_number_of_records_takes_all_once():
    assert SourceSpec("a.jsonl", max_samples=7).choose(7, seed=0) is None
    assert SourceSpec("a.jsonl", max_samples=100).choose(7, seed=0) is None
    assert SourceSpec("a.jsonl", weight=0.001).choose(7, seed=0).shape == (1,)


def test_what_a_task_draws_depends_on_seed_source_and_id_only(folder, processor):
    images = GOLDEN / "images"
    records = [{"id": f"c{n}", "image": "gen.png", "caption": f"Cat {n}."} for n in range(30)]

    def prompts(order, name="captions", seed=0):
        path = write_jsonl(folder / "captions.jsonl", [records[n] for n in order])
        dataset = ConversationDataset(path, processor, images, task="text_to_image", name=name, seed=seed)
        return {dataset.record(n).id: dataset.conversation(n) for n in range(len(order))}

    forward = prompts(range(30))
    assert prompts(range(29, -1, -1)) == forward
    assert prompts(range(30), seed=1) != forward
    assert prompts(range(30), name="others") != forward


def test_fingerprints_change_with_what_the_conversations_depend_on(folder, processor):
    def fingerprint(*entries, seed=0):
        return load_data(write_mixture(folder, *entries), processor, seed=seed).fingerprint()

    first = fingerprint(CHAT, VQA)
    assert fingerprint(CHAT, VQA) == first
    changed = {
        fingerprint(VQA, CHAT),
        fingerprint(CHAT, VQA, seed=1),
        fingerprint({**CHAT, "max_samples": 3}, VQA),
        fingerprint({**CHAT, "name": "talk"}, VQA),
    }
    write_jsonl(folder / "text" / "chat.jsonl", [llava("new", "Hi", "Yes.")])
    changed.add(fingerprint(CHAT, VQA))
    assert len(changed - {first}) == 5


def test_frames_may_be_others_in_another_folder(folder, processor, tmp_path):
    clip = write_jsonl(folder / "clip.jsonl", [{"id": "clip", "video": "clip.mp4"}])

    def fingerprint(image_folder):
        entry = {"path": str(clip), "task": "frame_prediction", "image_folder": str(image_folder)}
        return load_data(write_mixture(folder, entry), processor, check=False).fingerprint()

    assert fingerprint(folder) != fingerprint(tmp_path.parent)


def test_bad_records_are_counted_over_all_sources(folder, processor):
    lines = [llava(f"bad{n}", "Hi") for n in range(3)]
    write_jsonl(folder / "bad.jsonl", [*lines, "{"])
    path = write_mixture(folder, CHAT, {"path": "bad.jsonl"})
    dataset = load_data(path, processor, on_bad_record="skip", max_bad_fraction=0.2)
    assert [dataset[index].get("skipped") for index in (0, 10)] == [None, "unsupervised"]
    with pytest.raises(TooManyBadRecordsError, match=r"3 of 14 records .*'unsupervised': 2.*id 'bad1'"):
        dataset[11]
    assert dataset.statistics() == {
        "records": 14,
        "truncated": 0,
        "dropped_images": 0,
        "bad": {"broken_line": 1, "unsupervised": 2},
        "sources": {"chat": dataset.datasets[0].statistics(), "bad": dataset.datasets[1].statistics()},
    }
    with pytest.raises(DataError, match=r"bad.jsonl has 1 bad record\(s\); .*\n.*bad.jsonl:4: the text is not valid"):
        load_data(path, processor)
    assert len(load_data(path, processor, check=False)) == 14


def test_records_that_do_not_fit_their_task_are_found_ahead(folder, processor):
    path = write_mixture(folder, {**CHAT, "task": "text_to_image"})
    with pytest.raises(DataError, match=r"chat.jsonl has 10 bad record\(s\)"):
        load_data(path, processor)


def test_ranks_take_over_what_others_have_met(folder, processor):
    path = write_jsonl(folder / "bad.jsonl", [llava(f"bad{n}", "Hi") for n in range(4)])
    ranks = [load_data(path, processor, on_bad_record="skip", max_bad_fraction=0.5) for _ in range(2)]
    ranks[0][0], ranks[0][1], ranks[1][1], ranks[1][3]
    for dataset in ranks:
        assert dataset.limit.num_bad == 2
        dataset.limit.check()
    kinds = [dataset.datasets[0].counts._kinds.clone() for dataset in ranks]
    for dataset in ranks:
        for _ in range(2):
            dataset.limit.merge(lambda own: torch.maximum(own, torch.maximum(*kinds)))
        assert dataset.limit.num_bad == 3
        with pytest.raises(TooManyBadRecordsError, match="3 of 4 records are bad"):
            dataset.limit.check()


def test_workers_read_what_this_process_reads(folder, processor):
    dataset = load_data(write_mixture(folder, CHAT, VQA, CAPTIONS), processor)
    expected = [dataset[index]["input_ids"].tolist() for index in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert [example["input_ids"].tolist() for example in loader] == expected
    batch = PaddedCollator(0)([dataset[0], dataset[10]])
    assert batch["input_ids"].shape[0] == 2
    copy = pickle.loads(pickle.dumps(dataset.datasets[2].source))  # noqa: S301
    assert copy[0].value == dataset.datasets[2].source[0].value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: a.jsonl", r"must be a list of sources, each with path: and task:"),
        ("[]", "must be a list of sources"),
        ("- path: [", "is not valid YAML"),
        ("- just text", "source 1: a source must be a mapping"),
        ("- task: instruction", "source 1: path is required"),
        ("- path: text/chat.jsonl\n- path: nowhere.jsonl", r"source 2: path .*nowhere.jsonl does not exist"),
        ("- path: x-{0..3}.tar", r"source 1: .*x-0.tar and 3 more does not exist"),
        ("- {path: text/chat.jsonl, wieght: 2}", "source 1: unknown key 'wieght': did you mean 'weight'"),
        ("- {path: text/chat.jsonl, weight: -1}", "source 1: weight must be a number above 0 and at most 1000, not -1"),
        ("- {path: text/chat.jsonl, weight: yes}", "weight must be a number above 0 .*, not True"),
        ("- {path: text/chat.jsonl, weight: 1.0e+300}", "weight must be a number above 0 .*, not 1e\\+300"),
        ("- {path: text/chat.jsonl, weight: .nan}", "weight must be a number above 0 .*, not nan"),
        ("- path: x-{0..9999999999}.tar", r"source 1: .*the braces name more than"),
        ("- {path: text/chat.jsonl, max_samples: 1.5}", "max_samples must be a whole number, at least 1, not 1.5"),
        ("- {path: text/chat.jsonl, max_samples: 3, weight: 2}", "weight 2 and max_samples 3 exclude each other"),
        ("- {path: text/chat.jsonl, task: instructions}", "task 'instructions' is unknown.*'instruction'"),
        ("- {path: text/chat.jsonl, options: {fps: 2}}", "task instruction has no option 'fps'"),
        ("- {path: text/chat.jsonl, options: [fps]}", "options must be a mapping"),
        ("- {path: 3}", "path must be text, not 3"),
        ("- {path: text/chat.jsonl, image_folder: nowhere}", "source 1: image_folder .*nowhere does not exist or is"),
        ("- {path: text/chat.jsonl, name: a}\n- {path: vqa/train.jsonl, name: a}", "source 2: name 'a' is taken"),
    ],
)
def test_mistakes_in_a_mixture_name_file_and_entry(folder, text, message):
    path = folder / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        read_specs(path)


def test_an_epoch_cannot_become_too_long():
    with pytest.raises(
        DataError, match="source a: weight 1000 makes 10000000000 samples of 10000000 records; lower it"
    ):
        SourceSpec("a.jsonl", weight=1000).choose(10_000_000, 0)


def test_names_of_sources_differ(folder):
    specs = read_specs(write_mixture(folder, CHAT, CHAT, {**CHAT, "name": "mine"}, CHAT))
    assert [spec.name for spec in specs] == ["chat", "chat-2", "mine", "chat-3"]
    with pytest.raises(FileNotFoundError, match=r"--data_path .*nothing.yaml does not exist: give a .json or .jsonl"):
        read_specs(folder / "nothing.yaml")
