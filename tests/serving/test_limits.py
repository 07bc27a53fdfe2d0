"""Clients that ask too much, are slow, leave or have no key: the right status, and the others are served."""

import asyncio
import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from PIL import Image
from serving_parts import data_url, error_of, file_of, image_of, served

import metamorph
from metamorph.inference import Session
from metamorph.mini import shipped_folder
from metamorph.serving.app import create_app
from metamorph.serving.engine import Engine
from metamorph.serving.errors import ApiError
from metamorph.serving.limits import Limits
from metamorph.serving.remote_images import fetch_image


CHAT, DRAW = "/v1/chat/completions", "/v1/images/generations"
KEY = {"Authorization": "Bearer secret"}
LIMITS = Limits(max_body_mb=0.1, client_timeout=1.0)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """Its answers end at their limit only."""
    found = metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)
    found.model.generation_config.suppress_tokens = found.processor.end_of_turn_token_ids
    return found


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    options = {"cors_origins": ["https://page.example.org"], "api_key": "secret", "allowed_hosts": {"127.0.0.1", "a"}}
    with served(session, LIMITS, engine={"max_batch_size": 1, "max_queue": 2}, **options) as address:
        yield address


def chat(max_tokens: int = 1, **fields: object) -> dict:
    messages = [{"role": "user", "content": "hello"}]
    return {"messages": messages, "max_tokens": max_tokens, "modalities": ["text"], **fields}


def wait_until_free(url: str) -> None:
    """Until no answer runs or waits."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        text = httpx.get(f"{url}/metrics", headers=KEY).text
        if "metamorph_running 0.0" in text and "metamorph_queue_length 0.0" in text:
            return
        time.sleep(0.05)
    raise AssertionError("an answer still runs")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic !"}, 401),
        (KEY, 200),
        ({"Authorization": "Basic dXNlcjpzZWNyZXQ="}, 200),
    ],
)
def test_all_but_health_needs_the_key(url: str, headers: dict, status: int) -> None:
    answer = httpx.get(f"{url}/v1/models", headers=headers)
    assert answer.status_code == status
    assert status == 200 or error_of(answer)["code"] == "invalid_api_key"
    assert httpx.post(f"{url}{CHAT}", json=chat(), headers=headers).status_code == status
    page = httpx.get(f"{url}/metrics", headers=headers)
    assert page.status_code == status
    assert ("www-authenticate" in page.headers) == (status == 401)  # a browser then asks for it
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.post(f"{url}/health", headers=headers).status_code == (401 if status == 401 else 405)


@pytest.mark.parametrize(
    ("method", "headers", "refused"),
    [
        ("GET", {"Host": "a:8000"}, None),
        ("GET", {"Host": "evil.example.org:8000"}, "host_not_allowed"),
        ("GET", {"Sec-Fetch-Site": "same-origin"}, None),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}, "origin_not_allowed"),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, None),  # a link
        ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, "origin_not_allowed"),  # a form
        ("POST", {"Sec-Fetch-Site": "cross-site", "Origin": "https://other.example.org"}, "origin_not_allowed"),
        ("POST", {"Sec-Fetch-Site": "cross-site", "Origin": "https://page.example.org"}, None),
    ],
)
def test_other_web_sites_may_not_ask(url: str, method: str, headers: dict, refused: str | None) -> None:
    """A browser sends these headers, whatever the site wants. A name may be made to point here."""
    answer = httpx.request(method, f"{url}/metrics", headers={**KEY, **headers})
    assert (answer.status_code == 403) == (refused is not None)
    assert refused is None or error_of(answer)["code"] == refused


def test_pages_of_allowed_origins_may_ask(url: str) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://page.example.org", True), ("https://other.example.org", False)):
        answer = httpx.options(f"{url}{CHAT}", headers={"Origin": origin, **asked})
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
        refused = httpx.post(f"{url}{CHAT}", json=chat(), headers={"Origin": origin})
        assert refused.status_code == 401
        assert ("access-control-allow-origin" in refused.headers) == allowed  # the page can read the error


def test_a_body_that_is_too_large_is_refused(url: str) -> None:
    large = json.dumps(chat(user="x" * 150_000)).encode()
    headers = {**KEY, "content-type": "application/json"}
    declared = httpx.post(f"{url}{CHAT}", content=large, headers=headers)
    chunked = httpx.post(f"{url}{CHAT}", content=iter([large[:50_000], large[50_000:]]), headers=headers)
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "body_too_large"
    with suppress(httpx.WriteError, httpx.ReadError):  # the server may hang up before all is sent
        assert httpx.post(f"{url}{CHAT}", content=100 * large, headers=headers).status_code == 413
    assert httpx.post(f"{url}{CHAT}", json=chat(), headers=KEY).status_code == 200
    assert httpx.request("GET", f"{url}/v1/models", content=b"a", headers=KEY).status_code == 413


def test_json_of_many_values_is_refused(session: Session) -> None:
    """A few megabytes of them would take hundreds in memory; a long text does not."""
    with served(session) as address:
        for unknown, status in ([0] * 100_001, 413), ([0] * 25_000, 200), ("x" * 500_000, 200):
            answer = httpx.post(f"{address}{CHAT}", json={**chat(), "unknown": unknown}, timeout=60)
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n", b""),
        (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer secret\r\n"
            b"content-length: 999\r\n\r\n{",
            b"HTTP/1.1 408 ",
        ),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 999\r\n\r\n{", b"HTTP/1.1 401 "),
    ],
    ids=["nothing", "half a head", "half a body", "half a body without a key"],
)
def test_a_slow_client_is_left(url: str, sent: bytes, answer: bytes) -> None:
    """It sends on, a byte at a time."""
    host, port = url.removeprefix("http://").split(":")
    found, end = b"", time.monotonic() + 20
    with suppress(ConnectionError), socket.create_connection((host, int(port)), timeout=0.2) as connection:
        connection.sendall(sent)
        while time.monotonic() < end:
            with suppress(TimeoutError):
                if not (received := connection.recv(1000)):
                    break
                found += received
            connection.sendall(b"x")
    assert time.monotonic() < end
    assert found[:13] == answer


def test_a_client_that_does_not_read_frees_its_row(session: Session) -> None:
    """As the app sees it: sending blocks once the buffers of the connection are full."""
    engine = Engine(session)
    app = create_app(engine, limits=LIMITS)
    body = [{"type": "http.request", "body": json.dumps(chat(900, stream=True)).encode()}]
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b"", "asgi": {}}
    sent = []

    async def receive() -> dict:
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message: dict) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    assert len(sent) == 2
    engine.close()
    assert "tokens_total{" not in app.state.service.metrics.text().decode()  # the answer was not completed


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(url: str, stream: bool) -> None:
    """There is one row: what comes next would wait for thousands of tokens."""
    if stream:
        with httpx.stream("POST", f"{url}{CHAT}", json=chat(900, stream=True), headers=KEY) as begun:
            next(begun.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}{CHAT}", json=chat(900), headers=KEY, timeout=0.5)
    answer = httpx.post(f"{url}{CHAT}", json=chat(), headers=KEY, timeout=60)
    assert answer.status_code == 200
    text = httpx.get(f"{url}/metrics", headers=KEY).text
    tokens = re.search(r'tokens_total{kind="answer"} (\d+)', text)
    assert tokens
    assert int(tokens[1]) < 900
    assert stream or f'endpoint="{CHAT}",status="499"' in text


def test_a_full_queue_is_a_429(url: str) -> None:
    """One answer runs, two may wait."""
    wait_until_free(url)
    never = httpx.post(f"{url}{CHAT}", json=chat(n=3), headers=KEY)  # nor would it fit later
    assert (never.status_code, error_of(never)["param"]) == (400, "n")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(httpx.post, f"{url}{CHAT}", json=chat(300), headers=KEY, timeout=60)
        while "metamorph_running 1.0" not in httpx.get(f"{url}/metrics", headers=KEY).text:
            time.sleep(0.01)
        waiting = pool.submit(httpx.post, f"{url}{CHAT}", json=chat(), headers=KEY, timeout=60)
        while "metamorph_queue_length 1.0" not in httpx.get(f"{url}/metrics", headers=KEY).text:
            time.sleep(0.01)
        refused = httpx.post(f"{url}{CHAT}", json=chat(n=2), headers=KEY)
        assert "metamorph_queue_length 1.0" in httpx.get(f"{url}/metrics", headers=KEY).text  # neither of the two
    assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    assert (first.result().status_code, waiting.result().status_code) == (200, 200)


@pytest.mark.parametrize("path", [CHAT, "/chat/gradio_api/upload"])
def test_requests_that_are_being_sent_count(session: Session, path: str) -> None:
    """Each has a place, so their bodies have a limit together. A full API does not keep the page from stopping."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{{"
    with served(session, engine={"max_batch_size": 1, "max_queue": 2}) as url:
        host, port = url.removeprefix("http://").split(":")
        senders = [socket.create_connection((host, int(port)), timeout=20) for _ in range(3)]
        for sender in senders:
            sender.sendall(head.encode())
        while (refused := httpx.post(f"{url}{path}", json=chat(), timeout=60)).status_code != 429:
            time.sleep(0.05)  # until the server has begun to read all three
        assert error_of(refused)["code"] == "queue_full"
        other = "/nothing" if path == CHAT else CHAT
        assert httpx.post(f"{url}{other}", json=chat(), timeout=60).status_code in (404, 200)
        for sender in senders:
            sender.close()
        while httpx.post(f"{url}{path}", json=chat(), timeout=60).status_code == 429:
            time.sleep(0.05)


@contextmanager
def image_host(answers: dict[str, tuple[int, dict, bytes]]) -> Iterator[int]:
    """The port of a server of files on loopback."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_remote_images_come_from_allowed_public_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    image = file_of(Image.new("RGB", (4, 4)))
    answers = {
        "/a.png": (200, {}, image),
        "/here": (302, {"Location": "/a.png"}, b""),
        "/there": (302, {"Location": "http://other.example.org/a.png"}, b""),
        "/file": (302, {"Location": "file:///etc/passwd"}, b""),
        "/loop": (302, {"Location": "/loop"}, b""),
        "/large": (200, {}, bytes(2000)),
        "/none": (404, {}, b""),
    }
    asked: list[tuple[str, int]] = []
    hosts = ("images.example.org", ".cdn.example.org")
    with image_host(answers) as port:

        def loopback(host: str, _: int) -> str:
            asked.append((host, port))
            return "127.0.0.1"

        connect = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", lambda address, **given: connect((address[0], port), **given))

        def fetch(url: str, hosts: tuple[str, ...] = hosts, **given: object) -> bytes:
            return fetch_image(url, hosts, max_bytes=1000, timeout=5, **{"resolve": loopback, **given})

        for url in (
            "http://images.example.org/a.png",
            "http://images.example.org/here",
            "http://a.cdn.example.org/a.png",
        ):
            assert fetch(url) == image
        asked.clear()
        for url, problem in {
            "http://example.org/a.png": "are not fetched from example.org",
            "http://cdn.example.org.evil.org/a.png": "are not fetched",
            "http://images.example.org:22/a.png": "usual ports",
            "http://images.example.org@evil.org/a.png": "are not fetched from",
            "ftp://images.example.org/a.png": "data: URLs, or http",
            "http://images.example.org/there": "are not fetched from other.example.org",
            "http://images.example.org/file": "data: URLs, or http",
            "http://images.example.org/loop": "more than 3 redirects",
            "http://images.example.org/large": "more than 1000 bytes",
            "http://images.example.org/none": "status 404",
            "http://[x/a.png": "not a URL",
        }.items():
            with pytest.raises(ApiError, match=problem):
                fetch(url)
        assert {host for host, _ in asked} == {"images.example.org"}
        with pytest.raises(ApiError, match="its address is not public"):
            fetch("http://localhost/a.png", ("localhost",), resolve=None)


# --- one process, as users start it ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, session: Session) -> Path:
    """A copy of mini in float32, so that sampled answers do not depend on their batch; they end at their limit only."""
    folder = tmp_path_factory.mktemp("model") / "endless"
    shutil.copytree(shipped_folder("mini", "model"), folder)
    session.model.save_pretrained(folder)
    return folder


@contextmanager
def process(model: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    command = [sys.executable, "-m", "metamorph", "serve", "--model", str(model), "--visualizer", "mini"]
    environment = {**os.environ, "METAMORPH_API_KEY": "secret"}
    started = subprocess.Popen(
        [*command, "--device", "cpu", "--port", "0", *flags], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert started.stderr
    try:
        lines = iter(started.stderr.readline, "")
        found = next(match for line in lines if (match := re.search(r"running on (http://\S+)", line)))
        threading.Thread(target=started.stderr.read, daemon=True).start()
        yield started, found[1]
    finally:
        started.kill()
        started.wait()


def bodies() -> list[tuple[str, dict]]:
    """32 requests of all kinds."""
    image = data_url(Image.new("RGB", (64, 64), "red"))
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "what color is it?"}]
    kinds = [
        (CHAT, chat(8)),
        (CHAT, chat(8, temperature=1.5)),
        (CHAT, {**chat(8), "messages": [{"role": "user", "content": content}]}),
        (DRAW, {"prompt": "draw a red circle", "num_inference_steps": 2}),
    ]
    return [(path, {**body, "seed": seed}) for seed in range(8) for path, body in kinds]


def result(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body.get("data") or body["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_a_storm_leaves_the_server_as_it_was(endless: Path) -> None:
    """32 clients at once get what they get alone, whatever others do to the server; then memory is back."""
    with process(endless, "--max-body-mb", "1", "--client-timeout", "2") as (server, url):
        memory = psutil.Process(server.pid).memory_info
        headers = KEY

        def send(request: tuple[str, dict]) -> httpx.Response:
            return httpx.post(f"{url}{request[0]}", json=request[1], headers=headers, timeout=120)

        def bad(number: int) -> int:
            host, port = url.removeprefix("http://").split(":")
            if number == 0:  # a slow client
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(b"POST /v1/responses HTTP/1.1\r\n")
                    return len(connection.recv(100))
            if number == 1:
                return httpx.post(f"{url}{CHAT}", content=b"x" * 1_500_000, headers=headers).status_code
            if number == 2:
                malformed = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
                messages = [{"role": "user", "content": [malformed]}]
                return httpx.post(f"{url}{CHAT}", json={"messages": messages}, headers=headers).status_code
            if number == 3:
                return httpx.post(f"{url}{CHAT}", json=chat(), headers={"Authorization": "Bearer x"}).status_code
            with suppress(httpx.ReadTimeout):  # a cancelled one
                httpx.post(f"{url}{CHAT}", json=chat(900), headers=headers, timeout=0.5)
            return 0

        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            alone = [result(send(request)) for request in bodies()[:8]]
            list(pool.map(send, bodies()))  # allocates what stays
            before = memory().rss
            clients, others = pool.map(send, bodies()), pool.map(bad, range(5))
            together = [result(answer) for answer in clients]
            assert list(others) == [0, 413, 400, 401, 0]
        for image, other in zip(together[3:8:4], alone[3:8:4], strict=True):
            pair = [image_of(each.pop()["b64_json"]).tobytes() for each in (image, other)]
            pixels = [torch.frombuffer(bytearray(each), dtype=torch.uint8).int() for each in pair]
            assert (pixels[0] - pixels[1]).abs().max() <= 1
        assert together[:8] == alone
        wait_until_free(url)
        assert memory().rss <= 1.1 * before
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_refuses_the_rest(endless: Path) -> None:
    with process(endless, "--max-batch-size", "1") as (server, url), concurrent.futures.ThreadPoolExecutor(2) as pool:
        with httpx.stream("POST", f"{url}{CHAT}", json=chat(400, stream=True), headers=KEY, timeout=60) as running:
            lines = running.iter_lines()
            next(lines)
            waiting = pool.submit(httpx.post, f"{url}{CHAT}", json=chat(), headers=KEY, timeout=60)
            while "metamorph_queue_length 1.0" not in httpx.get(f"{url}/metrics", headers=KEY).text:
                time.sleep(0.01)
            server.send_signal(signal.SIGTERM)
            late = httpx.post(f"{url}{CHAT}", json=chat(), headers=KEY)
            health = httpx.get(f"{url}/health")
            rest = "".join(lines)
        assert '"finish_reason": "length"' in rest
        assert rest.endswith("data: [DONE]")
        assert (waiting.result().status_code, late.status_code, health.status_code) == (503, 503, 503)
        assert error_of(waiting.result())["code"] == error_of(late)["code"] == "server_ending"
        assert server.wait(timeout=60) == 0
