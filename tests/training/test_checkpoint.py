"""Checkpoints against kills at every moment, torn files and a full disk."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from instructblip.training import checkpoint as checkpoints
from instructblip.training.checkpoint import (
    DamagedCheckpointError,
    load_checkpoint,
    load_latest,
    prune,
    save_checkpoint,
    saved_steps,
    write_directory,
)
from instructblip.training.log import read_metrics, without_timings
from instructblip.training.train import train
from tests.core.crash import crashes
from tests.training.toy import Toy, ToyBatches, toy_config, toy_score

ROOT = Path(__file__).parents[2]


def run(folder: Path, pause: float = 0.0, **changes: object) -> Toy:
    config, model = toy_config(**changes), Toy()

    def score(model: Toy) -> dict[str, float]:
        time.sleep(pause)
        return toy_score(model)

    export = model.save_pretrained
    train(model, ToyBatches(config), score, config, folder, resume=True, export=export)
    return model


def outcome(folder: Path, step: int) -> dict[str, object]:
    """Everything two runs must share: last weights, optimiser, exports, metrics."""
    last = load_checkpoint(folder / "checkpoints" / f"step_{step:06d}")
    moments = [s for state in last.optimizer["optimizer"]["state"].values() for s in state.values()]
    lines = [without_timings(line) for line in read_metrics(folder / "metrics.jsonl")]
    exports = {
        name: (folder / name / "model.safetensors").read_bytes() for name in ("best", "last")
    }
    return {
        "weights": {name: value.tolist() for name, value in last.parameters.items()},
        "moments": [value.tolist() for value in moments],
        "progress": last.progress,
        "exports": exports,
        "lines": lines,
        "kept": saved_steps(folder / "checkpoints"),
    }


# --- kill -9 -------------------------------------------------------------------------------------


def test_kill_at_every_change_to_the_disk(tmp_path: Path):
    """Each file operation of a short run is once the last thing the process does."""
    settings = {"steps": 5, "warmup_steps": 2, "validate_every": 4, "log_every": 2, "keep_last": 1}
    run(tmp_path / "whole", **settings)  # what torch imports lazily is now there for the forks
    expected = outcome(tmp_path / "whole", 5)
    folder = tmp_path / "cut"
    for moment in crashes(lambda: run(folder, **settings), every=3):
        run(folder, **settings)
        assert outcome(folder, 5) == expected, f"killed in front of change {moment}"
        assert not list(folder.rglob(".*")), f"killed in front of change {moment}"
        shutil.rmtree(folder)
    assert moment > 60


def test_kill_9_from_outside_at_random_moments(tmp_path: Path):
    """A real process, killed by another one until it manages to finish."""
    settings = {"steps": 60, "validate_every": 10, "save_every": 1}
    run(tmp_path / "whole", **settings)
    code = (
        "import sys; from pathlib import Path; from tests.training.test_checkpoint import run;"
        f"print('ready', flush=True); run(Path(sys.argv[1]), pause=0.02, **{settings!r})"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    delays = random.Random(0)
    for attempt in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "cut")],
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )
        assert child.stdout is not None
        child.stdout.readline()
        if attempt < 2:
            time.sleep(delays.uniform(0.05, 0.6))
            child.kill()
        child.communicate()
    assert child.returncode == 0
    assert outcome(tmp_path / "cut", 60) == outcome(tmp_path / "whole", 60)


# --- torn checkpoints ----------------------------------------------------------------------------


def small(folder: Path, step: int) -> Path:
    values = {"a": torch.full((3, 4), float(step)), "b": torch.ones(2)}
    return save_checkpoint(folder, step, values, {"optimizer": {"state": {}}}, {"best_step": None})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, Path.unlink])
@pytest.mark.parametrize(
    "name", ["parameters.safetensors", "optimizer.pt", "progress.json", "manifest.json"]
)
def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage, name: str):
    small(tmp_path, 1)
    small(tmp_path, 2)
    damage(tmp_path / "step_000002" / name)
    with pytest.warns(RuntimeWarning, match="step_000002.*the one before it"):
        loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert loaded.parameters["a"][0, 0] == 1


def test_no_complete_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path):
    cut_short(small(tmp_path, 1) / "optimizer.pt")
    with (
        pytest.warns(RuntimeWarning, match="damaged"),
        pytest.raises(DamagedCheckpointError, match="delete the folder to start over"),
    ):
        load_latest(tmp_path)


def test_prune_never_deletes_the_only_good_one(tmp_path: Path):
    for step in (1, 2, 3):
        small(tmp_path, step)
    cut_short(tmp_path / "step_000003" / "optimizer.pt")
    cut_short(tmp_path / "step_000002" / "parameters.safetensors")
    prune(tmp_path, keep_last=1, best_step=None)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1


def test_a_checkpoint_cannot_run_code(tmp_path: Path):
    path = small(tmp_path, 1)
    torch.save({"optimizer": Toy()}, path / "optimizer.pt")
    files = {
        p.name: checkpoints._fingerprint(p) for p in path.iterdir() if p.name != "manifest.json"
    }
    (path / "manifest.json").write_text(f'{{"step": 1, "files": {files}}}'.replace("'", '"'))
    with pytest.raises(Exception, match=r"(?i)weights.only|cannot be read"):
        load_checkpoint(path)


# --- a full disk ---------------------------------------------------------------------------------


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        "training.checkpoint.save_file",
        "training.checkpoint.torch.save",
        "training.checkpoint.json.dumps",
        "core.files.sync",
    ],
)
def test_disk_full_keeps_what_was_saved(tmp_path: Path, monkeypatch, where: str):
    small(tmp_path, 1)
    monkeypatch.setattr(f"instructblip.{where}", full)
    with pytest.raises(OSError, match=r"disk is full.*step_000002.*intact.*--resume") as error:
        small(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1


@pytest.mark.parametrize("big", ["parameters", "optimizer"])
def test_a_file_above_the_limit_is_named_like_a_full_disk(tmp_path: Path, big: str):
    given = {"parameters": {"w": torch.zeros(2)}, "optimizer": {}, "progress": {}}
    given[big] = {"w": torch.zeros(50_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"ulimit -f.*step_000002.*intact.*--resume") as error:
            save_checkpoint(tmp_path, 2, **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG


def test_a_quota_is_named_like_a_full_disk(tmp_path: Path, monkeypatch):
    def above(*_args, **_kwargs):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("instructblip.training.checkpoint.save_file", above)
    with pytest.raises(OSError, match=r"quota is used up.*step_000002.*intact.*--resume"):
        small(tmp_path, 2)


@pytest.mark.parametrize("when", [4, 8])
def test_disk_full_in_a_run_and_resume(tmp_path: Path, monkeypatch, when: int):
    run(tmp_path / "whole")
    save, calls = checkpoints.save_file, []

    def sometimes(*args, **kwargs):
        calls.append(1)
        (full if len(calls) == when else save)(*args, **kwargs)

    monkeypatch.setattr("instructblip.training.checkpoint.save_file", sometimes)
    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path / "cut")
    run(tmp_path / "cut")
    assert outcome(tmp_path / "cut", 24) == outcome(tmp_path / "whole", 24)


def test_other_errors_while_writing_are_not_called_a_full_disk(tmp_path: Path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model").write_text("old")

    def write() -> None:
        with write_directory(tmp_path / "best") as path:
            (path / "a").write_text("half")
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "model").read_text() == "old"
