"""What a run says: metrics.jsonl, a progress bar or plain lines, and curves as a picture."""

import json
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from instructblip.core.files import flush, replacing, whole_lines, write_text
from instructblip.training.config import TrainingConfig

METRICS = "metrics.jsonl"
CURVES = "curves.png"
TIMINGS = ("seconds_per_step", "samples_per_second", "waited_for_data")
"""Keys of a line that differ between two otherwise identical runs."""


class RunLog:
    """Writes a run's measurements into ``folder`` and shows them on the terminal.

    Args:
        folder: the run directory.
        config: for the number of steps and the steps between lines.
        start: steps already done. Later lines of an interrupted run are dropped, so that the file
            of a resumed run equals that of an uninterrupted one, timings apart.
        validated: the step of the last validation that the resumed run knows of.
        active: False on all ranks but the first, where every method does nothing.
    """

    def __init__(
        self, folder: Path, config: TrainingConfig, start: int, validated: int, active: bool = True
    ) -> None:
        self.folder, self.steps, self.active = folder, config.steps, active
        self._samples = config.batch_size
        self._seconds: deque[float] = deque(maxlen=max(config.log_every, 20))
        self._waits: deque[float] = deque(maxlen=self._seconds.maxlen)
        self._ticks, self._sum, self._sum_of_waits = 0, 0.0, 0.0
        self._file = None
        self._bar = _bar(config.steps, start) if active and sys.stderr.isatty() else None
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            drop_lines_after(folder / METRICS, start, validated)
            self._file = (folder / METRICS).open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._file:
            self._file.close()

    def tick(self, step: int, seconds: float, waited: float) -> None:
        """Note that ``step`` steps are done, the last of them in ``seconds``, of which the loop
        ``waited`` for its batch."""
        self._seconds.append(seconds)
        self._waits.append(waited)
        if self._ticks:
            self._sum, self._sum_of_waits = self._sum + seconds, self._sum_of_waits + waited
        self._ticks += 1
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line about the steps since the line before."""
        if not self.active:
            return
        per_step = sum(self._seconds) / max(1, len(self._seconds))
        rate = self._samples / max(per_step, 1e-9)
        waited = sum(self._waits) / max(sum(self._seconds), 1e-9)
        figures = (round(per_step, 5), round(rate, 2), round(waited, 5))
        timings = dict(zip(TIMINGS, figures, strict=True))
        self._write({"step": step, **metrics, **timings})
        if self._bar:
            shown = {
                "loss": f"{metrics['loss']:.3f}",
                "lr": f"{metrics['lr']:.1e}",
                "rate": f"{rate:.0f}",
            }
            self._bar.update(self._bar.task_ids[0], completed=step, **shown)
            return
        left = _clock(per_step * (self.steps - step))
        self.say(
            f"step {step}/{self.steps}  loss {metrics['loss']:.3f}  lr {metrics['lr']:.1e}  "
            f"{rate:.0f} samples/s  {waited:.1%} waiting  {left} left"
        )

    @property
    def waited_for_data(self) -> float | None:
        """Share of the time of the steps in which the loop waited for its batch; None before the
        second step. The first one, in which the workers start, is left out."""
        return self._sum_of_waits / max(self._sum, 1e-9) if self._ticks > 1 else None

    def validation(self, step: int, scores: Mapping[str, float], best: bool) -> None:
        """One line about a validation, and the curves drawn anew."""
        if not self.active:
            return
        self._write({"step": step, "validation": dict(scores)})
        listed = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.say(
            f"step {step}/{self.steps}  validation: {listed}{'  (best so far)' if best else ''}"
        )
        self.curves()

    def curves(self) -> None:
        if self.active:
            draw_curves(read_metrics(self.folder / METRICS), self.folder / CURVES)

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.active:
            print(text, flush=True)

    def flush(self) -> None:
        """Force the lines written so far to the disk: before a checkpoint relies on them."""
        if self._file:
            flush(self._file)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line cut short by a kill is left out."""
    return [json.loads(line) for line in whole_lines(path)]


def drop_lines_after(path: Path, step: int, validated: int) -> None:
    """Keep the lines up to ``step``, validations up to ``validated``: a new file, renamed."""
    lines = read_metrics(path)
    kept = [v for v in lines if v["step"] <= (validated if "validation" in v else step)]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Loss, learning rate and validation against the step, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation" in line]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, rate, validation = figure.subplots(1, 3)
    steps = [line["step"] for line in training]
    loss.plot(steps, [line["loss"] for line in training], color="black", linewidth=1.5)
    for name in sorted({name for line in training for name in line["losses"]}):
        own = [(line["step"], line["losses"][name]) for line in training if name in line["losses"]]
        loss.plot(*zip(*own, strict=True), alpha=0.4, linewidth=0.8, label=name)
    rate.plot(steps, [line["lr"] for line in training], color="black")
    for name in sorted({name for line in checks for name in line["validation"]}):
        own = [(c["step"], c["validation"][name]) for c in checks if name in c["validation"]]
        width = 2.0 if name == "score" else 0.8
        validation.plot(
            *zip(*own, strict=True), marker="o", markersize=3, linewidth=width, label=name
        )
    titles = ("loss per response token (nats)", "learning rate", "validation")
    for axis, title in zip((loss, rate, validation), titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    with replacing(path) as temporary:
        canvas.print_png(temporary)


def without_timings(line: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line two identical runs share."""
    return {key: value for key, value in line.items() if key not in TIMINGS}


def _bar(steps: int, start: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    texts = ("loss {task.fields[loss]}", "lr {task.fields[lr]}", "{task.fields[rate]} samples/s")
    columns = [TextColumn(text) for text in texts]
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("training", total=steps, completed=start, loss="-", lr="-", rate="-")
    return bar


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
