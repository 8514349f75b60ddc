"""Connections: half headers, too many of them, the log, the end of the server and its death."""

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Response

from instructblip.serving import connections
from instructblip.serving.api import create_app
from instructblip.serving.config import ServeConfig
from instructblip.serving.connections import (
    LOG_LINES,
    MAX_CHUNKS,
    Connection,
    Server,
    Sparing,
    run_server,
)
from instructblip.serving.page import add_page
from tests.conftest import TestClient, body, greedy_engine
from tests.serving.test_api import CHAT, Slow, wait_for

HALF = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = HALF + b"\r\n"
SLOW = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"


@contextlib.contextmanager
def serving(
    app: FastAPI, host: str = "127.0.0.1", log_level: str = "critical"
) -> Iterator[tuple[Server, int, threading.Thread]]:
    """The server in a thread, and its port."""
    server = Server(app, host=host, port=0, log_level=log_level)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1], thread
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def connect(port: int, first: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(first)
    return connection


def test_half_headers_are_closed(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "header_s", 0.3)
    with serving(create_app({"tuned": greedy_engine(model_folder)})) as (_, port, _):
        for first in (b"", b"GE", HALF):
            with connect(port, first) as connection:
                assert connection.recv(1000) == b"", "closed without an answer"
        with connect(port, WHOLE) as connection:
            assert b"200" in connection.recv(1000)
            connection.sendall(HALF)
            while connection.recv(1000):  # the rest of the answer, then the end
                pass
        with connect(port, SLOW) as connection:
            connection.settimeout(1)
            with pytest.raises(TimeoutError):  # a body has the time of a request
                connection.recv(1000)


def test_too_many_connections_close_those_that_wait(model_folder: Path) -> None:
    config = ServeConfig(max_connections=16)
    app = create_app({"tuned": greedy_engine(model_folder)}, config)
    with serving(app) as (server, port, _), contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connect(port, HALF)) for _ in range(40)]
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        with contextlib.suppress(ConnectionResetError):
            assert opened[0].recv(1000) == b""
        assert len(server.server_state.connections) <= 16
        for _ in range(8):
            stack.enter_context(connect(port, SLOW))
        wait_for(lambda: len(server.server_state.tasks) == 8)
        with connect(port, SLOW) as crowded:
            assert b"503" in crowded.recv(1000)
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200


def test_a_client_that_reads_nothing_is_closed(model_folder: Path) -> None:
    app = create_app({"tuned": greedy_engine(model_folder)}, ServeConfig(timeout_s=0.5))

    @app.get("/large")
    async def large() -> Response:
        return Response(bytes(64 << 20))

    with serving(app) as (server, port, _):
        request = HALF.replace(b"/healthz", b"/large") + b"\r\n"
        with connect(port, request) as unread, connect(port, request) as read:
            wait_for(lambda: len(server.server_state.connections) == 2)
            assert sum(len(read.recv(1 << 20)) for _ in range(30)) > 1 << 20
            wait_for(lambda: not server.server_state.connections)
            with contextlib.suppress(ConnectionResetError):
                while unread.recv(1 << 20):
                    pass


def test_many_small_chunks_are_refused(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = SLOW.partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    large = b"100\r\n" + b" " * 256 + b"\r\n"
    with serving(create_app({"tuned": greedy_engine(model_folder)})) as (_, port, _):
        for chunks, answer in (
            (b"1\r\n \r\n" * (MAX_CHUNKS + 20), b"400 Bad Request"),
            (large * (MAX_CHUNKS + 20) + b"0\r\n\r\n", b"422 "),
        ):
            with connect(port, head + chunks) as connection:
                assert connection.recv(1000).startswith(b"HTTP/1.1 " + answer)
        with connect(port, head.replace(CHAT.encode(), b"/healthz")) as connection:
            assert b" 405 " in connection.recv(1000)
            connection.sendall(b"no chunk\r\n")
            while connection.recv(1000):  # the rest of the response, then the end
                pass
    assert not any("Fatal error" in line for line in caplog.messages)


def test_the_log_is_bounded() -> None:
    sparing, shown = Sparing(), []
    for _ in range(1000):
        record = logging.LogRecord("x", logging.INFO, "", 1, "%s", ("a" * 10_000,), None)
        record.created = 1.5
        if sparing.filter(record):
            shown.append(record.getMessage())
    assert shown == ["a" * 200] * LOG_LINES
    record.created = 2.5
    assert sparing.filter(record), "the next second"


def test_shutdown_does_not_wait_for_streams(
    model_folder: Path, png: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SHUTDOWN_S", 1)
    slow: Any = Slow(greedy_engine(model_folder))
    with serving(create_app({"tuned": slow})) as (server, port, thread):
        content = httpx.Request("POST", "http://a", json=body(png[0], stream=True)).read()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        with connect(port, head.encode() + content):
            wait_for(lambda: slow.sizes)
            server.should_exit = True
            thread.join(timeout=15)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("::1", "[::1]")]
)
def test_one_address_is_printed(
    model_folder: Path, capsys: pytest.CaptureFixture[str], host: str, shown: str
) -> None:
    app = add_page(create_app({"tuned": greedy_engine(model_folder)}))
    with serving(app, host, log_level="info") as (_, port, _):
        printed = capsys.readouterr()
    assert printed.out == f"serving at http://{shown}:{port}/page\n"
    assert "http" not in printed.err


def dying(model_folder: Path) -> FastAPI:
    """An application whose model's thread ends after its first batch."""
    app = create_app({"tuned": greedy_engine(model_folder)})

    def die(*_: Any) -> None:
        raise RuntimeError("lost")

    app.state.service.batchers["tuned"].on_batch = die
    return app


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_reports_a_dead_thread(model_folder: Path, png: list[Path]) -> None:
    app = dying(model_folder)
    with TestClient(app) as client:
        assert client.get("/healthz").status_code == 200
        assert client.post(CHAT, json=body(png[0])).status_code == 503, "not after its time limit"
        wait_for(lambda: app.state.service.dead)
        answer = client.get("/healthz")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "cannot answer: tuned"
        assert client.post(CHAT, json=body(png[0])).status_code == 429, "at once"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_server_ends_with_its_model(
    model_folder: Path, png: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = dying(model_folder)
    with serving(app) as (server, port, thread):
        httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=body(png[0]), timeout=20)
        thread.join(timeout=15)
        assert not thread.is_alive()
        assert server.failed
    monkeypatch.setattr(Server, "run", lambda self: setattr(self, "failed", True))
    with pytest.raises(SystemExit) as stop:
        run_server(app, "127.0.0.1", 0)
    assert "start the server again" in str(stop.value.code)
