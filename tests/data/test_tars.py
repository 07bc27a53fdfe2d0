"""WebDataset tars: samples by index, members read where they lie."""

import io
import json
import pickle
import tarfile

import pytest
import torch
from PIL import Image
from processing_parts import build_processor, golden_image, llava

from metamorph.data import records
from metamorph.data.dataset import ConversationDataset
from metamorph.data.records import DataError, RecordError
from metamorph.data.sources import index as index_module
from metamorph.data.sources.open import TarSource, open_source
from metamorph.data.sources.tars import read_members


def png(color="red", size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, tar_format=tarfile.GNU_FORMAT):
    """A tar of members by name: bytes, text, or a JSON value."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else None
            data = json.dumps(content).encode() if data is None else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_captions_become_records(tmp_path):
    for shard in range(2):
        members = {}
        for number in range(3):
            members |= {f"{shard}{number}.png": png(), f"{shard}{number}.txt": f" A cat {shard}{number}.\n"}
        write_tar(tmp_path / f"shard-{shard}.tar", members)
    source = open_source(f"{tmp_path}/shard-{{0..1}}.tar")
    assert isinstance(source, TarSource)
    assert len(source) == 6
    assert [record.value for record in source][4] == {"id": "11", "image": "11.png", "caption": "A cat 11."}
    assert source[4].where == f"{tmp_path}/shard-1.tar:11"
    with pytest.raises(IndexError, match="has no sample 6"):
        source[6]


def test_the_json_of_a_sample_comes_first(tmp_path):
    record = llava("own id", "<image> What?", "A cat.")
    members = {
        "a.json": record,
        "a.jpg": b"1",
        "b.source.jpg": b"2",
        "b.target.jpg": b"3",
        "b.edit.txt": "Make it rain.",
        "c.json": llava("c", "Which?", "<image>", image="photos/c.1.jpg"),
        "c.0.jpg": b"4",
        "c.1.jpg": b"5",
        "d.txt": "No picture.",
        "d.json": {"image": None, "id": None},
        "e.mp4": b"6",
    }
    source = open_source(write_tar(tmp_path / "x.tar", members))
    values = [record.value for record in source]
    assert values[0] == {**record, "image": "a.jpg"}
    assert values[1] == {"id": "b", "image": ["b.source.jpg", "b.target.jpg"], "edit": "Make it rain."}
    assert values[2]["image"] == "photos/c.1.jpg"
    assert source.store(2).read("photos/c.1.jpg") == b"5"
    assert values[3] == {"id": "d", "caption": "No picture."}
    assert values[4] == {"id": "e", "video": "e.mp4"}


def test_members_are_found_by_name_or_by_its_end(tmp_path):
    members = {"f/1.jpg": b"a", "f/1.2.jpg": b"b", "f/2.jpg": b"c"}
    store = open_source(write_tar(tmp_path / "x.tar", members)).store(0)
    assert store.names == ["f/1.jpg", "f/1.2.jpg"]
    assert store.read("f/1.jpg") == store.read("elsewhere/1.jpg") == store.read("jpg") == b"a"
    with store.open("2.jpg") as file:  # the end of 1.2.jpg; the other sample's 2.jpg is out of reach
        assert file.read() == b"b"
    assert not store.exists("f/2.jpg/x")
    with pytest.raises(FileNotFoundError, match=r"has no member 'png' in sample 'f/1': f/1.jpg, f/1.2.jpg"):
        store.open("png")


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, tar_format):
    name = "ordner/" + "ä" * 150
    path = write_tar(tmp_path / "x.tar", {f"{name}.txt": "A cat.", "./b.txt": "A dog."}, tar_format)
    source = open_source(path)
    assert [record.value["id"] for record in source] == [name, "./b"]
    assert source[0].value["caption"] == "A cat."


def test_what_is_no_file_is_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("._a.txt", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"cat"))
    source = open_source(path)
    assert [record.value for record in source] == [{"id": "a", "caption": "cat"}]


def test_samples_of_neighbouring_tars_stay_apart(tmp_path):
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", {"0.txt": shard})
    source = open_source(f"{tmp_path}/{{a,b}}.tar")
    assert [record.value["caption"] for record in source] == ["a", "b"]


def test_the_index_of_tars_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("METAMORPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "MIN_CACHED_BYTES", 0)
    path = write_tar(tmp_path / "x.tar", {"0.txt": "a", "1.txt": "b"})
    assert open_source(path)[1].value["caption"] == "b"
    monkeypatch.setattr("metamorph.data.sources.tars.scan_tars", None)
    source = pickle.loads(pickle.dumps(open_source(path)))  # noqa: S301
    assert source[1].value["caption"] == "b"


def test_many_tars_are_open_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_MAX_OPEN_FILES", 3)
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", {f"{number}.txt": f"{shard} {number}" for number in range(2)})
    source = open_source(f"{tmp_path}/{{0..7}}.tar")
    for _ in range(2):
        assert [record.value["caption"] for record in source] == [f"{n // 2} {n % 2}" for n in range(16)]
    assert len(source.index._open) == 3


@pytest.mark.parametrize("damage", ["cut", "text", "compressed", "empty"])
def test_damaged_and_compressed_tars_are_refused(tmp_path, damage):
    path = write_tar(tmp_path / "x.tar", {"0.png": png(), "1.bin": b"x" * 50_000})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20_000])
    elif damage == "text":
        path.write_text("no tar " * 200)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path = tmp_path / "x.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=rf"{path} cannot be read as a tar .*decompress it"):
        open_source(path)
    with pytest.raises(DataError, match="the tars contain no files"):
        open_source(write_tar(tmp_path / "nothing.tar", {}))


def header(name, size=0, kind=tarfile.REGTYPE, tar_format=tarfile.GNU_FORMAT):
    """The header of a member; sizes that `tarfile` would not write take the form of large numbers."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tar_format))
    block[124:136] = (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    return with_checksum(block)


def with_checksum(block):
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def attributes(**values):
    """A pax header that gives the next member these attributes."""
    content = b""
    for name, value in values.items():
        record = f" {name.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(record), len(record) + 9) if len(str(n)) + len(record) == n)
        content += str(length).encode() + record
    return header("pax", len(content), tarfile.XHDTYPE) + content + bytes(-len(content) % 512)


FIRST = header("a.txt", 3) + b"cat".ljust(512, b"\0")
KINDS = {
    "member": tarfile.REGTYPE,
    "pax": tarfile.XHDTYPE,
    "global": tarfile.XGLTYPE,
    "name": tarfile.GNUTYPE_LONGNAME,
    "link": tarfile.GNUTYPE_LONGLINK,
    "sparse": tarfile.GNUTYPE_SPARSE,
}


@pytest.mark.parametrize("size", [-1, -512, -1024, -1536, -(2**80), 2**62, 2**80])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_cannot_be_are_refused(tmp_path, kind, size):
    """A size below 0 leads `tarfile` in circles; a large one of a name or of attributes fills the memory."""
    path = tmp_path / "x.tar"
    path.write_bytes(FIRST + header("b.txt", size, KINDS[kind]) + FIRST + bytes(1024))
    with pytest.raises(DataError, match=r"x.tar cannot be read as a tar \(the member 'b.txt' should have"):
        open_source(path)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (attributes(size="-512"), "has the size b'-512'"),
        (attributes(size="9" * 30), "should have 9+ bytes"),
        (attributes(size="nan"), "has the size b'nan'"),
        (header("pax", 20, tarfile.XHDTYPE) + b"0 a=b\n".ljust(512, b"1"), "attributes of a member are damaged"),
        (header("pax", 20, tarfile.XHDTYPE) + b"99999999 a=b\n".ljust(512), "attributes of a member are damaged"),
        (header("pax", 2000, tarfile.XHDTYPE) + b"9" * 2048, "attributes of a member are damaged"),
        (header("p", 2**21, tarfile.XGLTYPE) + bytes(2**21), "more than 1048576 bytes of attributes"),
        (2049 * header("p", 0, tarfile.XHDTYPE), "more than 1048576 bytes of attributes"),
        (b"\xff" * 512, "bad checksum|invalid header"),
        (header("x", 0, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" * 30, "bad checksum"),
    ],
)
def test_attributes_that_cannot_be_are_refused(tmp_path, before, message):
    path = tmp_path / "x.tar"
    path.write_bytes(FIRST + before + FIRST + bytes(1024))
    with pytest.raises(DataError, match=rf"x.tar cannot be read as a tar \(.*({message})"):
        open_source(path)


def test_members_are_those_of_tarfile(tmp_path):
    """On whole tars of every format, with long names, links, folders, attributes and holes."""
    path = tmp_path / "x.tar"
    sparse = bytearray(header("hole.txt", 512, tarfile.GNUTYPE_SPARSE))
    sparse[482] = 1  # a block follows that tells more of its holes
    sparse[483:495] = b"%011o\0" % 100
    content = FIRST + with_checksum(sparse) + bytes(512) + bytes(512) + FIRST
    content += attributes(path="ä" * 200 + ".txt", mtime="nan") + FIRST + header("g", 0, tarfile.XGLTYPE) + FIRST
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = [f"{'d' * 90}/{n}.txt" for n in (0, 1, 511, 512, 513)]
        names += [] if tar_format == tarfile.USTAR_FORMAT else [f"{'ö' * 90}/{n}.txt" for n in range(3)]
        part = write_tar(tmp_path / "part.tar", {name: "x" * n for n, name in enumerate(names)}, tar_format)
        with tarfile.open(part) as tar:
            end = [member.offset_data + 512 for member in tar][-1]
        content += part.read_bytes()[:end]
    path.write_bytes(content + bytes(1024))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
    assert [(m.name, m.offset_data, m.size) for m in read_members(path)] == expected
    assert len(expected) > 20


def test_text_members_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    source = open_source(write_tar(tmp_path / "x.tar", {"a.txt": "x" * 101, "b.json": "[" * 101, "c.txt": "x" * 100}))
    assert source[2].value["caption"] == "x" * 100
    for index, name in ((0, "a.txt"), (1, "b.json")):
        with pytest.raises(RecordError, match=rf"x.tar:. \({name}\): the record has 101 bytes, more than 100"):
            source[index]


def test_bad_samples_are_errors_of_their_record(tmp_path):
    members = {"a.json": "{", "b.txt": b"\xff", "c.json": "1", "d.1.json": "{}", "d.2.json": "{}"}
    source = open_source(write_tar(tmp_path / "x.tar", members))
    kinds = []
    for index in (0, 1, 3):
        with pytest.raises(RecordError, match=r"x.tar:[abd]") as error:
            source[index]
        kinds.append(error.value.kind)
    assert kinds == ["broken_line", "broken_line", "bad_field"]
    assert source[2].value == 1


def test_r12_images_of_a_tar_train(tmp_path, processor):
    """The original passed the path of a tar's image on as if it were the image."""
    buffer = io.BytesIO()
    golden_image("vqa").save(buffer, "PNG")
    members = {"7.json": llava("vqa", "<image> What?", "A square."), "7.png": buffer.getvalue()}
    members |= {"8.json": llava("gone", "<image> What?", "A square.", image="gone.png")}
    path = write_tar(tmp_path / "x.tar", members)
    dataset = ConversationDataset(path, processor, on_bad_record="skip", max_bad_fraction=0.5)
    example = dataset[0]
    expected = processor.encode_conversation(
        [turn.as_message() for turn in dataset.conversation(0).turns], [golden_image("vqa")]
    )
    assert torch.equal(example["pixel_values"], expected.pixel_values)
    assert dataset[1]["skipped"] == "missing_image"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.tar"]  # nothing is extracted
