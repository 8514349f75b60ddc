"""Runs of a studio: commands of `instructblip` as processes, and their state, read from files.

A run has a folder ``tuned``, ``tuned-2``, ... and is never replaced. Its process has a separate
session and keeps the lock ``.studio/job``, so it survives the server, and a server that starts
later sees it.
"""

import hashlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from instructblip.core.files import is_locked, locked, read_json, write_json
from instructblip.evaluation.result import RESULT, Result
from instructblip.evaluation.verdict import Verdict, worst
from instructblip.experiment.tune import read_held_back, verdicts_of
from instructblip.recipe.load import read_values
from instructblip.recipe.schema import RECIPE_FILE
from instructblip.studio.project import Project
from instructblip.training.checkpoint import saved_steps
from instructblip.training.log import METRICS, read_metrics
from instructblip.training.run_directory import LOCK_FILE

Status = Literal["none", "running", "stopped", "failed", "finished"]
LOG_BYTES = 64 << 10
_ERROR = "instructblip: "
"""Begins an error of a command."""
MOST_POINTS = 300
"""Points of a curve that the page draws."""
SHOWN_SAMPLES = 60
"""Held-back examples that the page shows before and after."""


class Samples(NamedTuple):
    """One benchmark before and after tuning."""

    before: Result
    after: Result
    blind: Result | None


class Runs:
    """The runs of a project, and the one process that may be at work.

    Args:
        out: the folder of the first run.
        start: the model that tuning starts from.
        overrides: settings of the recipe, as `tune` takes them.
    """

    def __init__(
        self, project: Project, out: Path, start: str, overrides: Sequence[str] = ()
    ) -> None:
        self.project, self.out, self.start = project, out, start
        self.overrides = ["training.log_every=5", *overrides]
        self._process: subprocess.Popen[bytes] | None = None
        self._working = threading.RLock()
        self._results: tuple[Any, dict[str, Any]] | None = None

    # Folders

    def folders(self) -> list[Path]:
        """The folders of runs, the newest last."""
        pattern = re.compile(rf"{re.escape(self.out.name)}(?:-(\d+))?")
        if not self.out.parent.is_dir():
            return []
        numbered = [
            (int(match[1] or 1), path)
            for path in self.out.parent.iterdir()
            if (match := pattern.fullmatch(path.name)) and _holds_run(path)
        ]
        return [path for _, path in sorted(numbered)]

    @property
    def latest(self) -> Path | None:
        """The folder of the newest run."""
        return next(reversed(self.folders()), None)

    @property
    def finished(self) -> Path | None:
        """The folder of the newest run that has a report."""
        return next((path for path in reversed(self.folders()) if is_finished(path)), None)

    def _next(self) -> Path:
        if self.latest is None:
            return self.out
        number = int(self.latest.name.removeprefix(self.out.name)[1:] or 1) + 1
        return self.out.with_name(f"{self.out.name}-{number}")

    # Processes

    def tune(self, resume: bool = False, anyway: bool = False) -> None:
        """Start a run, or continue the newest one. Raises ValueError if one is at work."""
        with self._working:
            self._refuse_busy()
            out = self.latest if resume else self._next()
            if out is None:
                raise ValueError("there is no run to continue; start one")
            command = ["tune", str(self.project.root), "--model", self.start, "--out", str(out)]
            if not resume:
                self.project.settle()
            more = ["--resume"] if resume else self.overrides
            self._start("tune", [*command, *(["--anyway"] if anyway else []), *more], out)

    def export(self) -> Path:
        """Start writing the newest finished model for others, and return the folder to be."""
        with self._working:
            self._refuse_busy()
            run = self.finished
            if run is None:
                raise ValueError("no model is tuned yet")
            scores = ["--results", str(run / "results/after")]
            command = ["export", str(run / "run"), str(run / "model"), *scores]
            self._start("export", command, run)
            return run / "model"

    def stop(self) -> None:
        """Ask the process to save and end. Raises ValueError if it cannot be asked."""
        with self._working:
            pid = self._job().get("pid")
            if not is_locked(self._lock):
                raise ValueError("nothing is at work")
            if pid is None:
                raise ValueError("its process is not known; wait until it ends")
            os.killpg(pid, signal.SIGTERM)

    @property
    def _lock(self) -> Path:
        return self.project.private / "job"

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.project.private / "log.txt"

    def _job(self) -> dict[str, Any]:
        file = self.project.private / "job.json"
        return read_json(file) if file.is_file() else {}

    @property
    def busy(self) -> str:
        """The command that is at work; empty without one."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
        if is_locked(self._lock):
            return str(self._job().get("command", "tune"))
        by_hand = self.latest is not None and is_locked(self.latest / "run" / LOCK_FILE)
        return "tune" if by_hand else ""

    def _rows(self) -> str:
        """A digest of the rows that a run trains on and is scored on."""
        lines = self.project.answered_lines()
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

    def _refuse_busy(self) -> None:
        if self.busy:
            raise ValueError("a run is at work; stop it first, or wait until it ends")

    def _start(self, command: str, arguments: Sequence[str], out: Path) -> None:
        job = {"command": command, "out": str(out), "began": time.time(), "pid": None}
        job["rows"] = self._rows()
        path = os.pathsep.join(filter(None, sys.path))
        file = self.project.private / "job.json"
        with locked(self._lock, wait=False) as lock, self.log.open("wb") as log:
            write_json(file, job)
            self._process = subprocess.Popen(
                (sys.executable, "-P", "-m", "instructblip", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it survives the server
                pass_fds=(lock,),
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            )
            write_json(file, {**job, "pid": self._process.pid})

    # State

    def state(self) -> dict[str, Any]:
        """What the page shows of the newest run: its status, curves, and the time left."""
        busy, job, out = self.busy, self._job(), self.latest
        if busy == "tune" and job.get("command") == "tune":
            out = Path(job["out"])  # it may not be there yet
        lines = _tail(self.log)
        problem = _problem_in(lines)
        status: Status = "none"
        if busy == "tune":
            status = "running"
        elif out is not None and is_finished(out):
            status = "finished"
        elif problem and job.get("command") == "tune":
            status = "failed"
        elif out is not None:
            status = "stopped"
        shown = {
            "status": status,
            "busy": busy,
            "problem": problem if status == "failed" or job.get("command") == "export" else "",
            "folder": None if out is None else str(out),
            "resumable": out is not None and (out / RECIPE_FILE).is_file(),
            # which `tune --resume` refuses
            "changed": job.get("out") == str(out) and job.get("rows") != self._rows(),
            "model": self._exported(),
            "log": lines[-30:],
            "by_hand": self._by_hand(),
        }
        return shown | ({} if out is None else self._progress(out, status))

    def _by_hand(self) -> list[str]:
        """The command lines that do the same."""
        run = self.latest or self.out
        tune = ["tune", str(self.project.root), "--model", self.start, "--out", str(run)]
        lines = [tune, ["serve", "--model", str(run / "run"), "--before", self.start]]
        scores = ["--results", str(run / "results/after")]
        lines.append(["export", str(run / "run"), str(run / "model"), *scores])
        return [shlex.join(["instructblip", *line]) for line in lines]

    def _exported(self) -> str | None:
        run = self.finished
        is_there = run is not None and (run / "model" / "config.json").is_file()
        return str(run / "model") if run is not None and is_there else None

    def _progress(self, out: Path, status: Status) -> dict[str, Any]:
        recipe = out / RECIPE_FILE
        steps = read_values(recipe).get("training", {}).get("steps") if recipe.is_file() else None
        lines = read_metrics(out / "run" / METRICS)
        losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        scores = [(x["step"], x["validation"]["score"]) for x in lines if "validation" in x]
        last = next((line for line in reversed(lines) if "loss" in line), {})
        saved = saved_steps(out / "run" / "checkpoints")
        step = max([last.get("step", 0), *saved[-1:]])
        evaluated = [_seconds(path.parent) for path in out.glob(f"results/before/*/{RESULT}")]
        phase = "start"
        if losses or scores:
            phase = "train" if steps is None or step < steps else "after"
        left = None
        if last and steps is not None:
            # after the last step: calibration, the tuned model, and the blind control
            left = (steps - step) * last["seconds_per_step"] + 3 * sum(evaluated)
        every = max(1, len(losses) // MOST_POINTS)
        return {
            "phase": phase,
            "step": step,
            "steps": steps,
            "seconds_left": left,
            "losses": losses[::every] + (losses[-1:] if every > 1 else []),
            "scores": scores,
        }

    # Results

    def results(self) -> dict[str, Any] | None:
        """The newest finished run beside its baselines, with samples; None without any."""
        run = self.finished
        if run is None:
            return None
        with self._working:
            key = (run, (run / "report.html").stat().st_mtime_ns)
            if self._results is None or self._results[0] != key:
                self._results = key, _results(run)
            return self._results[1]


def usual_out(root: Path) -> Path:
    """The folder of the newest run that `tune` made of the folder ``root``, in it or beside it;
    without any ``root/tuned``."""
    usual = root / "tuned"
    beside = root.parent.iterdir() if os.access(root.parent, os.R_OK) else ()
    places = [*(root.iterdir() if root.is_dir() else ()), *beside]
    runs = [path for path in places if _is_run_of(path, root)]
    if any(path.parent == root and path.name.startswith("tuned") for path in runs):
        return usual
    return max(runs, key=lambda path: (path / RECIPE_FILE).stat().st_mtime, default=usual)


def _is_run_of(path: Path, root: Path) -> bool:
    file = path / RECIPE_FILE
    if not (os.access(file, os.R_OK) and (path / "run").is_dir()):
        return False
    return read_values(file).get("data", {}).get("root") == str(root)


def start_of(out: Path) -> str | None:
    """The model that the run in ``out`` starts from; None without a run."""
    file = out / RECIPE_FILE
    return read_values(file).get("model", {}).get("start") if file.is_file() else None


def is_finished(out: Path) -> bool:
    """Whether a run has its report, which is written last."""
    return (out / "report.html").is_file()


def _holds_run(path: Path) -> bool:
    return (path / RECIPE_FILE).is_file() or (path / "run").is_dir()


def _tail(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        text = file.read(LOG_BYTES).decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _problem_in(lines: Sequence[str]) -> str:
    """The last error that a command printed, with all its lines; empty without one."""
    begins = [at for at, line in enumerate(lines) if line.startswith(_ERROR)]
    if not begins:
        return ""
    first, *rest = lines[begins[-1] :]
    rest = itertools.takewhile(lambda line: line.startswith("  "), rest)
    return "\n".join([first.removeprefix(_ERROR), *rest])


def _seconds(folder: Path) -> float:
    """How long an evaluation took."""
    return (folder / RESULT).stat().st_mtime - (folder / "settings.json").stat().st_mtime


def _results(run: Path) -> dict[str, Any]:
    after = {path.parent.name: path.parent for path in (run / "results/after").glob(f"*/{RESULT}")}
    sets = []
    for name, folder in sorted(after.items()):
        blind = run / "results/blind" / name
        has_blind = (blind / RESULT).is_file()
        before = Result.load(run / "results/before" / name)
        sets.append(Samples(before, Result.load(folder), Result.load(blind) if has_blind else None))
    verdicts = verdicts_of(
        run,
        [each.before for each in sets],
        [each.after for each in sets],
        [each.blind for each in sets if each.blind is not None],
        _best_step(run),
    )
    first = worst(verdicts)
    return {
        "folder": str(run),
        "outcome": first.outcome.name.lower(),
        "alike": first.alike[0] > 0,
        "facts": [
            *first.headline_facts,
            *first.caution_facts,
            ("unseen" if read_held_back(run)["unseen"] else "chosen",),
        ],
        "sets": [_bars(verdict) for verdict in verdicts],
        "samples": [row for each in sets for row in _samples(each)][:SHOWN_SAMPLES],
    }


def _best_step(run: Path) -> int | None:
    """The step of the best score, the first of several; None without a validation."""
    lines = read_metrics(run / "run" / METRICS)
    scores = [(x["validation"]["score"], -x["step"]) for x in lines if "validation" in x]
    return -max(scores)[1] if scores else None


def _bars(verdict: Verdict) -> dict[str, Any]:
    after = verdict.after
    answer = verdict.constant.predictions[0]["prediction"]
    named = {"start": verdict.before, "constant": verdict.constant, "blind": verdict.blind}
    bars = []
    for name, result in {**named, "tuned": after}.items():
        if result is not None:
            bounds = result.interval
            low_high = None if bounds is None else (bounds.low, bounds.high)
            bars.append({"name": name, "value": result.value, "interval": low_high})
    return {
        "n": after.n,
        "bars": bars,
        "answer": answer,
        "right": after.metric in ("exact_match", "accuracy"),
        "facts": [*verdict.headline_facts, *verdict.caution_facts],
    }


def _samples(each: Samples) -> list[dict[str, Any]]:
    before = {prediction["id"]: prediction for prediction in each.before.predictions}
    return [
        {
            "images": list(one["images"]),
            "question": one.get("question", ""),
            "answers": one["answers"],
            "start": before[one["id"]]["prediction"],
            "tuned": one["prediction"],
            "start_score": before[one["id"]]["score"],
            "tuned_score": one["score"],
            "confidence": one.get("confidence"),
        }
        for one in each.after.predictions
        if one["id"] in before
    ]
