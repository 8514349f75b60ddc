"""Bounded attacks on a server of this machine: what each costs, and what others notice of it.

    python benchmarks/attack_server.py [--model starter] [--only json-errors ...]

Starts `instructblip serve` with 256 descriptors, sends each attack to it, and prints a line for
each. ``health`` is the longest that /healthz took meanwhile. Those of ``INSIDE`` run in this
process, since the model or a decoder has to be made to fail. Nothing leaves 127.0.0.1, each attack
ends after seconds; exit code 1 if one of them was not stopped.
"""

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient
from PIL import Image

from instructblip.inference.engine import Engine
from instructblip.serving.api import create_app
from instructblip.serving.batching import Batcher, Job
from instructblip.serving.config import ServeConfig

DESCRIPTORS = 256
JSON = "application/json"
Row = tuple[str, bool]
"""What happened, and whether the attack was stopped."""


class Server:
    """`instructblip serve` as a separate process with few descriptors; its log is a file."""

    def __init__(self, model: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = Path(tempfile.mkdtemp()) / "log"
        self.temporary = Path(tempfile.mkdtemp())
        command = [sys.executable, "-m", "instructblip", "serve", "--model", model]
        limit = (DESCRIPTORS, DESCRIPTORS)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.temporary)},
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
            )
        for _ in range(900):
            with contextlib.suppress(OSError):
                self.ask("GET", "/healthz")
                return
            time.sleep(0.2)
        raise TimeoutError(f"the server does not start; see {self.log}")

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        timeout: float = 60,
        **headers: str,
    ) -> tuple[int, str]:
        """Status and text of an answer. Raises OSError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": JSON, **headers})
            response = connection.getresponse()
            return response.status, response.read().decode()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
        finally:
            connection.close()

    def open(self, first: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(first)
        return connection

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


@contextlib.contextmanager
def watching(ask: Callable[[], Any]) -> Iterator[list[float]]:
    """The seconds of each of the calls of ``ask`` that are made meanwhile, at least one; infinite
    for one that failed."""
    seconds: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set() or not seconds:
            began = time.monotonic()
            try:
                ask()
                seconds.append(time.monotonic() - began)
            except OSError:
                seconds.append(float("inf"))
            stop.wait(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seconds
    finally:
        stop.set()
        thread.join()


def post(server: Server, path: str, body: bytes) -> Row:
    """One request, and what others notice of it."""
    before, began = server.peak_mb, time.monotonic()
    with watching(lambda: server.ask("GET", "/healthz")) as health:
        status, _ = server.ask("POST", path, body, timeout=120)
        took = time.monotonic() - began
    grown, waited = server.peak_mb - before, max(health)
    text = f"{len(body) / 1e6:.1f} MB: {status} after {took:.2f} s, health {waited:.2f} s"
    return f"{text}, {grown:.0f} MB of memory", status < 500 and waited < 0.5


def image_url(width: int = 32) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, 32), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat(text: str, parts: int = 1) -> bytes:
    image = {"type": "image_url", "image_url": {"url": image_url()}}
    content = [{"type": "text", "text": text}] * parts
    messages = [{"role": "user", "content": [image, *content[:63]]}]
    messages += [{"role": "user", "content": content[:64]} for _ in range((parts - 1) // 64)]
    return json.dumps({"messages": messages, "max_tokens": 4}).encode()


def numbers(field: str, count: int) -> bytes:
    """A list of ``count`` values of the wrong type."""
    return f'{{"{field}": [{"0," * count}0]}}'.encode()


def keys(count: int) -> bytes:
    """``count`` fields that do not exist."""
    return json.dumps(dict.fromkeys(map(str, range(count)), 0)).encode()


CHAT, RANK = "/v1/chat/completions", "/v1/rank"
BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "json-errors": (RANK, lambda: numbers("images", 400_000)),
    "json-small": (RANK, lambda: numbers("candidates", 250_000)),
    "json-large": (RANK, lambda: numbers("images", 2_000_000)),
    "json-keys": (CHAT, lambda: keys(80_000)),
    "json-keys-small": (CHAT, lambda: keys(40_000)),
    "spaces": (CHAT, lambda: chat("\n" * 15_900 + "x", 2)),
}
"""Single requests: the path and the body. White space in front of a mark of an image was searched
in quadratic time."""


def scans(count: int = 12_000, side: int = 1024) -> bytes:
    """A progressive JPEG whose last scan, which changes nothing, is there ``count`` times more."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def exif_segments(count: int = 12_000) -> bytes:
    """A JPEG with many segments of Exif, which Pillow joins one by one."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG")
    content = b"Exif\0\0" + bytes(1000)
    segment = struct.pack(">BBH", 0xFF, 0xE1, len(content) + 2) + content
    return file.getvalue()[:2] + segment * count + file.getvalue()[2:]


def gif_comments(count: int = 20_000) -> bytes:
    """A GIF with a comment of many blocks, which Pillow joins one by one."""
    file = io.BytesIO()
    Image.new("1", (32, 32)).save(file, "GIF")
    data = file.getvalue()
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    return data[:at] + b"!\xfe" + (b"\xff" + b"c" * 255) * count + b"\0" + data[at:]


IMAGES: dict[str, Callable[[], bytes]] = {
    "image-scans": scans,
    "image-exif": exif_segments,
    "image-comments": gif_comments,
}


def costly(server: Server, image: bytes) -> Row:
    """An image that costs a decoder seconds, and what Pillow alone needs for it."""
    began = time.process_time()
    with Image.open(io.BytesIO(image)) as opened:
        opened.load()
    alone = time.process_time() - began
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    rank = {"images": [url], "instruction": "what is it?", "candidates": ["a", "b"]}
    body = json.dumps(rank).encode()
    text, stopped = post(server, RANK, body)
    _, reason = server.ask("POST", RANK, body)
    refused = "expected at most" in reason
    return f"Pillow alone {alone:.1f} s; {text}", stopped and refused


def prompts(server: Server) -> Row:
    """5 MB of text beside honest questions."""
    honest = chat("what is red?")
    with watching(lambda: server.ask("POST", CHAT, honest)) as others:
        time.sleep(0.5)
        body = chat("some words of a long text " * 600, 320)
        status, _ = server.ask("POST", CHAT, body, timeout=120)
    text = f"{len(body) / 1e6:.1f} MB: {status}, an honest question waited {max(others):.2f} s"
    return text, status == 413 and max(others) < 3


def prompt_allowed(server: Server) -> Row:
    """The longest text that is answered."""
    honest = chat("what is red?")
    with watching(lambda: server.ask("POST", CHAT, honest)) as others:
        time.sleep(0.5)
        status, _ = server.ask("POST", CHAT, chat("a b " * 3900, 2), timeout=120)
    return f"{status}, an honest question waited {max(others):.2f} s", max(others) < 3


def half_headers(server: Server) -> Row:
    """Connections that never finish their headers."""
    began = time.monotonic()
    connections = [server.open(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n") for _ in range(40)]
    left = len(connections)
    for connection in connections:
        connection.settimeout(max(0.01, began + 15 - time.monotonic()))
        with contextlib.suppress(TimeoutError):
            while connection.recv(1 << 16):  # ends when the server closes
                pass
            left -= 1
        connection.close()
    return f"{left} of 40 open after {time.monotonic() - began:.0f} s", left == 0


def flood(server: Server) -> Row:
    """More connections than there are descriptors, for five seconds."""
    size, opened, failed, asked = server.log.stat().st_size, [], 0, 0
    until = time.monotonic() + 5
    while time.monotonic() < until:
        while len(opened) < 2 * DESCRIPTORS:
            try:
                opened.append(server.open(b"GET /"))
            except OSError:
                break
        asked += 1
        try:
            server.ask("GET", "/healthz", timeout=1)
        except OSError:
            failed += 1
        time.sleep(0.05)
    written = (server.log.stat().st_size - size) / 5 * 60 / 1e6
    for connection in opened:
        connection.close()
    text = f"health failed {failed} of {asked} times, log {written:.2f} MB a minute"
    return text, not failed and written < 1


def log_lines(server: Server) -> Row:
    """Requests that are no HTTP, and long paths, for five seconds."""
    size, sent, until = server.log.stat().st_size, 0, time.monotonic() + 5
    while time.monotonic() < until:
        for first in (b"?\r\n\r\n", b"GET /" + b"a" * 10_000 + b" HTTP/1.0\r\n\r\n"):
            with contextlib.suppress(OSError), server.open(first) as connection:
                connection.recv(1 << 16)
            sent += 1
    written = (server.log.stat().st_size - size) / 5 * 60 / 1e6
    return f"{sent / 5:.0f} requests a second, log {written:.2f} MB a minute", written < 1


def sigterm(server: Server) -> Row:
    """How long the server takes to end beside a tab of a browser that stays open."""
    with server.open(b"GET /page HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as tab:
        tab.recv(1 << 16)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=120)
    took = time.monotonic() - began
    return f"ended after {took:.1f} s", took < 10


def foreign_host(server: Server) -> Row:
    """A page of a name that its owner has let resolve to this machine."""
    statuses = [
        server.ask("POST", RANK, b"{}", Host=host, Origin=f"http://{host}")[0]
        for host in ("rebound.example:8000", "localhost.rebound.example", "127.0.0.1.nip.example")
    ]
    return f"{statuses}", set(statuses) == {421}


def foreign_origin(server: Server) -> Row:
    """A good question that a page elsewhere makes the browser send."""
    statuses = [
        server.ask("POST", CHAT, chat("what is red?"), Origin=origin)[0]
        for origin in ("http://elsewhere.example", "http://127.0.0.1:9", "null")
    ]
    return f"{statuses}", set(statuses) == {403}


def uploads(server: Server) -> Row:
    """Large images, as many as are taken in five seconds from four clients, and what is left."""
    file = io.BytesIO()
    side = 2000
    noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(file, "BMP")
    url = "data:image/bmp;base64," + base64.b64encode(file.getvalue()).decode()
    body = json.dumps({"images": [url], "instruction": "?", "candidates": ["a"]}).encode()
    until, sent, lock = time.monotonic() + 5, 0, threading.Lock()

    def send() -> None:
        nonlocal sent
        while time.monotonic() < until:
            status, _ = server.ask("POST", RANK, body, timeout=60)
            with lock:
                sent += len(body) * (status == 200)

    with watching(lambda: server.ask("GET", "/healthz")) as health:
        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    left = sum(1 for _ in server.temporary.iterdir())
    text = f"{sent / 5 * 60 / 1e9:.1f} GB a minute, {left} files left, health {max(health):.2f} s"
    return f"{text}, {server.peak_mb:.0f} MB at most", not left and max(health) < 5


class Failing:
    """An engine whose answers fail after ``fails_after`` tokens where several run."""

    def __init__(self, engine: Engine, fails_after: int) -> None:
        self.__dict__.update(engine=engine, fails_after=fails_after)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def running(self) -> Any:
        running: Any = self.engine.running()
        step, steps = running.step, itertools.count(1)

        def failing() -> None:
            if next(steps) >= self.fails_after and len(running) > 1:
                raise RuntimeError("out of memory")
            step()

        running.step = failing
        return running


def streams(engine: Engine, fails_after: int = 4, count: int = 4) -> list[tuple[str, str]]:
    """The text that each stream of a batch that fails got, and the answer that it should be."""
    failing: Any = Failing(engine, fails_after)
    batcher = Batcher(failing)
    rng = torch.Generator().manual_seed(0)
    side = engine.model.config.vision.image_size
    pixels = torch.randn(3, side, side, generator=rng)
    decoding = engine.decoding.override(max_new_tokens=24, min_new_tokens=12, num_beams=1)
    jobs = [
        Job(pixels=(pixels,), instruction=f"describe {number} things", decoding=decoding)
        for number in range(count)
    ]
    got: list[list[str]] = [[] for _ in jobs]
    for job, pieces in zip(jobs, got, strict=True):
        job.listen(pieces.append)
    with batcher._changed:  # all in one batch
        batcher._jobs += jobs
        batcher._changed.notify()
    answers = [job.future.result(120).text for job in jobs]
    batcher.close()
    return [("".join(pieces), answer) for pieces, answer in zip(got, answers, strict=True)]


def failed_batch(engine: Engine) -> Row:
    wrong = sum(got != answer for got, answer in streams(engine))
    return f"{wrong} of 4 streams repeat text", wrong == 0


def dead_thread(engine: Engine) -> Row:
    """What is reported once the model's thread has ended."""
    app = create_app({"model": engine})

    def die(*_: Any) -> None:
        raise RuntimeError("the thread ends here")

    batcher = app.state.service.batchers["model"]
    batcher.on_batch = die
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        client.post(CHAT, content=chat("what is red?"), headers={"Content-Type": JSON})
        batcher._thread.join()
        status = client.get("/healthz").status_code
    return f"/healthz answers {status}", status == 503


SLEEPY = """
import time
from PIL import ImageFile
load = ImageFile.ImageFile.load
def sleep(self):
    while self.width == 21:
        time.sleep(0.1)
    return load(self)
ImageFile.ImageFile.load = sleep
"""
"""Python's sitecustomize by which no image of 21 pixels' width is ever decoded, as by a bug."""


@contextlib.contextmanager
def sleepy_decoders() -> Iterator[dict[str, Any]]:
    """A request whose image is not decoded by processes that start meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(SLEEPY)
        sys.path.insert(0, folder)
        try:
            yield {"images": [image_url(21)], "instruction": "?", "candidates": ["a"]}
        finally:
            sys.path.remove(folder)


def slow_decoder(engine: Engine) -> Row:
    """Twelve images that are never decoded, and an honest question among them."""
    app = create_app({"model": engine}, ServeConfig(timeout_s=4))
    client = TestClient(app, "http://localhost")
    with sleepy_decoders() as sleepy, ThreadPoolExecutor(12) as pool, client:
        app.state.service.decoders.start()
        sent = [pool.submit(client.post, RANK, json=sleepy) for _ in range(12)]
        statuses = [one.result().status_code for one in sent]
        began = time.monotonic()
        honest = client.post(RANK, json={**sleepy, "images": [image_url()]}).status_code
        waited = time.monotonic() - began
    text = f"{sorted(set(statuses))}, then an honest question {honest} after {waited:.2f} s"
    return text, set(statuses) == {504} and honest == 200


def key_guesses(engine: Engine) -> Row:
    """Wrong keys from 48 clients for five seconds, and a right one among them."""
    app = create_app({"model": engine}, ServeConfig(api_keys=("right",)))
    began, statuses = time.monotonic(), Counter[int]()
    with TestClient(app, "http://localhost") as client, ThreadPoolExecutor(48) as pool:

        def get(key: str) -> int:
            return client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        def guess(number: int) -> None:
            while time.monotonic() < began + 5:
                statuses[get(f"guess {number}")] += 1

        guesses = [pool.submit(guess, number) for number in range(48)]
        with watching(lambda: get("right")) as right:
            for one in guesses:
                one.result()
    minutes = (time.monotonic() - began) / 60
    text = f"{statuses[401] / minutes:.0f} answers 401 a minute, {statuses[429] / minutes:.0f} 429"
    return f"{text}, a right key waited {max(right):.2f} s", statuses[401] < 100 and max(right) < 3


SERVER: dict[str, Callable[[Server], Row]] = {
    name: lambda server, path=path, body=body: post(server, path, body())
    for name, (path, body) in BODIES.items()
}
SERVER |= {
    name: lambda server, image=image: costly(server, image()) for name, image in IMAGES.items()
}
SERVER |= {
    "prompts": prompts,
    "prompt-allowed": prompt_allowed,
    "half-headers": half_headers,
    "flood": flood,
    "log": log_lines,
    "foreign-host": foreign_host,
    "foreign-origin": foreign_origin,
    "uploads": uploads,
    "sigterm": sigterm,
}

INSIDE = {
    "failed-batch": failed_batch,
    "dead-thread": dead_thread,
    "slow-decoder": slow_decoder,
    "key-guesses": key_guesses,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="starter")
    parser.add_argument("--only", nargs="*", default=[*SERVER, *INSIDE])
    args = parser.parse_args()
    rows: dict[str, Row] = {}
    server: Server | None = None
    try:
        for name in args.only:
            if name in INSIDE:
                rows[name] = INSIDE[name](Engine.from_pretrained(args.model, device="cpu"))
            else:
                server = server or Server(args.model)
                rows[name] = SERVER[name](server)
                if not rows[name][1] or server.process.poll() is not None:
                    server.kill()  # the next attack meets a server that works
                    server = None
            print(f"| {name} | {rows[name][0]} | {'' if rows[name][1] else 'NOT '}stopped |")
            sys.stdout.flush()
    finally:
        if server is not None:
            server.kill()
    sys.exit(not all(stopped for _, stopped in rows.values()))


if __name__ == "__main__":
    main()
