"""Many clients at once: every answer as from one request alone, and the gain of micro-batching.

    python benchmarks/serve.py [--model starter] [--clients 64] [--seconds 60]

Starts `instructblip serve` twice, with batches of up to 32 and with one request at a time, and asks
both the same questions. Prints requests/s, latencies, refusals and differing answers; exit code 1
for any error other than 429, broken connections too, or any answer that differs from
``Engine.answer`` of that one request.
``CPU ms`` is what the server's process spends on an answer: that ratio holds on a busy machine too.
"""

import argparse
import asyncio
import base64
import io
import itertools
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

import instructblip
from instructblip.scenes.world import render, sample_scene

INSTRUCTIONS = ("A short image description.", "Question: how many shapes are there? Short answer:")


def questions(model: str, max_tokens: int) -> list[tuple[dict[str, Any], str]]:
    """Requests and the answers that the engine gives to each alone."""
    engine, rng, asked = instructblip.load(model, device="cpu"), random.Random(0), []
    for number in range(24):
        image = render(sample_scene(rng))
        file = io.BytesIO()
        image.save(file, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        text = INSTRUCTIONS[number % 2]
        parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
        request = {"messages": [{"role": "user", "content": parts}], "max_tokens": max_tokens}
        asked.append((request, engine.answer(image, text, max_new_tokens=max_tokens)))
    return asked


class Server:
    """`instructblip serve` as a separate process, of the package in ``source`` if given."""

    def __init__(self, model: str, *options: str, source: Path | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = ("--model", model, "--port", str(self.port), "--no-page", *options)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "instructblip", "serve", *options],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | ({"PYTHONPATH": str(source)} if source else {}),
        )
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        for _ in range(600):
            try:
                httpx.get(self.address + "/healthz").raise_for_status()
                return self
            except httpx.HTTPError:
                time.sleep(0.2)
        raise TimeoutError("the server does not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=90)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        """MiB of memory that the process has."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def load(address: str, asked: list, clients: int, seconds: float) -> dict[str, Any]:
    """Figures of ``clients`` that ask one question after the other for ``seconds``."""
    latencies: list[float] = []
    codes: dict[int, int] = {}
    wrong = 0
    order, end = itertools.cycle(asked), time.monotonic() + seconds

    async def ask_on(client: httpx.AsyncClient) -> None:
        nonlocal wrong
        while time.monotonic() < end:
            request, expected = next(order)
            began = time.monotonic()
            try:
                reply = await client.post(address + "/v1/chat/completions", json=request)
            except httpx.TransportError:
                codes[0] = codes.get(0, 0) + 1
                continue
            codes[reply.status_code] = codes.get(reply.status_code, 0) + 1
            if reply.status_code == 200:
                latencies.append(time.monotonic() - began)
                wrong += reply.json()["choices"][0]["message"]["content"] != expected
            elif reply.status_code == 429:
                await asyncio.sleep(0.1)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        began = time.monotonic()
        await asyncio.gather(*(ask_on(client) for _ in range(clients)))
        took = time.monotonic() - began
    return {
        "requests/s": len(latencies) / took,
        "median s": statistics.median(latencies),
        "p95 s": statistics.quantiles(latencies, n=20)[-1],
        "answers": len(latencies),
        "429": codes.pop(429, 0),
        "errors": sum(n for code, n in codes.items() if code != 200),
        "differing": wrong,
    }


def measure(server: Server, asked: list, clients: int, seconds: float) -> dict[str, Any]:
    """`load`, and the processor time of an answer."""
    before = server.cpu_seconds()
    row = asyncio.run(load(server.address, asked, clients, seconds))
    return row | {"CPU ms": 1000 * (server.cpu_seconds() - before) / row["answers"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="starter")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    asked = questions(args.model, args.max_tokens)
    rows = {}
    for max_batch in (32, 1):
        with Server(args.model, "--max-batch", str(max_batch)) as server:
            rows[max_batch] = measure(server, asked, args.clients, args.seconds)
    print("| batches of up to | " + " | ".join(rows[1]) + " |")
    print("|---|" + "---|" * len(rows[1]))
    for max_batch, row in rows.items():
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        print(f"| {max_batch} | " + " | ".join(cells) + " |")
    faster = rows[32]["requests/s"] / rows[1]["requests/s"]
    cheaper = rows[1]["CPU ms"] / rows[32]["CPU ms"]
    print(f"micro-batching: {faster:.1f} times the requests/s, 1/{cheaper:.1f} of the CPU time")
    sys.exit(any(row["errors"] or row["differing"] for row in rows.values()))


if __name__ == "__main__":
    main()
