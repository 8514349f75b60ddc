"""Trackers receive the lines of metrics.jsonl, also those of a resumed run."""

import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instructblip.training.log import METRICS, read_metrics
from instructblip.training.trackers import check_trackers, flatten
from instructblip.training.train import train

from .toy import Toy, ToyBatches, toy_config, toy_score


def test_tensorboard_shows_the_lines_of_metrics_jsonl(tmp_path: Path):
    """A run that was killed after its last checkpoint repeats steps, and each has one point."""
    config = toy_config(report_to=["tensorboard"], log_every=1, keep_last=9)
    train(Toy(), ToyBatches(config), toy_score, config, tmp_path)
    for step in (24, 21):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:06d}")
    train(Toy(), ToyBatches(config), toy_score, config, tmp_path, resume=True)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [(line["step"], dict(flatten(line))) for line in read_metrics(tmp_path / METRICS)]
    for name in ("loss", "losses/even", "lr", "grad_norm", "validation/score"):
        expected = [(step, line[name]) for step, line in lines if name in line]
        assert len(expected) >= 3
        points = [(point.step, point.value) for point in events.Scalars(name)]
        assert points == [(step, pytest.approx(value, rel=1e-5)) for step, value in expected]


def test_mlflow_continues_a_run_and_has_each_point_once(tmp_path: Path):
    mlflow = pytest.importorskip("mlflow")
    config = toy_config(report_to=["mlflow"], log_every=1, keep_last=9)
    train(Toy(), ToyBatches(config), toy_score, config, tmp_path)
    for step in (24, 21):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:06d}")
    train(Toy(), ToyBatches(config), toy_score, config, tmp_path, resume=True)

    (run,) = mlflow.search_runs(experiment_names=["instructblip"], output_format="list")
    assert (tmp_path / "mlflow.db").is_file()
    history = mlflow.MlflowClient().get_metric_history
    for name, steps in (("loss", [*range(1, 25)]), ("validation/score", [8, 16, 24])):
        assert sorted(point.step for point in history(run.info.run_id, name)) == steps


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"pip install wandb.*instructblip\[track\]"):
        check_trackers(["tensorboard", "wandb"])
    (tmp_path / "wandb").mkdir()  # what an earlier run of wandb left
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="wandb is not installed"):
        check_trackers(["wandb"])


def test_an_unknown_tracker_is_refused_when_the_recipe_is_read():
    with pytest.raises(ValidationError, match="tensorboard"):
        toy_config(report_to=["clearml"])


def test_flatten_keeps_numbers_alone():
    line = {"step": 3, "loss": 1, "losses": {"a": 2.5}, "name": "x"}
    assert dict(flatten(line)) == {"loss": 1.0, "losses/a": 2.5}
