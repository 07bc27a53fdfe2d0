"""The HTTP server: connections of slow clients, and a SIGTERM that lets running answers finish."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from metamorph.serving.engine import Engine


class Server(uvicorn.Server):
    """Serves an app until SIGTERM or SIGINT. Then what runs is finished, and all else is refused; a second one ends it.

    Until the last answer is sent the server accepts connections, so that load balancers get a 503 and go elsewhere.
    """

    def __init__(self, app: FastAPI, engine: Engine, host: str, port: int, client_timeout: float) -> None:
        self.app, self.engine = app, engine
        protocol = type("Protocol", (TimedProtocol,), {"timeout": client_timeout})
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=protocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,  # for what has been generated already
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.engine.is_refusing:
            self.should_exit = self.force_exit = True
            return
        self.engine.is_refusing = True
        threading.Thread(target=self._finish, name="metamorph-exit", daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections."""
        if hasattr(self.app.state, "page"):  # whose browsers would keep theirs
            self.app.state.page.stop_event.set()
        await super().shutdown(sockets)

    def _finish(self) -> None:
        self.engine.refuse()
        self.engine.close()
        self.should_exit = True


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose client does not complete a request in time.

    The guard reads bodies; here are heads, and the rest of bodies whose requests were refused before.
    """

    timeout = 60.0
    """Seconds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._check()

    def data_received(self, data: bytes) -> None:
        """Stop the clock once the head is complete."""
        super().data_received(data)
        self._check()

    def on_response_complete(self) -> None:
        """Start the clock for what is left of the request, and the next one."""
        super().on_response_complete()
        self._check()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        is_refused = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        is_waiting = is_refused or self.conn.their_state is h11.IDLE
        if is_waiting and self._timer is None:
            self._timer = self.loop.call_later(self.timeout, self.transport.abort)
        elif not is_waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None
