"""Metrics of the server in the format of Prometheus: requests, queue, latency, tokens, images, errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send


if TYPE_CHECKING:
    from metamorph.serving.service import Usage

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = {"registry": self.registry, "namespace": "metamorph"}
        ends = ["endpoint", "status"]
        self.requests = Counter("requests", "Requests, by status; errors are those of 400 and more.", ends, **names)
        latency = "Seconds from the head of a request to its answer's "
        self.latency = Histogram("request_seconds", latency + "end.", ["endpoint"], buckets=_SECONDS, **names)
        self.first = Histogram("first_byte_seconds", latency + "begin.", ["endpoint"], buckets=_SECONDS, **names)
        self.tokens = Counter("tokens", "Tokens, visual ones included.", ["kind"], **names)
        self.images = Counter("images", "Drawn images.", **names)
        self.queue = Gauge("queue_length", "Answers that wait for a batch.", **names)
        self.running = Gauge("running", "Answers in the batch that runs.", **names)

    def watch(self, num_waiting: Callable[[], float], num_running: Callable[[], float]) -> None:
        """Take the length of the queue and the size of the batch from these functions."""
        self.queue.set_function(num_waiting)
        self.running.set_function(num_running)

    def count(self, usage: Usage, num_images: int) -> None:
        """Add what a request took."""
        self.tokens.labels("prompt").inc(usage.prompt)
        self.tokens.labels("answer").inc(usage.answer)
        self.images.inc(num_images)

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self.registry)


class MeasuredApp:
    """Middleware that counts requests and their seconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, first = time.monotonic(), 499, 0.0  # 499: the client left before it had an answer

        async def measured(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not first:
                first = time.monotonic() - start
            await send(message)

        try:
            await self.app(scope, receive, measured)
        except Exception:  # whatever it is, the server answers with 500
            status = 500
            raise
        finally:
            # The pattern of a route, so that clients cannot make up labels.
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.latency.labels(endpoint).observe(time.monotonic() - start)
            if first:
                self.metrics.first.labels(endpoint).observe(first)
