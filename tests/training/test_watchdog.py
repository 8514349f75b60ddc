"""A rank that hangs ends with its rank, step and samples on standard error."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from instructblip.training.checkpoint import saved_steps
from instructblip.training.watchdog import EXIT_CODE, Watchdog

ROOT = Path(__file__).parents[2]
HANG = """
import sys, time
from pathlib import Path
from instructblip.training.train import train
from tests.training.toy import Toy, ToyBatches, toy_config

class Hanging(ToyBatches):
    def iterate(self, step):
        for number, batch in enumerate(super().iterate(step)):
            if number == 4 and sys.argv[2] == "data":
                time.sleep(60)
            yield batch

class Stuck(Toy):
    calls = 0
    def loss(self, batch):
        self.calls += 1
        if self.calls == 5 and sys.argv[2] == "step":
            time.sleep(60)
        return super().loss(batch)

config = toy_config(watchdog_seconds=1.5, validate_every=None)
train(Stuck(), Hanging(config), None, config, Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("where", "reported"),
    [("data", "waiting for data"), ("step", "in the step for more than 1.5 s")],
)
def test_names_rank_step_and_samples(tmp_path: Path, where: str, reported: str):
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path), where],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
    )
    assert child.returncode == EXIT_CODE, child.stderr
    assert f"rank 0 of 1: step 4, {reported}" in child.stderr
    assert ("even/32, odd/33" in child.stderr) == (where == "step")
    assert "most recent call first" in child.stderr  # where each thread was
    assert saved_steps(tmp_path / "checkpoints") == [3]


def test_the_thread_ends_with_the_run():
    """One that lived into Python's shutdown, the last to hold a batch, aborted a finished run."""
    with Watchdog(60.0):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
