"""A model that does not exist is an error within seconds, with and without a network."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest


class Missing(BaseHTTPRequestHandler):
    """A Hub without any public model."""

    ANSWERS = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "broken": (503, "")}
    """Name of a model -> status and error code."""

    def do_HEAD(self) -> None:
        status, code = self.ANSWERS.get(self.path.split("/")[2], (404, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def empty_hub():
    server = HTTPServer(("127.0.0.1", 0), Missing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(endpoint: str, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    # The downloads of Transformers would retry for minutes: that they are not reached is what the limit shows.
    command = [sys.executable, "-m", "metamorph", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_model_that_the_hub_does_not_have(empty_hub):
    result = run(empty_hub, "generate", "--model", "nowhere", "--prompt", "hi")
    assert result.returncode == 2
    assert "--model nowhere is not a local folder, and the Hub has no config.json of that name" in result.stderr


def test_answers_of_the_hub_are_one_line_with_the_fix(empty_hub):
    """The one check of all commands, in a process that knows this Hub from its start."""
    script = (
        "from metamorph.flags.checks import check_reachable\n"
        f"for name in {list(Missing.ANSWERS)}:\n"
        "    try:\n        check_reachable(f'owner/{name}', '--model')\n"
        "    except FileNotFoundError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": empty_hub, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    gated, private, broken = done.stdout.splitlines()
    assert gated.startswith(
        "--model owner/gated is gated on the Hub: accept its licence at https://huggingface.co/owner/"
    )
    assert "hf auth login" in gated
    assert private.startswith("--model owner/private is not a local folder, and there is no such model on the Hub")
    assert "hf auth login" in private
    assert broken == "--model owner/broken is not a local folder, and the Hub answers with status 503: try again later"


TRAIN = ["train", "--tune_mm_mlp_adapter", "True", "--data_path", "data.jsonl"]
VISUALIZER = ["train-visualizer", "--image_folder", "."]


@pytest.mark.parametrize(
    ("words", "flag", "other"),
    [
        (TRAIN, "--model_name_or_path", "--vision_tower"),
        (TRAIN, "--vision_tower", "--model_name_or_path"),
        (VISUALIZER, "--pretrained_model_name_or_path", "--vision_tower"),
    ],
)
def test_no_network(words, flag, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    kind = "llama" if other == "--model_name_or_path" else "siglip_vision_model"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    result = run("http://127.0.0.1:9", *words, flag, "owner/nowhere", other, str(tmp_path), "--output_dir", "out")
    assert result.returncode == 2
    assert f"{flag} owner/nowhere is not a local folder, and the Hub cannot be reached" in result.stderr
