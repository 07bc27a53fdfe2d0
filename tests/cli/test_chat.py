"""`metamorph chat`: from a pipe, and on a terminal."""

import base64
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from metamorph.cli.chat import completions
from metamorph.cli.terminal import SHOWN_SIDE, inline_image


COMMAND = [sys.executable, "-m", "metamorph", "chat", "--model", "mini", "--visualizer", "mini", "--steps", "2"]
SIXEL = re.compile(r"#(\d+);2;(\d+);(\d+);(\d+)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (20, 20, 44, 44))
    image.save(tmp_path / "in.png")
    return tmp_path


def environment(folder: Path, **values: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("TERM", "TMUX", "KITTY", "LC_"))}
    return known | {"XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"} | values


@pytest.mark.slow
def test_lines_of_a_pipe_are_a_conversation(folder: Path) -> None:
    """Earlier turns are context, errors are printed and end nothing, and nothing but the answers is on stdout."""
    lines = [
        *("draw a large red circle", "what color is the object?", "/image in.png", "what color is the object?"),
        *("/image none.png", "/foo", "/save", "<image>?", "/save talk.json", "/save in.png"),
        *("/reset", "draw a blue square", "/retry", "/reset", "/save empty.json", "/retry"),
        # A turn that fails leaves its image for the next one, and /retry the last answer.
        *("/image in.png", "hello " * 1100, "what color is the object?", "hello " * 1100, "/retry", "/quit", "never"),
    ]
    done = subprocess.run(
        COMMAND,
        cwd=folder,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env=environment(folder),
        timeout=300,
    )
    assert done.stdout.splitlines() == [
        *("[image: chat/image.png]", "red", "red", "[saved: talk.json]"),
        *("[image: chat/image-2.png]", "[image: chat/image-3.png]", "[saved: empty.json]", "red", "red"),
    ]
    *errors, too_long, again = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "which leaves 0 of 1024 for the answer" in too_long
    assert "which leaves 0 of 1024 for the answer" in again
    assert errors == [
        "error: /image none.png does not exist",
        "error: unknown command /foo (/help lists all; begin with a space to say it)",
        "error: /save needs a file: /save FILE",
        "error: the prompt has 1 <image> markers, but there are 0 image(s)",
        "error: /save in.png: in.png exists; give another name",
        "error: the conversation has no answer yet",
    ]
    assert done.returncode == 1
    turns = json.loads((folder / "talk.json").read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    assert turns[1]["content"] == [{"type": "image", "path": "talk/1.png"}]
    with Image.open(folder / "talk/1.png") as saved, Image.open(folder / "chat/image.png") as drawn:
        assert saved.tobytes() == drawn.tobytes()
        assert drawn.text["prompt"] == "draw a large red circle"
    assert json.loads((folder / "empty.json").read_text())["messages"] == []
    assert [Image.open(folder / f"chat/image-{number}.png").text["seed"] for number in (2, 3)] == ["0", "1"]
    assert not (folder / "state").exists()  # no terminal, no history


class Terminal:
    """The other end of a command's terminal."""

    def __init__(self, words: list[str], folder: Path, **values: str) -> None:
        self.process_id, self.end = pty.fork()
        if self.process_id == 0:
            os.chdir(folder)
            os.execve(words[0], words, environment(folder, **values))
        self.screen = ""

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Read until `text` appears; returns what came before it."""
        until = time.monotonic() + seconds
        while text not in self.screen:
            assert select.select([self.end], [], [], max(until - time.monotonic(), 0))[0], self.screen[-2000:]
            try:
                self.screen += os.read(self.end, 65536).decode(errors="replace")
            except OSError as error:  # the command has ended
                raise AssertionError(f"no {text!r} in {self.screen[-2000:]}") from error
        before, _, self.screen = self.screen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def status(self, key: str = "") -> int:
        """The exit status, once the command has ended; `key`, which ends it, is typed again after ten seconds.

        Python loses a Ctrl-C that comes after readline has written the prompt and before it waits for input.
        """
        self.type(key)
        while True:  # what it still writes must be read
            if key and not select.select([self.end], [], [], 10)[0]:
                self.type(key)
                continue
            try:
                if not os.read(self.end, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])


@pytest.fixture
def terminal(folder: Path) -> Iterator:
    opened: list[Terminal] = []

    def start(*words: str, **values: str) -> Terminal:
        opened.append(Terminal([*COMMAND, *words], folder, **values))
        return opened[-1]

    yield start
    for each in opened:
        try:
            os.kill(each.process_id, signal.SIGKILL)
            os.waitpid(each.process_id, 0)
        except (ProcessLookupError, ChildProcessError):  # it has ended
            pass
        os.close(each.end)


@pytest.mark.slow
def test_images_appear_on_a_terminal_and_lines_are_kept(terminal, folder: Path) -> None:
    first = terminal(TERM="xterm-kitty")
    first.wait_for("> ")
    first.type("draw a large red circle\n")
    first.wait_for("[image: chat/image.png]")
    sequence = first.wait_for("> ")
    data = "".join(re.findall(r"\x1b_G[^;]*;([^\x1b]*)\x1b\\", sequence))
    (folder / "shown.png").write_bytes(base64.b64decode(data))
    with Image.open(folder / "shown.png") as shown, Image.open(folder / "chat" / "image.png") as saved:
        assert shown.size == (256, 256)
        assert shown.getpixel((130, 130)) == saved.getpixel((32, 32))
    assert first.status("\x03") == 130  # at the prompt
    second = terminal(TERM="vt340")
    second.wait_for("\x1b[c")
    second.type("\x1b[?62;4;22c")  # the terminal's answer: it has sixel
    second.wait_for("> ")
    second.type("\x10")  # the line before
    second.wait_for("draw a large red circle")
    second.type("\n")
    second.wait_for("[image: chat/image-2.png]")
    second.wait_for('\x1bPq"1;1;256;256')
    second.wait_for("> ")
    second.type("\x04")
    assert second.status() == 0


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_then_the_chat(terminal) -> None:
    """Words at random, of which there are many before the model ends; then a drawing that takes long."""
    chat = terminal("--temperature", "50", "--no-history", "--num-images", "32", TERM="dumb")
    chat.wait_for("> ")
    chat.type("hello\n")
    chat.wait_for("hello\r\n")
    while not chat.screen:
        chat.screen += os.read(chat.end, 1).decode(errors="replace")
    chat.type("\x03")
    chat.wait_for("[stopped]")
    chat.wait_for("> ")
    chat.type("/reset\ndraw a red circle\n")
    chat.wait_for("draw a red circle\r\n")
    time.sleep(0.5)
    chat.type("\x03")
    time.sleep(0.5)
    chat.type("\x03")
    chat.wait_for("interrupted")
    assert chat.status() == 130


@pytest.mark.slow
def test_tab_completes_commands_and_files(terminal, folder: Path) -> None:
    """Names with spaces, too; in words for the model there is nothing to complete."""
    (folder / "my images").mkdir()
    (folder / "in.png").rename(folder / "my images" / "red one.png")
    chat = terminal(TERM="dumb")
    chat.wait_for("> ")
    for typed, completed in (("/im", "age "), ("my i", "mages/"), ("red o", "ne.png")):
        chat.type(f"{typed}\t")
        chat.wait_for(typed + completed)
    chat.type("\n")
    chat.wait_for("> ")
    chat.type("what color is the object, m\t?\n")
    chat.wait_for("?\r\nred\r\n")
    chat.type("/q\t\n")
    assert chat.status() == 0


def test_completions_are_commands_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "ab.png", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.png").touch()
    for line, word, found in (
        ("/re", "re", ["retry", "reset"]),
        ("/s", "s", ["save "]),
        ("/image ", "", ["a.png", "ab.png", "deep/"]),
        ("/image a", "a", ["a.png", "ab.png"]),
        ("/image .", ".", [".hidden"]),
        ("/video deep/", "", ["c.png"]),
        (f"/save {tmp_path}/d", "d", ["deep/"]),
        *(("/help a", "a", []), ("/none a", "a", []), ("a", "a", []), ("say a", "a", [])),
    ):
        assert completions(line, word) == found


def decode_sixel(text: str) -> Image.Image:
    """The image of a sixel sequence, by the rules of the VT340."""
    width, height = map(int, re.match(r'\x1bPq"1;1;(\d+);(\d+)', text).groups())
    colours = {int(number): tuple(round(int(v) * 2.55) for v in rgb) for number, *rgb in SIXEL.findall(text)}
    image, body = (
        Image.new("RGB", (width, height)),
        SIXEL.sub("", text).removesuffix("\x1b\\").split(f";{height}", 1)[1],
    )
    for band, lines in enumerate(body.split("-")):
        for line in lines.split("$"):
            number, codes = re.fullmatch(r"#(\d+)(.*)", line).groups()
            x = 0
            for count, code in re.findall(r"(?:!(\d+))?([?-~])", codes):
                for _ in range(int(count or 1)):
                    for bit in range(6):
                        if (ord(code) - 63) >> bit & 1:
                            image.putpixel((x, 6 * band + bit), colours[int(number)])
                    x += 1
            assert x == width
    return image


def test_sixels_are_the_image() -> None:
    image = Image.linear_gradient("L").resize((300, 290)).convert("RGB")
    image.paste("red", (100, 50, 200, 100))
    decoded = decode_sixel(inline_image(image, "sixel"))
    assert decoded.size == (300, 290)
    for place in ((150, 75), (10, 10), (299, 289), (0, 145)):
        assert decoded.getpixel(place) == pytest.approx(image.getpixel(place), abs=4)


def test_large_images_are_shown_smaller() -> None:
    sequence = inline_image(Image.effect_noise((2000, 1000), 50).convert("RGB"), "iterm2")
    size, data = re.fullmatch(r"\x1b]1337;File=inline=1;size=(\d+):([^\a]*)\a", sequence).groups()
    content = base64.b64decode(data)
    assert (len(content), int.from_bytes(content[16:20], "big")) == (int(size), SHOWN_SIDE)
    chunks = re.findall(r"\x1b_G(.*?);(.*?)\x1b\\", inline_image(Image.effect_noise((300, 300), 50), "kitty"))
    assert [keys for keys, _ in chunks] == ["a=T,f=100,q=2,m=1", *["m=1"] * (len(chunks) - 2), "m=0"]
    assert max(len(data) for _, data in chunks) == 4096
