"""The script for the first GPU runs from end to end, here on a CPU at toy size."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_dry_run_checks_trains_and_writes_its_tables(tmp_path: Path):
    sizes = ["--sizes", "tiny", "tiny-t5", "--device", "cpu"]
    small = ["--steps", "3", "--batch", "2", "--tokens", "200", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu_first.sh"), *sizes, *small],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu_first_cpu_*.md")
    text = path.read_text("utf-8")
    for line in (
        "packed rows of heads of width 128:",
        "attention without cuDNN:",
        "attention with cuDNN, a row without a token: finite",
        "attention with cuDNN, scores below -88: finite",
        "T5's bias, aligned, in a fused kernel:",
        "bf16 TFLOP/s",
        "## Where the time of tiny-t5 goes",
    ):
        assert line in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| tiny")]
    kinds = ["in the step", "stored features", "in the step, one sample"]
    assert [row[1].strip() for row in rows] == kinds * 2
    assert all(float(row[4]) > 0 for row in rows)
    assert text.count("optimiser") == 2  # in the profiles
