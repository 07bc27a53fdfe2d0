"""Refuses URLs in requests to the web page: Gradio would fetch any that a client names instead of a file."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class PageGuard:
    """Middleware of Gradio's app that refuses requests which name a URL as a file."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        is_refused = "://" in scope["path"] or "/proxy=" in scope["path"]  # Gradio has several routes of files
        request = Request(scope, receive)
        if scope["method"] == "POST" and not request.headers.get("content-type", "").startswith("multipart/"):
            body = await request.body()
            is_refused = is_refused or _names_url(body)
            unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
            before = receive

            async def receive() -> Message:
                return unread.pop() if unread else await before()

        app = PlainTextResponse("URLs are not fetched: upload the file", 403) if is_refused else self.app
        return await app(scope, receive, send)


def _names_url(body: bytes) -> bool:
    try:
        return _has_url(json.loads(body))
    except RecursionError:
        return True
    except ValueError:
        return False  # which Gradio refuses


def _has_url(value: Any) -> bool:
    if isinstance(value, dict):
        is_url = isinstance(value.get("path"), str) and "://" in value["path"]
        return is_url or any(_has_url(item) for item in value.values())
    return isinstance(value, list) and any(_has_url(item) for item in value)
