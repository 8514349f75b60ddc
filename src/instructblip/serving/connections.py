"""The connections of a server: their number, the time that they may wait, and what is logged.

uvicorn bounds none of these: half a header waits for ever, and a client with many connections takes
all descriptors. It runs here with a protocol that closes what waits too long.
"""

import asyncio
import logging
import math
import socket
from collections.abc import Sequence
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from instructblip.serving.service import Service

HEADER_S = 10.0
"""Seconds from the first byte of a request, or from the connection, to the end of its header."""
SHUTDOWN_S = 8
"""Seconds for which requests in progress, and the streams of pages, may continue after SIGTERM."""
LOG_LINES = 10
"""Lines that each log may have in a second."""
MAX_CHUNKS = 1000
"""Chunks of a body beside one for each ``CHUNK_BYTES``: each takes 10 µs, however small."""
CHUNK_BYTES = 64


class _FewChunks(h11.Connection):
    """Refuses a body of more chunks than one of its size needs."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks, self._bytes = (
                self._chunks + event.chunk_start,
                self._bytes + len(event.data),
            )
            if self._chunks > MAX_CHUNKS + self._bytes // CHUNK_BYTES:
                raise h11.RemoteProtocolError("too many small chunks")
        return event


class Connection(H11Protocol):
    """A connection that is closed if its header is late, if its client reads nothing of a response
    for too long, and, where there are too many, if it has waited longest for a request."""

    header_s = HEADER_S
    unread_s = 60.0
    most = 512
    _since = 0.0
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _FewChunks(h11.SERVER)

    @property
    def waits(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._late = self.loop.call_later(self.header_s, self._close_late)
        if len(self.connections) > self.most:
            waiting = [one for one in self.connections if isinstance(one, Connection) and one.waits]
            oldest = min(waiting, key=lambda one: one._since)  # perhaps this one
            self.connections.discard(oldest)
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.waits:
            self._forget_late()
        elif self._late is None:  # the next header has begun
            self._late = self.loop.call_later(self.header_s, self._close_late)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; where a response has been sent already, end the connection."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client has not read what was sent: it has some time to."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_unread()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_late()
        self._forget_unread()
        super().connection_lost(exc)

    def _forget_late(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _close_late(self) -> None:
        if self.waits:
            self.transport.abort()


class Sparing(logging.Filter):
    """Passes ``LOG_LINES`` short lines in each second, and reports how many it left out."""

    def __init__(self) -> None:
        super().__init__()
        self._second, self._lines, self._left_out = 0, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        if int(record.created) != self._second:
            left_out = self._left_out
            self._second, self._lines, self._left_out = int(record.created), 0, 0
            if left_out:
                logging.getLogger(record.name).warning("%d lines were left out", left_out)
        self._lines += 1
        if isinstance(record.args, tuple):
            record.args = tuple(x[:200] if isinstance(x, str) else x for x in record.args)
        self._left_out += self._lines > LOG_LINES
        return self._lines <= LOG_LINES


class Server(uvicorn.Server):
    """Runs an application of ``create_app`` and ends when one of its models cannot answer any
    more."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        self.service: Service = app.state.service
        self.front: str = app.state.front
        self.failed = False
        limits = self.service.config
        bounds = {"most": limits.max_connections, "unread_s": limits.timeout_s}
        config = uvicorn.Config(
            app,
            http=type("Connection", (Connection,), bounds),
            ws="none",
            timeout_graceful_shutdown=min(SHUTDOWN_S, math.ceil(limits.timeout_s)),
            timeout_keep_alive=75,  # longer than a busy client waits before its next request
            backlog=128,  # accepted at once, before any of them is read
            server_header=False,
            use_colors=False,  # each line holds texts of clients, which are escaped
            **options,
        )
        super().__init__(config)
        for name in ("uvicorn.error", "uvicorn.access", "asyncio"):
            logger = logging.getLogger(name)
            if not any(isinstance(one, Sparing) for one in logger.filters):
                logger.addFilter(Sparing())

    def _log_started_message(self, listeners: Sequence[socket.socket]) -> None:
        """Print the one address that people open, instead of uvicorn's."""
        host, port = self.config.host, listeners[0].getsockname()[1]
        name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        print(f"serving at http://{name}:{port}{self.front}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """As in uvicorn, ten times a second: whether to end."""
        self.failed = self.failed or bool(self.service.dead)
        return await super().on_tick(counter) or self.failed


def run_server(app: FastAPI, host: str, port: int, **options: Any) -> None:
    """Serve until SIGTERM or SIGINT; ``options`` are uvicorn's. Raises SystemExit with code 1 if a
    model cannot answer."""
    server = Server(app, host=host, port=port, **options)
    server.service.decoders.start()
    server.run()
    if server.failed:
        raise SystemExit("the thread of a model has ended; start the server again")
