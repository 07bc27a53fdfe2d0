"""A small HTTP server with a chat endpoint that answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


Reply = tuple[int, object]
"""Status and JSON."""


def says(text: str) -> Reply:
    """An answer in OpenAI's style."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@contextmanager
def judge_server(reply: Callable[[dict], Reply], models: Reply = (404, {})) -> Iterator[tuple[str, list[dict]]]:
    """The base URL of a server, and its requests so far: `{"headers", "body"}`."""
    requests: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            requests.append({"headers": dict(self.headers), "body": body, "path": self.path})
            self._send(reply(body))

        def _send(self, answer: Reply) -> None:
            content = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def text_of(body: dict) -> str:
    """The question in a request."""
    return body["messages"][0]["content"][-1]["text"]
