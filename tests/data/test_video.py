"""Videos: the right frame at the right time in the right colours, whatever the container, codec and frame rate."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from video_parts import av, colour, index_of, write_video

from metamorph.data.media import video
from metamorph.data.media.stores import FolderStore, load_all, probe
from metamorph.data.media.video import probe_video, read_frames
from metamorph.data.tasks import Box, ImageRef
from metamorph.flags.extras import install_command
from metamorph.models.image_files import MediaError, load_image


TENTHS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("name", "codec", "settings"),
    [
        ("a.mp4", "libx264", {}),
        ("keys.mp4", "libx264", {"keyframe_every": 3}),
        ("a.mkv", "libx264", {}),
        ("a.mov", "png", {"pix_fmt": "rgb24"}),
        ("a.avi", "mpeg4", {}),
        ("all_keys.avi", "mjpeg", {"pix_fmt": "yuvj420p"}),
        ("a.webm", "libvpx-vp9", {"keyframe_every": 2}),
        ("late.ts", "libx264", {"keyframe_every": 2}),  # its clock does not start at 0
    ],
)
def test_every_frame_is_found_by_its_time(tmp_path, name, codec, settings):
    path = write_video(tmp_path / name, TENTHS, codec=codec, **settings)
    info = probe_video(path)
    assert info.times == pytest.approx(TENTHS)
    assert info.num_frames == 7
    assert [index_of(frame) for frame in read_frames(path, info.times)] == [0, 1, 2, 3, 4, 5, 6]
    with path.open("rb") as file:  # as tar members come; in any order, also twice, between frames, and past the end
        assert [index_of(frame) for frame in read_frames(file, [0.6, 0.0, 0.35, 0.1, 0.35, 9.0])] == [6, 0, 3, 1, 3, 6]
        assert probe_video(file) == info


def test_r39_colours_are_right(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0.0, 0.1])
    for index, frame in enumerate(read_frames(path, [0.0, 0.1])):
        assert frame.mode == "RGB"
        assert np.abs(np.subtract(frame.getpixel((30, 20)), colour(index))).max() <= 4


@pytest.mark.parametrize(
    ("named", "size"),
    [pytest.param(True, (64, 48), id="named BT.709"), pytest.param(False, (1280, 720), id="unnamed high definition")],
)
def test_colours_of_high_definition(tmp_path, named, size):
    red, kr, kb = (200, 30, 30), 0.2126, 0.0722
    r, g, b = (value / 255 for value in red)
    y = kr * r + (1 - kr - kb) * g + kb * b
    planes = [round(16 + 219 * y), round(128 + 112 * (b - y) / (1 - kb)), round(128 + 112 * (r - y) / (1 - kr))]
    width, height = size
    sizes = (width * height, width * height // 4, width * height // 4)
    flat = np.concatenate([np.full(count, value, np.uint8) for value, count in zip(planes, sizes, strict=True)])
    with av.open(str(tmp_path / "hd.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        frame = av.VideoFrame.from_ndarray(flat.reshape(height * 3 // 2, width), format="yuv420p")
        if named:
            stream.codec_context.colorspace = frame.colorspace = 1
        container.mux([*stream.encode(frame), *stream.encode()])
    (image,) = read_frames(tmp_path / "hd.mp4", [0.0])
    assert np.abs(np.subtract(image.getpixel((20, 20)), red)).max() <= 4


def test_frames_stand_upright(tmp_path):
    path = tmp_path / "turned.mp4"
    stored = Image.new("RGB", (64, 48), "black")
    stored.paste("white", (32, 0, 64, 48))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        (stream.width, stream.height), stream.pix_fmt = stored.size, "yuv420p"
        stream.set_display_rotation(90)  # counterclockwise: what is stored on the right belongs at the top
        container.mux([*stream.encode(av.VideoFrame.from_image(stored)), *stream.encode()])
    (image,) = read_frames(path, [0.0])
    assert image.size == (48, 64)
    assert image.getpixel((24, 5))[0] > 200 > 50 > image.getpixel((24, 60))[0]


def test_a_file_that_changes_is_read_again(tmp_path):
    assert probe_video(write_video(tmp_path / "a.mp4", TENTHS)).num_frames == 7
    assert probe_video(write_video(tmp_path / "a.mp4", TENTHS[:3])).num_frames == 3


def test_variable_frame_rate(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0.0, 0.5, 0.6, 3.0])
    info = probe_video(path)
    assert info.times == pytest.approx([0.0, 0.5, 0.6, 3.0])
    assert info.duration >= 3.0
    assert [index_of(frame) for frame in read_frames(path, [0.4, 0.5, 0.59, 0.61, 2.9, 3.0])] == [0, 1, 1, 2, 2, 3]


def test_r39_less_than_one_frame_a_second(tmp_path):
    path = write_video(tmp_path / "a.webm", [0.0, 3.0, 6.0], codec="libvpx", last=3.0)
    info = probe_video(path)
    assert info.times == pytest.approx([0.0, 3.0, 6.0])
    assert 0 < info.num_frames / info.duration < 1
    assert [index_of(frame) for frame in read_frames(path, [0.0, 1.0, 2.0, 3.0, 4.0])] == [0, 0, 0, 1, 1]


def test_one_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0.0])
    info = probe_video(path)
    assert info.times == (0.0,)
    assert [index_of(frame) for frame in read_frames(path, [0.0, 0.0, 5.0])] == [0, 0, 0]


def test_frames_far_apart_are_the_same_as_when_all_are_decoded(tmp_path):
    path = write_video(tmp_path / "a.mp4", [index / 10 for index in range(40)], keyframe_every=5)
    times = probe_video(path).times
    whole = read_frames(path, times)
    for index in (0, 4, 5, 17, 39):
        (alone,) = read_frames(path, [times[index]])
        assert np.array_equal(np.asarray(alone), np.asarray(whole[index]))


def test_what_is_no_video_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"no video file .*none.mp4; is the image folder right") as error:
        probe_video(tmp_path / "none.mp4")
    assert error.value.kind == "missing_video"
    (tmp_path / "text.mp4").write_text("not a video")
    whole = write_video(tmp_path / "whole.mp4", TENTHS).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("text.mp4", "half.mp4", "."):
        for read in (probe_video, lambda path: read_frames(path, [0.0])):
            with pytest.raises(MediaError, match="cannot be read as a video") as error:
                read(tmp_path / name)
            assert error.value.kind == "unreadable_video"


def test_damaged_frames_are_named_not_guessed(tmp_path):
    data = bytearray(write_video(tmp_path / "a.avi", TENTHS, codec="png", pix_fmt="rgb24").read_bytes())
    start = 0
    while (start := data.find(b"IDAT", start)) >= 0:
        data[start + 4 : start + 20] = bytes(16)
        start += 20
    (tmp_path / "a.avi").write_bytes(data)
    with pytest.raises(MediaError) as error:
        read_frames(tmp_path / "a.avi", [0.3])
    assert error.value.kind == "unreadable_video"


PLAYLISTS = {
    "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{victim}\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile {victim}\n",
    "letter.txt": "Dear Sir,\n" * 20,  # FFmpeg draws it
    "letter.ans": "Dear Sir,\n" * 20,
}


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("is_open", [False, True])
def test_what_only_names_or_describes_frames_is_no_video(tmp_path, monkeypatch, name, is_open):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "victim.ts", TENTHS)
    text = PLAYLISTS[name].format(victim="victim.ts")
    (tmp_path / name).write_text(text)
    with pytest.raises(MediaError, match="cannot be read as a video") as error:
        probe_video(io.BytesIO(text.encode()) if is_open else tmp_path / name, name=name)
    assert error.value.kind == "unreadable_video"


def test_codecs_that_are_not_listed_are_refused(tmp_path):
    path = write_video(tmp_path / "a.avi", TENTHS, codec="cinepak", pix_fmt="rgb24")
    with pytest.raises(MediaError, match="has no video stream that can be decoded"):
        probe_video(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    for name, read in (("a.mp4", probe_video), ("a.png", load_image)):
        os.mkfifo(tmp_path / name)
        with pytest.raises(MediaError, match=rf"{name} cannot be read as .* \(it is not a regular file\)"):
            read(tmp_path / name)


def test_images_of_a_conversation_come_in_order(tmp_path):
    write_video(tmp_path / "a.mp4", TENTHS)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "b.png")
    store = FolderStore(tmp_path)
    info = probe("a.mp4", store)
    refs = [ImageRef("a.mp4", time=info.times[4]), ImageRef("b.png"), ImageRef("a.mp4", time=info.times[1])]
    later, image, earlier = load_all(refs, store)
    assert [index_of(later), index_of(earlier), image.size] == [4, 1, (8, 8)]
    part = load_all([ImageRef("a.mp4", time=0.0, crop=Box(0, 0, 10, 20))], store)[0]
    assert part.size == (10, 20)


def test_large_frames_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_IMAGE_PIXELS", 3000)
    path = write_video(tmp_path / "a.mp4", [0.0])
    with pytest.raises(MediaError, match="64x48 pixels, more than the limit of 3000") as error:
        probe_video(path)
    assert error.value.kind == "image_too_large"


@pytest.mark.parametrize("suffix", ["avi", "mkv"])
def test_the_limit_of_pixels_holds_for_every_frame(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, size in enumerate([(64, 48), (64, 48), (640, 480)]):
            content = io.BytesIO()
            Image.new("RGB", size, colour(number)).save(content, "JPEG")
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            container.mux(packet)
    times = probe_video(path).times
    assert [image.size for image in read_frames(path, times)] == [(64, 48), (64, 48), (640, 480)]
    monkeypatch.setattr(video, "MAX_IMAGE_PIXELS", 5000)
    assert len(read_frames(path, times[:1])) == 1
    with pytest.raises(MediaError, match="or a frame has more than 5000 pixels") as error:
        read_frames(path, times)
    assert error.value.kind == "unreadable_video"


def test_r29_pyav_is_needed_for_videos_only():
    code = (
        "import sys; sys.modules['av'] = None\n"
        "import metamorph.data.media.stores, metamorph.data.tasks\n"
        "from metamorph.data.media.video import probe_video\n"
        "try: probe_video('a.mp4')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert install_command("video") in run.stdout
