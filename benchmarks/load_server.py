"""Two versions of the server under the same load, in turns: short and long answers mixed.

    python -m benchmarks.load_server --before EARLIER/src [--model starter] [--clients 200]
        [--seconds 60] [--rounds 3] [--soak SECONDS]

Starts `instructblip serve` of the package in EARLIER/src and of this one, this one twice: keeping
nothing of earlier requests (``--shared-mb 0``), and as it is. The clients ask the same questions,
one after the other; the answers of the engine alone are those expected. Prints answers/s,
latencies, wrong answers and the server's processor time of each turn, and the ratios to the version
before in the same round. ``--soak`` instead loads this version alone, and prints its memory after
a tenth of the time and at the end. Exit code 1 for a wrong answer or an error other than 429.
"""

import argparse
import base64
import contextlib
import io
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import instructblip
from benchmarks.serve import Server, measure
from instructblip.scenes.world import render, sample_scene

TEXTS = (
    "Question: how many shapes are there? Short answer:",
    "Describe the image in detail.",
    "Is there a circle in the image?",
    "A short image description.",
)
SETTINGS = {"max_tokens": 64, "temperature": 0}
PATIENT = ("--timeout", "600")  # latencies are measured, not cut off


def questions(model: str, num_images: int) -> list[tuple[dict[str, Any], str]]:
    """Requests in a random order, and the answers that the engine gives to each alone."""
    engine, rng, asked = instructblip.load(model, device="cpu"), random.Random(0), []
    for _ in range(num_images):
        image, file = render(sample_scene(rng)), io.BytesIO()
        image.save(file, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        for text in TEXTS:
            parts = [
                {"type": "text", "text": text},
                {"type": "image_url", "image_url": {"url": url}},
            ]
            request = {"messages": [{"role": "user", "content": parts}], **SETTINGS}
            asked.append((request, engine.answer(image, text, max_new_tokens=64, temperature=0)))
    rng.shuffle(asked)
    return asked


def show(*cells: Any) -> None:
    texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print("| " + " | ".join(texts) + " |", flush=True)


def compare(args: argparse.Namespace, asked: list) -> bool:
    """Whether all turns are free of errors and wrong answers."""
    here = Path(instructblip.__file__).parent.parent
    kinds = {
        "before": Server(args.model, *PATIENT, source=args.before),
        "nothing shared": Server(args.model, *PATIENT, "--shared-mb", "0", source=here),
        "after": Server(args.model, *PATIENT, source=here),
    }
    ratios: dict[str, list[tuple[float, ...]]] = {name: [] for name in kinds}
    good = True
    with contextlib.ExitStack() as stack:
        for server in kinds.values():
            stack.enter_context(server)
            measure(server, asked, 8, 2)  # the first requests are slower
        for number in range(args.rounds):
            first: dict[str, Any] = {}
            for name, server in kinds.items():
                row = measure(server, asked, args.clients, args.seconds)
                first = first or row
                if not number and name == "before":
                    show("round", "server", *row)
                    show(*["---"] * (len(row) + 2))
                show(number, name, *row.values())
                good = good and not row["errors"] and not row["differing"]
                keys = ("requests/s", "median s", "p95 s", "CPU ms")
                ratios[name].append(tuple(row[key] / first[key] for key in keys))
    print("median ratio to the version before of requests/s, median s, p95 s, CPU ms:")
    for name, rows in ratios.items():
        show(name, *(statistics.median(column) for column in zip(*rows, strict=True)))
    return good


def soak(args: argparse.Namespace, asked: list) -> bool:
    """Whether the server gives no wrong answer; prints its memory and its figures by tenths."""
    good = True
    with Server(args.model, *PATIENT) as server:
        levels = []
        for tenth in range(10):
            row = measure(server, asked, args.clients, args.soak / 10)
            levels.append(server.resident_mb())
            if not tenth:
                show("tenth", "resident MiB", *row)
                show(*["---"] * (len(row) + 2))
            show(tenth + 1, levels[-1], *row.values())
            good = good and not row["errors"] and not row["differing"]
    print(f"memory of the last tenth: {100 * (levels[-1] / levels[0] - 1):+.1f} % of the first")
    return good


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--soak", type=float, default=0)
    args = parser.parse_args()
    asked = questions(args.model, args.images)
    sys.exit(not (soak if args.soak else compare)(args, asked))


if __name__ == "__main__":
    main()
