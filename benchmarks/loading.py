"""Host memory of loading the start of a run, as on a GPU: frozen weights in bf16, the rest in fp32.

Writes a model of some 1.4 GB in fp32 (zeros) and loads it in a new process, as `instructblip train`
does. Prints the most memory of the process beyond that of the imports: "anonymous" is what it alone
holds, "resident" adds pages of files, which several processes share and the system can drop.

    python -m benchmarks.loading
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.side_by_side import LLAMA, SIZES, TINY, config_of, layer_sizes
from instructblip.core.files import read_json
from instructblip.experiment import model as start
from instructblip.model.checkpoints.weights import NoRandomWeights
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import load_recipe

SIZES["loaded"] = {**TINY, "language": {**LLAMA, **layer_sizes(8, 1536, 12, 4096)}}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config_of("loaded").save_pretrained(folder)
        config = InstructBlipConfig.from_transformers(read_json(folder / "config.json"))
        with NoRandomWeights():
            model = InstructBlip(config)
        parameters = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder)
        command = [sys.executable, "-m", "benchmarks.loading", "--load", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    peaks = json.loads(done.stdout.splitlines()[-1])
    print(f"{parameters:,} parameters, {parameters * 4 / 2**20:,.0f} MiB in fp32")
    for what, mib in peaks.items():
        print(f"{what:20} {mib:8,.0f} MiB")
    print(json.dumps({"parameters": parameters, **peaks}))


def load(folder: str) -> None:
    """Load the model, and print the peaks."""
    recipe = load_recipe("quickstart", [f"model.start={folder}", "training.device=cpu"])
    half = torch.bfloat16
    start.training_dtypes = lambda _: (half, half)  # those of a GPU
    torch.nn.Linear(8, 8).to(half)  # what torch allocates once
    before = memory()
    peaks, ended = dict(before), threading.Event()

    def look() -> None:
        while not ended.is_set():
            peaks.update({what: max(peaks[what], now) for what, now in memory().items()})
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    model = start.load_model(recipe)
    ended.set()
    thread.join()
    kept = {f"{what}, after": now for what, now in memory().items()}
    assert next(model.language_model.parameters()).dtype == half
    figures = {f"{what}, peak": value for what, value in peaks.items()} | kept
    names = {what: what.split(",")[0] for what in figures}
    print(json.dumps({what: round(figures[what] - before[names[what]]) for what in figures}))


def memory() -> dict[str, float]:
    """MiB of this process."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in text.splitlines())
    fields = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {name: int(lines[field].split()[0]) / 1024 for name, field in fields.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load)
    else:
        main()
