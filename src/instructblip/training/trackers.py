"""Experiment trackers that receive a copy of metrics.jsonl: ``training.report_to``.

metrics.jsonl stays the truth: a tracker gets the same lines, flattened (``losses/vqav2``,
``validation/score``). Each tracker stores its files below the run directory and sends nothing to a
server, unless its own environment variable says so (``WANDB_MODE``, ``MLFLOW_TRACKING_URI``,
``SWANLAB_MODE``, ``TRACKIO_SPACE_ID``). A resumed run continues the run of the tracker.
"""

import importlib.util
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

TrackerName = Literal["trackio", "tensorboard", "wandb", "mlflow", "swanlab"]
PROJECT = "instructblip"


@runtime_checkable
class Tracker(Protocol):
    """Where the numbers of a line go."""

    def log(self, values: Mapping[str, float], step: int) -> object: ...

    def close(self) -> object: ...


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ValueError for a tracker that is not installed, naming its package."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # a folder of that name, as wandb leaves one where it runs, is a package without an origin
        if spec is None or spec.origin is None:
            raise ValueError(
                f"training.report_to: {name} is not installed: run `pip install {name}` (for "
                f"all trackers `pip install 'instructblip[track]'`), or take {name} out of the list"
            )


def open_trackers(names: Sequence[TrackerName], folder: Path, start: int) -> list[Tracker]:
    """The trackers ``names`` of the run in ``folder``, which continues after step ``start``."""
    check_trackers(names)
    path = str(folder.absolute())
    run = f"{folder.name}-{zlib.crc32(path.encode()):08x}"  # many folders are called "run"
    return [_TRACKERS[name](folder, run, start) for name in names]


def flatten(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics.jsonl with the path of each: ``losses/vqav2``."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}{name}", float(value)


class _TensorBoard:
    def __init__(self, folder: Path, run: str, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Points of an interrupted run after the step that the run resumes from are dropped.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, folder: Path, run: str, start: int) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").absolute()))
        trackio = import_module("trackio")

        self._run = trackio.init(PROJECT, name=run, resume="allow", embed=False)
        self.close = trackio.finish

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)


class _Wandb:
    def __init__(self, folder: Path, run: str, start: int) -> None:
        wandb = import_module("wandb")

        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=PROJECT, name=run, id=run, dir=folder, mode=mode, resume="allow"
        )
        self.close = self._run.finish

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)


class _Mlflow:
    def __init__(self, folder: Path, run: str, start: int) -> None:
        mlflow = import_module("mlflow")

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        mlflow.set_experiment(PROJECT)
        earlier = mlflow.search_runs(
            filter_string=f"tags.mlflow.runName = '{run}'", output_format="list"
        )
        mlflow.start_run(earlier[0].info.run_id if earlier else None, run_name=run)
        self._log, self.close = mlflow.log_metrics, mlflow.end_run
        # Points cannot be removed: a run that repeats steps leaves out those that are there.
        history = mlflow.MlflowClient().get_metric_history
        self._last = {
            name: max(point.step for point in history(earlier[0].info.run_id, name))
            for name in (earlier[0].data.metrics if earlier else ())
        }

    def log(self, values: Mapping[str, float], step: int) -> None:
        new = {name: value for name, value in values.items() if step > self._last.get(name, 0)}
        if new:
            self._log(new, step=step)


class _Swanlab:
    def __init__(self, folder: Path, run: str, start: int) -> None:
        swanlab = import_module("swanlab")

        mode = os.environ.get("SWANLAB_MODE", "offline")
        self._run = swanlab.init(
            project=PROJECT, name=run, log_dir=str(folder / "swanlab"), mode=mode
        )
        self.close = swanlab.finish

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)


_TRACKERS: dict[TrackerName, type] = {
    "trackio": _Trackio,
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "swanlab": _Swanlab,
}
assert set(_TRACKERS) == set(get_args(TrackerName))
