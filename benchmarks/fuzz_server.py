"""Malformed requests: no 5xx, no path or trace in an answer, memory back to where it was.

    python benchmarks/fuzz_server.py [--requests 10000] [--seconds 300] [--start 0]

In rounds of 200: half of them are drawn by schemathesis from the OpenAPI description, the other
half are good requests with something broken: cut and corrupted images, decompression bombs, wrong
types, half characters, huge bodies. After ``--seconds`` it stops and names the round to ``--start``
from; the requests of a round depend on its number alone.
"""

import argparse
import base64
import contextlib
import copy
import ctypes
import gc
import io
import json
import math
import random
import re
import resource
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from PIL import Image

LEAK = re.compile(
    r"Traceback|site-packages|\.py\b|/(home|usr|tmp|work|root|src|etc)/|0x[0-9a-f]{8}"
)
ROUND = 200
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, "", "x" * 20_000, "\ud800", "\x00", [], [[]], {}, {"a": {}},
)  # fmt: skip


def image_file(rng: random.Random, kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((rng.randint(1, 40), rng.randint(1, 40)), 80).save(file, format=kind)
    return file.getvalue()


def bomb(rng: random.Random) -> bytes:
    """A PNG that promises more pixels than anyone wants to hold, with or without the data."""
    side = rng.choice((5_000, 60_000, 2**31 - 1))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20)) * rng.randint(0, 3)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
    )


def broken_image(rng: random.Random) -> bytes:
    whole = bytearray(image_file(rng, rng.choice(("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"))))
    how = rng.randrange(4)
    if how == 0:
        return bytes(whole[: rng.randrange(len(whole))])
    if how == 1:
        for _ in range(rng.randint(1, 20)):
            whole[rng.randrange(len(whole))] = rng.randrange(256)
        return bytes(whole)
    return bomb(rng) if how == 2 else rng.randbytes(rng.randint(0, 3000))


def good(rng: random.Random, content: bytes) -> tuple[str, dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    kind = rng.random()
    if kind < 0.3:
        return "/v1/rank", {"images": [url], "instruction": "what?", "candidates": ["a", "b c"]}
    if kind < 0.5:
        more = {"image": url} if rng.random() < 0.5 else {"n": 2, "seed": 1}
        return "/v1/images/generations", {"prompt": "draw a star", "steps": 2, **more}
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    more = {"max_tokens": 2, "stream": rng.random() < 0.3}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], **more}


def spoil(rng: random.Random, body: Any) -> Any:
    """The body with one value, somewhere in it, replaced, removed or doubled."""
    body = copy.deepcopy(body)
    place: Any = body
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return body
        key = rng.choice(keys)
        inner = place[key]
        if isinstance(inner, dict | list) and rng.random() < 0.7:
            place = inner
            continue
        how = rng.random()
        if how < 0.2:
            del place[key]
        elif how < 0.3 and isinstance(place, list):
            place *= rng.choice((2, 100))
        else:
            place[key] = rng.choice(VALUES)
        return body


def broken_request(rng: random.Random) -> tuple[str, bytes]:
    """Path and body of one request that is wrong in some way, or in none."""
    path, body = good(rng, broken_image(rng) if rng.random() < 0.5 else image_file(rng, "PNG"))
    if rng.random() < 0.6:
        body = spoil(rng, body)
    content = json.dumps(body).encode()
    how = rng.random()
    if how < 0.05:
        return path, content[: rng.randrange(len(content))]
    if how < 0.1:
        return path, b" " * rng.choice((10, 1 << 20, 25 << 20)) + content
    if how < 0.13:
        return path, b"[" * rng.choice((10, 100_000))
    return path, content


class Watch:
    """Counts answers and keeps what should not have been."""

    def __init__(self) -> None:
        self.codes: Counter[int] = Counter()
        self.problems: list[str] = []

    def see(self, what: str, status: int, text: str) -> None:
        self.codes[status] += 1
        if status >= 500 or LEAK.search(text):
            self.problems.append(f"{what}: {status} {text[:300]}")


def fuzz_schema(client: TestClient, requests: int, watch: Watch, seed: int) -> None:
    """Requests that schemathesis draws from the description, valid ones and others."""
    warnings.filterwarnings("ignore")
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    for operation in operations:
        share = (requests // len(posts)) if operation in posts else max(2, requests // 50)

        @with_seed(seed)
        @settings(
            max_examples=share,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            sent = case.as_transport_kwargs(base_url="http://localhost")
            known = ("method", "url", "headers", "json", "content", "data", "params")
            sent = {name: value for name, value in sent.items() if name in known}
            response = client.request(**sent)
            watch.see(f"{case.method} {case.path}", response.status_code, response.text)

        ask()


def fuzz_bodies(client: TestClient, requests: int, watch: Watch, seed: int) -> None:
    """Good requests with something broken."""
    rng = random.Random(seed)
    for number in range(requests):
        path, content = broken_request(rng)
        response = client.post(path, content=content, headers={"content-type": "application/json"})
        watch.see(f"request {number}", response.status_code, response.text)


def fuzz_round(client: TestClient, watch: Watch, number: int) -> None:
    fuzz_schema(client, ROUND // 2, watch, seed=number)
    fuzz_bodies(client, ROUND // 2, watch, seed=number)


def resident_mb() -> float:
    """Resident memory of the process, after the C library has returned what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    from instructblip import load
    from instructblip.serving.api import create_app

    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf)
    args = parser.parse_args()
    watch, until = Watch(), time.monotonic() + args.seconds
    app = create_app({"model": load(args.model, device="cpu")})
    rounds = args.requests // ROUND
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        fuzz_round(client, Watch(), rounds)  # buffers and caches fill once
        memory, number = [resident_mb()], args.start
        while number < rounds and time.monotonic() < until:
            fuzz_round(client, watch, number)
            memory.append(resident_mb())
            number += 1
    print("| status | answers |\n|---|---|")
    for status, count in sorted(watch.codes.items()):
        print(f"| {status} | {count} |")
    print(f"{watch.codes.total()} requests, {len(watch.problems)} problems")
    print("MB after each round:", *(f"{value:.0f}" for value in memory))
    print("\n".join(watch.problems[:20]))
    if number < rounds:
        print(f"stopped; continue with --start {number}")
    sys.exit(bool(watch.problems))


if __name__ == "__main__":
    main()
