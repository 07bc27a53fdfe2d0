"""Pictures on disk: whatever is legal is read as it is meant, and whatever is broken is named."""

import numpy as np
import pytest
from PIL import Image

from metamorph.data.media import MediaError, load_image, resolve_image_path


def corner(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("name", "mode"),
    [("grey.png", "L"), ("palette.png", "P"), ("palette.gif", "P"), ("bits.png", "1"), ("print.jpg", "CMYK")],
)
def test_every_mode_becomes_rgb(tmp_path, name, mode):
    Image.new("RGB", (8, 6), "white").convert(mode).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert (image.mode, image.size, corner(image)) == ("RGB", (8, 6), (255, 255, 255))


def test_16_bit_png(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert corner(load_image(tmp_path / "deep.png")) == (100, 100, 100)


def test_transparent_png(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert corner(load_image(tmp_path / "clear.png")) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert (corner(upright), upright.getpixel((0, 39))) == ((0, 0, 0), (255, 255, 255))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert corner(load_image(tmp_path / "moving.gif")) == (255, 0, 0)


def test_large_images_are_refused_before_they_are_unpacked(tmp_path):
    Image.new("1", (3000, 2000)).save(tmp_path / "bomb.png")
    with pytest.raises(MediaError, match="3000x2000 pixels, more than the limit of 5000000") as error:
        load_image(tmp_path / "bomb.png", max_pixels=5_000_000)
    assert error.value.kind == "image_too_large"


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(MediaError, match=r"no image file .*none.png; is --image_folder right") as error:
        load_image(tmp_path / "none.png")
    assert error.value.kind == "missing_image"
    (tmp_path / "text.png").write_text("not a picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    for name in ("text.png", "half.jpg", "."):
        with pytest.raises(MediaError, match="cannot be read as an image") as error:
            load_image(tmp_path / name)
        assert error.value.kind == "unreadable_image"


def test_relative_paths_stay_in_the_image_folder(tmp_path):
    assert resolve_image_path("a/../b.png", tmp_path) == tmp_path / "b.png"
    assert resolve_image_path("..a/b.png", tmp_path) == tmp_path / "..a" / "b.png"
    assert str(resolve_image_path("/data/b.png", tmp_path)) == "/data/b.png"
    for path in ("../b.png", "a/../../b.png", ".."):
        with pytest.raises(MediaError, match="leaves --image_folder") as error:
            resolve_image_path(path, tmp_path)
        assert error.value.kind == "outside_folder"
