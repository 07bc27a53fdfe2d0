"""Checks requests before the app sees them: the key, who sends them, the size of the body, slow and lost clients."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import re
from collections import Counter
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metamorph.serving.batcher import Closed, QueueFull
from metamorph.serving.engine import Engine
from metamorph.serving.errors import ApiError, as_api_error
from metamorph.serving.limits import Limits


_CLOSE = {"Connection": "close"}
_MAX_VALUES = 100_000
"""Of JSON, which takes about 100 times the memory of its text where it is small values, and seconds to parse."""


class _ClientLeft(Exception):
    """Nobody is there to answer."""


class Guard:
    """Middleware that refuses a request before it is parsed, and ends one whose client has left."""

    def __init__(
        self,
        app: ASGIApp,
        engine: Engine,
        limits: Limits,
        api_key: str | None,
        hosts: Collection[str],
        origins: Collection[str],
    ) -> None:
        self.app, self.engine, self.limits, self.api_key = app, engine, limits, api_key
        self.hosts, self.origins = hosts, origins
        self._num_posts = Counter[bool]()
        """Requests with a body that are read or answered: those of the API, and those of the page."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":  # no route is one
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        is_post = scope["method"] == "POST"
        is_work = is_post and scope["path"].startswith("/v1/")
        try:
            self._check_sender(scope, headers)
            if is_work and self.engine.is_refusing:
                raise Closed
            if is_post and self._num_posts[is_work] >= self.engine.max_requests:
                raise QueueFull
            self._num_posts[is_work] += is_post
            try:
                max_body_mb = self.limits.max_body_mb if is_post else 0.0
                await self._answer(scope, await self._read(receive, headers, max_body_mb), receive, send, is_work)
            finally:
                self._num_posts[is_work] -= is_post
        except _ClientLeft:
            pass
        except (ApiError, Closed, QueueFull) as error:  # the app answers to its own
            await as_api_error(error).response()(scope, receive, send)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        """Refuse clients without the key, and cross-site requests of browsers."""
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        is_health = scope["method"] == "GET" and scope["path"] == "/health"  # load balancers ask by address
        if self.hosts and host not in self.hosts and not is_health:  # a name that its owner points to this address
            message = f"this server is not called {host!r}: start it with --allowed-host {host}"
            raise ApiError(message, status=403, code="host_not_allowed")
        is_link = scope["method"] == "GET" and headers.get("sec-fetch-dest") == "document"
        is_allowed = is_link or "*" in self.origins or headers.get("origin") in self.origins
        if headers.get("sec-fetch-site") == "cross-site" and not is_allowed:
            message = "another web site may not ask this server: start it with --cors-origin and its origin"
            raise ApiError(message, status=403, code="origin_not_allowed")
        if not (is_health or self._has_key(headers)):
            raise _no_key(scope["path"])

    def _has_key(self, headers: Headers) -> bool:
        """Whether there is the key, as a bearer token or, for browsers, as the password of any user."""
        if self.api_key is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            with contextlib.suppress(binascii.Error):
                given = base64.b64decode(given).decode(errors="replace").partition(":")[2]
        return hmac.compare_digest(given.encode(), self.api_key.encode())

    async def _read(self, receive: Receive, headers: Headers, max_mb: float) -> bytes:
        """The body, complete. One that is too large is read on for a while, so that the client hears the answer."""
        limit = int(max_mb * 1e6)
        message = f"the body has more than {max_mb:g} MB" if limit else "only POST requests may have a body"
        too_large = ApiError(message, status=413, code="body_too_large", headers=_CLOSE)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > 2 * limit:
            raise too_large

        async def read() -> bytes:
            chunks, size, is_last = [], 0, False
            while not is_last and size <= 2 * limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _ClientLeft
                size += len(message.get("body", b""))
                chunks.append(message.get("body", b""))
                if size > limit:
                    chunks.clear()
                is_last = not message.get("more_body", False)
            if size > limit:
                raise too_large
            body = b"".join(chunks)
            is_form = headers.get("content-type", "").startswith("multipart/")
            if not is_form and sum(map(body.count, (b"[", b"{", b","))) > _MAX_VALUES:
                raise ApiError(f"the body has more than {_MAX_VALUES:,} JSON values", status=413, code="body_too_large")
            return body

        try:
            return await asyncio.wait_for(read(), self.limits.client_timeout)
        except asyncio.TimeoutError as error:
            message = f"the request was not complete within {self.limits.client_timeout:g} seconds"
            raise ApiError(message, status=408, code="client_timeout", headers=_CLOSE) from error

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send, is_work: bool) -> None:
        """Run the app; an answer of the model only until the client leaves."""
        left = asyncio.ensure_future(receive())
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await asyncio.shield(left)

        async def send_in_time(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), self.limits.client_timeout)
            except asyncio.TimeoutError as error:
                raise _ClientLeft from error

        del body  # the app has the only copy, and forgets it
        task = asyncio.ensure_future(self.app(scope, replay, send_in_time))
        try:
            await asyncio.wait({task, left} if is_work else {task}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _ClientLeft
            await task
        finally:
            left.cancel()
            task.cancel()
            await asyncio.wait({task})


def _no_key(path: str) -> ApiError:
    challenge = {"WWW-Authenticate": 'Basic realm="MetaMorph: the password is the API key"'}
    headers = {} if path.startswith("/v1/") else challenge  # which makes browsers ask for it
    message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
    return ApiError(message, status=401, code="invalid_api_key", headers=headers)
