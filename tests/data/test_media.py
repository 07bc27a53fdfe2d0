"""Images on disk: whatever is legal is read as it is meant, and whatever is broken is named."""

import io

import numpy as np
import PIL
import pytest
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from metamorph.data.media.stores import FolderStore, load_all, resolve_image_path
from metamorph.data.records import IMAGE_SUFFIXES
from metamorph.data.tasks import Box, ImageRef
from metamorph.models.image_files import FORMATS, MediaError, load_image, read_size
from metamorph.models.image_processing import preprocess_images


def corner(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((0, 0))


COLOUR = (200, 30, 60)
GREY = (100, 100, 100)
WHITE = (255, 255, 255)
SIZE = (24, 16)


def plain(mode: str = "RGB", colour: object = COLOUR) -> Image.Image:
    return Image.new(mode, SIZE, colour)


def grey(value: float, kind: type) -> Image.Image:
    return Image.fromarray(np.full(SIZE[::-1], value, dtype=kind))


def frames(**options: object) -> dict[str, object]:
    return {"save_all": True, "append_images": [plain(colour="blue"), plain(colour="lime")], **options}


READ = {
    "rgb.jpg": (plain(), {}, COLOUR),
    "cmyk.jpg": (plain().convert("CMYK"), {}, COLOUR),
    "cmyk.tif": (plain().convert("CMYK"), {}, COLOUR),
    "grey.jpg": (plain("L", 100), {}, GREY),
    "grey.png": (plain("L", 100), {}, GREY),
    "grey-alpha.png": (plain("LA", (100, 0)), {}, WHITE),
    "grey-transparent.png": (plain("L", 100), {"transparency": 100}, WHITE),
    "bits.png": (plain("1", 1), {}, WHITE),
    "fax.tif": (plain("1", 1), {"compression": "group4"}, WHITE),
    "palette.png": (plain().quantize(4), {}, COLOUR),
    "palette-transparent.png": (plain().quantize(4), {"transparency": 0}, WHITE),
    "palette-transparent.gif": (plain().quantize(4), {"transparency": 0}, WHITE),
    "alpha.png": (plain("RGBA", (*COLOUR, 0)), {}, WHITE),
    "alpha.webp": (plain("RGBA", (*COLOUR, 0)), {"lossless": True}, WHITE),
    "alpha.tif": (plain("RGBA", (*COLOUR, 0)), {}, WHITE),
    "alpha.jp2": (plain("RGBA", (*COLOUR, 0)), {}, WHITE),
    "rgb-transparent.png": (plain(), {"transparency": COLOUR}, WHITE),
    "deep.png": (grey(257 * 100, np.uint16), {}, GREY),
    "deep.tif": (grey(257 * 100, np.uint16), {}, GREY),
    "deep.pgm": (grey(257 * 100, np.uint16), {}, GREY),
    "whole.tif": (grey(100, np.int32), {}, GREY),
    "shares.tif": (grey(100 / 255, np.float32), {}, GREY),
    "float.tif": (grey(100, np.float32), {}, GREY),
    "nan.tif": (grey(np.nan, np.float32), {}, (0, 0, 0)),
    "float.pfm": (grey(100 / 255, np.float32), {}, GREY),
    "moving.gif": (plain(), frames(), COLOUR),
    "moving.png": (plain(), frames(), COLOUR),
    "moving.webp": (plain(), frames(lossless=True), COLOUR),
    "two-cameras.mpo": (plain(), frames(), COLOUR),
    "two-cameras.jpg": (plain(), frames(format="MPO"), COLOUR),
    "a.bmp": (plain(), {}, COLOUR),
    "a.ppm": (plain(), {}, COLOUR),
    "a.jp2": (plain(), {}, COLOUR),
    "a.avif": (plain(), {}, COLOUR),
    "moving.avif": (plain(), frames(), COLOUR),
    "odd-exif.jpg": (plain(), {"exif": b"Exif\0\0nothing"}, COLOUR),
    "odd-exif.png": (plain(), {"exif": b"Exif\0\0nothing"}, COLOUR),
    "odd-exif.webp": (plain(), {"exif": b"Exif\0\0nothing", "lossless": True}, COLOUR),
}
if int(PIL.__version__.partition(".")[0]) >= 13:  # 12.3 does not read what it writes
    READ["ycbcr.tif"] = (plain().convert("YCbCr"), {}, COLOUR)
"""Images that people have: what is saved, how, and the colour that is read."""


@pytest.mark.parametrize("name", READ)
def test_images_that_people_have_are_read(name, tmp_path):
    image, options, colour = READ[name]
    if name.endswith(".avif") and "AVIF" not in FORMATS:
        pytest.skip("this Pillow is built without AVIF")
    image.save(tmp_path / name, **options)
    found = load_image(tmp_path / name)
    assert (found.mode, found.size) == ("RGB", SIZE)
    assert np.abs(np.subtract(corner(found), colour)).max() <= 3  # JPEG rounds
    assert read_size(tmp_path / name) == SIZE
    assert name.endswith(IMAGE_SUFFIXES)  # so tars take it for an image


def heic() -> bytes:
    return b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


REFUSED = {
    "photo.heic": (heic(), "it is a HEIC photograph, for which Pillow has no decoder.*; convert it to JPEG"),
    "photo.jpg": (heic(), "it is a HEIC photograph"),
    "drawing.svg": (
        b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "it is an SVG drawing.*; render it",
    ),
    "a.jxl": (b"\xff\x0a" + bytes(64), "it is a JPEG XL image.*; convert it"),
    "404.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "it is a web page.*; download it again"),
    "empty.png": (b"", "it is empty.*; download it again"),
    "lfs.png": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "it is a pointer of Git LFS.*; run git lfs pull",
    ),
    "clip.jpg": (b"\0\0\0\x20ftypisom" + bytes(64), "it is a video.*video"),
    "page.pdf": (b"%PDF-1.7\n", "it is a PDF document"),
    "text.png": (b"not a picture", "its content is not an image.*; replace it"),
    "head.png": (b"\x89PNG\r\n\x1a\n" + bytes(8), "its PNG header is damaged.*; replace it"),
    "icon.ico": ({}, "the format ICO is not supported.*; save it as PNG or JPEG"),
    "a.tga": ({}, "the format TGA or CUR is not supported"),
    "a.eps": (
        {},
        "the format EPS is not supported",
    ),  # Pillow hands it to Ghostscript: not for files from untrusted sources
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_that_is_read_is_refused_with_its_reason(name, tmp_path):
    content, reason = REFUSED[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        plain().save(tmp_path / name, **content)
    for file in (tmp_path / name, io.BytesIO((tmp_path / name).read_bytes())):  # from a folder, and from a tar
        for read in (load_image, read_size):
            with pytest.raises(MediaError, match=rf"{name} cannot be read as an image \({reason}") as error:
                read(file, name=name)
            assert error.value.kind == "unreadable_image"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.bmp", "a.jp2", "a.avif"])
def test_images_that_are_cut_off_are_refused(name, tmp_path):
    if name.endswith(".avif") and "AVIF" not in FORMATS:
        pytest.skip("this Pillow is built without AVIF")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1500])
    with pytest.raises(MediaError, match=rf"{name} cannot be read as an image \(.*; replace it") as error:
        load_image(tmp_path / name)
    assert error.value.kind == "unreadable_image"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_exif_rotation_is_applied(tmp_path, suffix):
    if suffix == "avif" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow is built without AVIF")
    name = f"turned.{suffix}"
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(tmp_path / name, exif=exif, quality=100)
    upright = load_image(tmp_path / name)
    assert upright.size == read_size(tmp_path / name) == (20, 40)
    assert max(corner(upright)) < 5 < 250 < min(upright.getpixel((0, 39)))


def test_an_open_file_is_read_and_stays_open(tmp_path):
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file:
        assert corner(load_image(file)) == (0, 0, 255)
        assert not file.closed
    with pytest.raises(MediaError, match=r"^b/a.png cannot be read"):
        load_image(io.BytesIO(b"nothing"), name="b/a.png")


def test_the_aspect_ratio_is_stretched_or_padded_with_the_mean_colour():
    wide = Image.new("RGB", (80, 40), "white")
    processor = SiglipImageProcessorPil(size={"height": 40, "width": 40}, image_mean=[0.2] * 3, image_std=[0.5] * 3)
    square, padded = (preprocess_images([wide], processor, ratio)[0, 0] for ratio in ("square", "pad"))
    white = square.max()
    assert (square == white).all()
    assert (padded[13:27] == white).all()
    for border in (padded[:8], padded[-8:]):
        assert border.abs().max() < 1e-6  # the mean colour is 0 when it is normalised


def test_large_images_are_refused_before_they_are_unpacked(tmp_path):
    Image.new("1", (3000, 2000)).save(tmp_path / "bomb.png")
    with pytest.raises(MediaError, match="3000x2000 pixels, more than the limit of 5000000") as error:
        load_image(tmp_path / "bomb.png", max_pixels=5_000_000)
    assert error.value.kind == "image_too_large"


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(MediaError, match=r"no image file .*none.png; is the image folder right") as error:
        load_image(tmp_path / "none.png")
    assert error.value.kind == "missing_image"
    with pytest.raises(MediaError, match="cannot be read as an image") as error:
        load_image(tmp_path)
    assert error.value.kind == "unreadable_image"


def test_relative_paths_stay_in_the_image_folder(tmp_path):
    assert resolve_image_path("a/../b.png", tmp_path) == tmp_path / "b.png"
    assert resolve_image_path("..a/b.png", tmp_path) == tmp_path / "..a" / "b.png"
    assert str(resolve_image_path("/data/b.png", tmp_path)) == "/data/b.png"
    for path in ("../b.png", "a/../../b.png", ".."):
        with pytest.raises(MediaError, match="leaves the image folder") as error:
            resolve_image_path(path, tmp_path)
        assert error.value.kind == "outside_folder"


# Images from references


class MemoryStore:
    """Files in memory, as tars give them; remembers what was opened."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.opened: list[tuple[str, io.BytesIO]] = []

    def open(self, path: str) -> io.BytesIO:
        if path not in self.files:
            raise FileNotFoundError(path)
        file = io.BytesIO(self.files[path])
        self.opened.append((path, file))
        return file

    def exists(self, path: str) -> bool:
        return path in self.files


def quarters() -> Image.Image:
    """200x100 pixels; each quarter has a colour of its own."""
    image = Image.new("RGB", (200, 100), "red")
    for place, colour in (((100, 0), "lime"), ((0, 50), "blue"), ((100, 50), "white")):
        image.paste(colour, (*place, place[0] + 100, place[1] + 50))
    return image


@pytest.fixture
def store(tmp_path) -> FolderStore:
    quarters().save(tmp_path / "a.png")
    return FolderStore(tmp_path)


@pytest.mark.parametrize("box", [Box(100, 50, 200, 100), Box(0.5, 0.5, 1, 1, relative=True), Box(150.6, 60, 999, 999)])
def test_crops_are_in_pixels_of_the_image(store, box):
    crop = load_all([ImageRef("a.png", crop=box)], store)[0]
    assert crop.getcolors() == [(crop.width * crop.height, (255, 255, 255))]
    assert crop.size == ((50, 40) if box.right == 999 else (100, 50))


def test_crops_of_turned_photographs_are_in_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    quarters().save(tmp_path / "turned.png", exif=exif)
    store = FolderStore(tmp_path)
    assert load_all([ImageRef("turned.png")], store)[0].size == (100, 200)
    assert corner(load_all([ImageRef("turned.png", crop=Box(0, 0, 50, 100))], store)[0]) == (0, 0, 255)


@pytest.mark.parametrize("box", [Box(200, 0, 210, 10), Box(-20, 0, 0, 10), Box(2, 2, 3, 3, relative=True)])
def test_a_box_outside_the_image_is_named(store, box):
    for ref in (ImageRef("a.png", crop=box), ImageRef("a.png", boxes=(("cat", box),))):
        with pytest.raises(MediaError, match="outside the image of 200x100 pixels") as error:
            load_all([ref], store)
        assert error.value.kind == "bad_box"


def test_boxes_are_drawn_with_their_names_and_only_where_they_are_asked_for(store):
    boxes = (("cat", Box(110, 60, 150, 90)), ("", Box(10, 10, 60, 40)))
    plain, marked = load_all([ImageRef("a.png"), ImageRef("a.png", boxes=boxes)], store)
    assert plain.tobytes() == quarters().tobytes()
    assert (marked.getpixel((110, 75)), marked.getpixel((149, 89))) == ((255, 0, 0), (255, 0, 0))
    assert marked.getpixel((10, 25)) == (0, 255, 0)
    assert marked.getpixel((130, 75)) == (255, 255, 255)  # inside, the image is left as it is
    changed = np.any(np.asarray(marked) != np.asarray(plain), axis=-1)
    assert changed[48:60, 110:140].any()  # the name, above its box
    assert not changed[:, 160:].any()


def test_each_file_is_opened_once_and_closed():
    buffer = io.BytesIO()
    quarters().save(buffer, "png")
    store = MemoryStore({"a.png": buffer.getvalue()})
    refs = [ImageRef("a.png"), ImageRef("a.png", crop=Box(0, 0, 10, 10)), ImageRef("a.png")]
    assert [image.size for image in load_all(refs, store)] == [(200, 100), (10, 10), (200, 100)]
    assert [path for path, _ in store.opened] == ["a.png"]
    assert all(file.closed for _, file in store.opened)


def test_missing_files_of_a_store_are_named(store):
    for where in (store, MemoryStore({})):
        for ref, kind in ((ImageRef("b.png"), "missing_image"), (ImageRef("b.mp4", time=0.0), "missing_video")):
            with pytest.raises(MediaError, match=r"b\.") as error:
                load_all([ref], where)
            assert error.value.kind == kind


def test_a_folder_knows_its_files_and_keeps_paths_inside(store):
    assert store.exists("a.png")
    assert not store.exists("b.png")
    assert not store.exists(".")
    assert not store.exists("a" * 300 + ".png")
    for path in ("data:image/png;base64,iVBORw0KGgo", "a/" * 3000, "a\0.png"):
        with pytest.raises(MediaError, match=rf"\({len(path)} characters\) is not the path of a file") as error:
            store.exists(path)
        assert error.value.kind == "missing_image"
    for path in ("../a.png", "x/../../a.png"):
        for use in (store.open, store.exists):
            with pytest.raises(MediaError) as error:
                use(path)
            assert error.value.kind == "outside_folder"
