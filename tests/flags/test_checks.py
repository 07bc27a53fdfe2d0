"""A model that does not exist is an error within seconds, with and without a network."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest


class Missing(BaseHTTPRequestHandler):
    """A Hub without any model."""

    def do_HEAD(self) -> None:
        self.send_error(404)

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
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_model_that_the_hub_does_not_have(empty_hub):
    result = run(empty_hub, "generate", "--model", "nowhere", "--prompt", "hi")
    assert result.returncode == 2
    assert "--model nowhere is not a local folder, and the Hub has no config.json of that name" in result.stderr


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--vision_tower"])
def test_no_network(flag, tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    names = {"--model_name_or_path": str(tmp_path), "--vision_tower": str(tmp_path), flag: "owner/nowhere"}
    flags = [word for pair in names.items() for word in pair]
    flags += ["--tune_mm_mlp_adapter", "True", "--data_path", str(tmp_path / "data.jsonl")]
    result = run("http://127.0.0.1:9", "train", *flags, "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 2
    assert f"{flag} owner/nowhere is not a local folder, and the Hub cannot be reached" in result.stderr


def test_visualizer_without_network(tmp_path):
    flags = ["--pretrained_model_name_or_path", "owner/nowhere", "--vision_tower", str(tmp_path)]
    flags += ["--output_dir", str(tmp_path / "out")]
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    result = run("http://127.0.0.1:9", "train-visualizer", *flags, "--image_folder", str(tmp_path))
    assert result.returncode == 2
    assert "--pretrained_model_name_or_path owner/nowhere is not a local folder, and the Hub" in result.stderr
