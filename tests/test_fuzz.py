"""Random and damaged input: whatever it is, it is read, or refused with an error of this project, in little time.

Input number n of a test is a function of the seed and n alone, and a failure names both:

    METAMORPH_FUZZ_SECONDS=120 METAMORPH_FUZZ_SEED=1 pytest tests/test_fuzz.py         # two minutes of other input
    METAMORPH_FUZZ_SEED=1 METAMORPH_FUZZ_FIRST=4321 pytest tests/test_fuzz.py -k tars  # begins with one that failed
"""

import io
import json
import logging
import os
import resource
import string
import tarfile
import time
from contextlib import suppress
from random import Random
from threading import Timer

import pytest
import yaml
from PIL import Image
from processing_parts import CHAT_TEMPLATES, sentencepiece_tokenizer, tokenizer_with
from transformers import SiglipImageProcessor

from metamorph.data.examples import ConversationDataset
from metamorph.data.fields import NAMES
from metamorph.data.mixture import read_specs
from metamorph.data.records import DataError, RecordError
from metamorph.data.sources.json_files import JsonArraySource, JsonlSource
from metamorph.data.sources.tars import TarSource
from metamorph.data.tasks import TASKS
from metamorph.models.image_files import FORMATS, MediaError, load_image
from metamorph.models.processing_metamorph import MetaMorphProcessor


logger = logging.getLogger(__name__)

SECONDS = float(os.environ.get("METAMORPH_FUZZ_SECONDS", "3")) / 6
"""How long each of the six tests takes; by default just long enough to see that it works."""
SEED = int(os.environ.get("METAMORPH_FUZZ_SEED", "0"))
FIRST = int(os.environ.get("METAMORPH_FUZZ_FIRST", "0"))
MAX_SECONDS = 20
"""For one input, on a busy machine."""
MAX_MEMORY = 2**30
"""Bytes that the process may grow by."""

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(SECONDS + 300)]


def fuzz(name, check):
    """Call `check` with generators of random numbers until the time is over; tell which one it failed with."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, number = time.monotonic(), FIRST
    while number == FIRST or time.monotonic() < start + SECONDS:
        began = time.monotonic()
        hang = Timer(MAX_SECONDS, logger.error, ("METAMORPH_FUZZ_SEED=%d METAMORPH_FUZZ_FIRST=%d hangs", SEED, number))
        hang.daemon = True
        hang.start()
        try:
            check(Random(f"{name} {SEED} {number}"))
        except BaseException:
            logger.error("METAMORPH_FUZZ_SEED=%d METAMORPH_FUZZ_FIRST=%d", SEED, number)
            raise
        finally:
            hang.cancel()
        assert time.monotonic() - began < MAX_SECONDS, f"input {number} of seed {SEED} took too long"
        number += 1
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MAX_MEMORY, f"inputs {FIRST} to {number} of seed {SEED} took {grown >> 20} MiB"


PIECES = [
    *("<image>", "<image_start>", "<image_end>", "<im_patch>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "[INST]"),
    *("</s>", "<unk>", " ", "\n", "\0", "\ud800", "\u2028", "\ufeff", "\x1b[31m", "\u202e", "é", "😀", "a", "red cat"),
    *("{}", "{0}", "{caption}", "%s", "<ima", "ge>", "A" * 300, ": ", "- ", "[", "&a ", "*a", "!!", "../", "/etc"),
]
NUMBERS = [0, 1, -1, 5, 0.5, 1e308, -1e308, float("inf"), float("nan"), 10**30, 2**63, 10**400, True, None, -0.0]
PATHS = ["a.png", "b.png", "c.mp4", "../a.png", "/etc/passwd", "", ".", "a.png/", "a\0", "\ud800.png", "x" * 300]
PATHS += [f"a.png###{box}" for box in ("[0, 0, 9, 9]", "[1]", "[nan, 0, 1, 1]", "[-5, 1e400, 3, 4]", "[9, 9, 0, 0]")]


def text(rng, most=6):
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, most)))


def value(rng, depth=0):
    """Anything that JSON or YAML can hold."""
    kind = rng.randint(0, 7 if depth < 4 else 4)
    if kind < 2:
        return text(rng)
    if kind < 5:
        return rng.choice(NUMBERS if kind < 4 else PATHS)
    if kind < 7:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return {rng.choice(["name", "bbox", "id", text(rng)]): value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def damaged(rng, data):
    """Bytes with a few changed, removed, inserted or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place = rng.randrange(len(data) + 1)
        kind = rng.randint(0, 4)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[place : place + rng.randint(1, 64)]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randint(1, 16))
        elif kind == 3:
            data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
        else:
            start = rng.randrange(len(data) + 1)
            data[place : place + 32] = data[start : start + 32]
    return bytes(data)


def read_all(source):
    """Every record, an error of the record in place of a broken one."""
    records = []
    for index in range(len(source)):
        try:
            records.append(source[index].value)
        except RecordError as error:
            records.append(error)
    return records


def test_tars(tmp_path):
    contents = {"json": b'{"id": 1, "conversations": []}', "png": b"\x89PNG" * 200, "txt": b"A cat.", "mp4": b""}
    tars = []
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
            for number in range(3):
                for suffix, content in contents.items():
                    member = tarfile.TarInfo(f"{'d' * 120 * (number % 2)}/{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        tars.append(buffer.getvalue())
    sizes = [
        b"\xff" * 10 + b"\xfe\0",
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"77777777777\0",
        b"-0000000512\0",
        b" " * 12,
    ]
    path = tmp_path / "x.tar"

    def check(rng):
        data = bytearray(rng.choice(tars))
        headers = [start for start in range(0, len(data), 512) if data[start + 257 : start + 262] == b"ustar"]
        for start in rng.choices(headers, k=rng.randint(1, 3)):
            kind = rng.randint(0, 4)
            if kind == 0:
                data[start + 124 : start + 136] = rng.choice(sizes)
            elif kind == 1:
                data[start + 156] = rng.choice(b"0123456LKxgSXDMNV\0\xff")
            elif kind == 2:
                data[start : start + 100] = rng.randbytes(100)
            else:
                data[start + rng.randrange(kind * 256)] = rng.randrange(256)
            if rng.random() < 0.9:  # with its checksum right, a header is believed
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        path.write_bytes(damaged(rng, data) if rng.random() < 0.3 else data)
        try:
            source = TarSource([path])
        except DataError:
            return
        read_all(source)
        for index in range(len(source)):
            store = source.store(index)
            assert all(len(store.read(name)) == store.size(name) for name in store.names)

    fuzz("tars", check)


def test_json(tmp_path):
    path = tmp_path / "x.json"

    def check(rng):
        values = [value(rng) for _ in range(rng.randint(0, 5))]
        data = json.dumps(values, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        lines = "\r\n".join(json.dumps(item) for item in values)
        for kind, content in ((JsonArraySource, data), (JsonlSource, lines)):
            content = content.encode("utf-8", "surrogatepass")
            content = damaged(rng, content) if content and rng.random() < 0.6 else content
            path.write_bytes(content)
            try:
                records = read_all(kind(path))
                expected = json.loads(content) if kind is JsonArraySource else None
            except DataError:
                continue
            except ValueError:  # of json.loads, where our error is that of a record
                assert any(isinstance(record, RecordError) for record in records)
                continue
            if expected is not None and not any(isinstance(record, RecordError) for record in records):
                assert repr(records) == repr(expected)

    fuzz("json", check)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*", "ignore::PIL.Image.DecompressionBombWarning")
def test_images():
    files = []
    for image_format in FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "I;16", "1", "CMYK", "F"):
            buffer = io.BytesIO()
            try:
                Image.new(mode, (33, 17)).save(buffer, image_format)
            except (OSError, KeyError, ValueError):  # a mode that the format does not have
                continue
            files.append(buffer.getvalue())

    def check(rng):
        with suppress(MediaError):
            assert load_image(io.BytesIO(damaged(rng, rng.choice(files))), name="x").mode == "RGB"

    fuzz("images", check)


def test_mixtures(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"conversations": []}\n')
    path = tmp_path / "x.yaml"
    fields = ["image_folder", "task", "weight", "max_samples", "options", "fields", "name", "unknown"]
    options = ["fps", "margin", "max_frames", "templates", "box_units"]

    def check(rng):
        entries = []
        for _ in range(rng.randint(0, 3)):
            choices = [
                value(rng),
                rng.choice(NUMBERS),
                rng.choice(list(TASKS)),
                text(rng),
                {rng.choice(options): value(rng)},
            ]
            entry = {field: rng.choice(choices) for field in rng.sample(fields, rng.randint(0, 3))}
            entries.append({"path": rng.choice(["d.jsonl", "d.jsonl", text(rng), value(rng)]), **entry})
        data = yaml.safe_dump(entries, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        path.write_bytes(damaged(rng, data) if rng.random() < 0.6 else data)
        try:
            for spec in read_specs(path):
                chosen = spec.choose(10, seed=0)
                assert chosen is None or 0 < len(chosen) <= 10_000
        except DataError as error:
            if str(path) not in str(error):
                raise

    fuzz("mixtures", check)


@pytest.fixture(scope="module")
def processors():
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28})

    def build(tokenizer, version, **fields):
        return MetaMorphProcessor(image_processor, tokenizer, version=version, num_image_tokens=4, **fields)

    built = [build(tokenizer_with(), version) for version in ("llama3", "chatml", "plain", "llama3_original")]
    for index, name in enumerate(CHAT_TEMPLATES):
        built.append(build(tokenizer_with(name), "auto", mm_use_im_start_end=bool(index % 2)))
    return [*built, build(sentencepiece_tokenizer(), "auto")]


def record_of(rng, task):
    """A record that may fit its task, with a few fields that may not."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text(rng)} for index in range(rng.choice([2, 2, 4]))]
    if rng.random() < 0.2:
        turns.insert(0, {"from": "system", "value": text(rng)})
    markers = sum(turn["value"].count("<image>") for turn in turns)
    record = {"id": text(rng), "conversations": turns, "image": [rng.choice(PATHS[:2]) for _ in range(markers)]}
    if task == "visual_cot":
        record["image"] = ["a.png", rng.choice(PATHS)]
    elif task == "vstar":
        record |= {"image": "a.png", "target_instances": [{"name": text(rng), "bbox": [1, 2, 9, rng.choice(NUMBERS)]}]}
    elif task == "text_to_image":
        record |= {"image": "a.png", "caption": rng.choice([text(rng), value(rng)])}
    elif task == "image_edit":
        record |= {"image": ["a.png", "b.png"], "edit": rng.choice([text(rng), value(rng)])}
    for _ in range(rng.choice([0, 0, 1, 2])):
        record[rng.choice(["id", "image", "video", "caption", "conversations", "target_instances"])] = value(rng)
    return record if rng.random() < 0.98 else value(rng)


def test_records_become_consistent_examples(tmp_path, processors):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGBA", (20, 50)).save(tmp_path / "b.png")
    path = tmp_path / "x.jsonl"

    def check(rng):
        task, processor, max_length = rng.choice(list(TASKS)), rng.choice(processors), rng.choice([None, 8, 40, 200])
        options = {"box_units": rng.choice(["pixels", "relative"])} if task in ("visual_cot", "vstar") else {}
        path.write_text(json.dumps(record_of(rng, task)) + "\n")
        fields = (
            {ours: rng.choice(NAMES) for ours in rng.sample(NAMES, rng.randint(0, 3))} if rng.random() < 0.3 else {}
        )
        try:
            dataset = ConversationDataset(
                path, processor, tmp_path, max_length, task=task, options=options, check=False, fields=fields
            )
            dataset.check()
            example = dataset[0]
        except (RecordError, DataError):
            return
        ids, labels, targets = (example[name] for name in ("input_ids", "labels", "visual_target_mask"))
        assert ids.shape == labels.shape == targets.shape
        assert max_length is None or len(ids) <= max_length
        if max_length is None:
            assert dataset.measure(0)[0] == len(ids)
        is_image = ids == processor.image_tokens.image
        images = len(example["pixel_values"]) if "pixel_values" in example else 0
        assert is_image.sum() == images * processor.num_image_tokens
        assert (labels[is_image] == -100).all()
        assert (targets <= is_image).all()
        assert (labels[labels != -100] == ids[labels != -100]).all()

    fuzz("records", check)


TEMPLATE_PIECES = [
    *("{{ bos_token }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "\n", " "),
    *("<|im_start|>", "<|im_end|>", "{% if add_generation_prompt %}", "{% endif %}", "{% if m.role == 'user' %}"),
    *(
        "{% else %}",
        "{{ messages[0].content }}",
        "{{ x.y.z }}",
        "{{ raise_exception('no') }}",
        "{{ m.content | trim }}",
    ),
    *(
        "{{ m.content[0] }}",
        "{{ m.content | upper }}",
        "{% if loop.last %}",
        "{{ m.content | length }}",
        "{{ m.content * 9 }}",
        "{% for a in range(9999) %}",
        "{% set x = m.content + m.content %}",
        "{{ 'x' * 999999999 }}",
    ),
]


def test_templates():
    image_processor, tokenizer = SiglipImageProcessor(size={"height": 28, "width": 28}), tokenizer_with("qwen")
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
    image = Image.new("RGB", (4, 4))

    def check(rng):
        template = rng.choice([*CHAT_TEMPLATES.values(), ""])
        for _ in range(rng.randint(1, 5)):
            place = rng.randint(0, len(template))
            template = template[:place] + rng.choice(TEMPLATE_PIECES) + template[place:]
        if rng.random() < 0.2:
            template = template.replace(rng.choice(string.printable), "", 1)
        tokenizer.chat_template = template
        try:
            processor = MetaMorphProcessor(image_processor, tokenizer, version="auto", num_image_tokens=4)
            encoded = processor.encode_conversation(messages, [image])
        except ValueError:
            return
        assert len(encoded.input_ids) == len(encoded.labels) == len(encoded.visual_target_mask)
        assert (encoded.input_ids == processor.image_tokens.image).sum() == 4

    fuzz("templates", check)
