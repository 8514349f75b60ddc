"""The log of a run: metrics.jsonl, a progress bar or printed lines, and curves.png."""

import json
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from instructblip.core.files import flush, read_json_lines, replacing, write_text
from instructblip.core.progress import progress_bar
from instructblip.training.config import TrainingConfig
from instructblip.training.trackers import flatten, open_trackers

METRICS = "metrics.jsonl"
CURVES = "curves.png"
TIMINGS = ("seconds_per_step", "samples_per_second", "waited_for_data")
"""Keys of a line of metrics.jsonl that differ between two otherwise identical runs."""
FORECAST_STEPS = 3
"""Steps after which the duration of a run is predicted, the first one, which warms up, aside."""


class RunLog:
    """Writes a run's measurements into ``folder`` and shows them on the terminal.

    Args:
        folder: the run directory.
        config: for the number of steps and the steps between lines.
        start: steps already done. Later lines of an interrupted run are removed, so that the file
            of a resumed run equals that of an uninterrupted one but for the timings.
        validated: the step of the last validation that the resumed run knows of.
        active: False on all ranks but the first; every method then does nothing.
    """

    def __init__(
        self, folder: Path, config: TrainingConfig, start: int, validated: int, active: bool = True
    ) -> None:
        self.folder, self.steps, self.active = folder, config.steps, active
        self._start = start
        self._samples = config.batch_size
        # of each of the last steps: its seconds, and those that it waited for its batch
        self._recent: deque[tuple[float, float]] = deque(maxlen=max(config.log_every, 20))
        self._ticks, self._sum, self._sum_of_waits = 0, 0.0, 0.0
        self._file, self._trackers = None, []
        self._bars = progress_bar("training", shown=active, fields=("loss", "lr", "samples/s"))
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            drop_lines_after(folder / METRICS, start, validated)
            self._file = (folder / METRICS).open("a", encoding="utf-8")
            self._trackers = open_trackers(config.report_to, folder, start)

    def __enter__(self) -> "RunLog":
        self._bar = self._bars.__enter__()
        self._bar(self._start, self.steps)
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.__exit__(*error)
        if self._file:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def tick(self, step: int, seconds: float, waited: float) -> None:
        """Record that ``step`` steps are done, the last of them in ``seconds``, of which the loop
        ``waited`` for its batch."""
        self._recent.append((seconds, waited))
        if self._ticks:
            self._sum, self._sum_of_waits = self._sum + seconds, self._sum_of_waits + waited
        self._ticks += 1
        self._bar(step, self.steps)
        if self._ticks == 1 + FORECAST_STEPS and step < self.steps:
            self._forecast(step)

    def _forecast(self, step: int) -> None:
        """Print how long the rest takes, by the median of the steps after the first."""
        seconds = median(seconds for seconds, _ in list(self._recent)[1:])
        left = timedelta(seconds=round(seconds * (self.steps - step)))
        self.print(
            f"forecast: {self.steps - step:,} more steps take about {left}, at {seconds:.3g} s a "
            f"step (median of steps {step - FORECAST_STEPS + 1} to {step}; validations and "
            "checkpoints come on top)"
        )

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line about the steps since the previous line."""
        seconds, waits = (sum(column) for column in zip(*self._recent, strict=True))
        per_step = seconds / len(self._recent)
        rate = self._samples / max(per_step, 1e-9)
        waited = waits / max(seconds, 1e-9)
        figures = (round(per_step, 5), round(rate, 2), round(waited, 5))
        self._write({"step": step, **metrics, **dict(zip(TIMINGS, figures, strict=True))})
        terms = ", ".join(f"{name} {value:.3f}" for name, value in metrics.get("terms", {}).items())
        loss = f"{metrics['loss']:.3f}" + (f" ({terms})" if terms else "")
        if self._bar.shown:
            lr = f"{metrics['lr']:.1e}"
            self._bar(step, self.steps, **{"loss": loss, "lr": lr, "samples/s": f"{rate:.0f}"})
            return
        left = timedelta(seconds=int(per_step * (self.steps - step)))
        self.print(
            f"step {step}/{self.steps}  loss {loss}  lr {metrics['lr']:.1e}  "
            f"{rate:.0f} samples/s  {waited:.1%} waiting  {left} left"
        )

    @property
    def waited_for_data(self) -> float | None:
        """Share of the steps' time that the loop waited for batches; None before the second step.

        The first step, in which the workers start, does not count.
        """
        return self._sum_of_waits / max(self._sum, 1e-9) if self._ticks > 1 else None

    def validation(self, step: int, scores: Mapping[str, float], best: bool) -> None:
        """Write one line about a validation, and draw the curves again."""
        self._write({"step": step, "validation": dict(scores)})
        listed = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.print(
            f"step {step}/{self.steps}  validation: {listed}{'  (best so far)' if best else ''}"
        )
        self.draw_curves()

    def draw_curves(self) -> None:
        """Draw curves.png from the lines so far."""
        if self.active:
            draw_curves(read_metrics(self.folder / METRICS), self.folder / CURVES)

    def print(self, text: str) -> None:
        """Print a line on the terminal."""
        if self.active:
            self._bar.print(text)

    def flush(self) -> None:
        """Flush the lines written so far to the disk."""
        if self._file:
            flush(self._file)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file:
            print(json.dumps(line), file=self._file, flush=True)
            for tracker in self._trackers:
                tracker.log(dict(flatten(line)), line["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; ignores a last line that a kill cut short."""
    return read_json_lines(path)


def drop_lines_after(path: Path, step: int, validated: int) -> None:
    """Keep the lines up to ``step``, and validations up to ``validated``."""
    lines = read_metrics(path)
    kept = [v for v in lines if v["step"] <= (validated if "validation" in v else step)]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, learning rate and validation against the step, side by side."""
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
        points = [(v["step"], v["losses"][name]) for v in training if name in v["losses"]]
        loss.plot(*zip(*points, strict=True), alpha=0.4, linewidth=0.8, label=name)
    for name in training[-1].get("terms", {}) if training else ():
        points = [(v["step"], v["terms"][name]) for v in training if name in v.get("terms", {})]
        loss.plot(*zip(*points, strict=True), linestyle="--", linewidth=0.8, label=name)
    rate.plot(steps, [line["lr"] for line in training], color="black")
    for name in sorted({name for line in checks for name in line["validation"]}):
        points = [(v["step"], v["validation"][name]) for v in checks if name in v["validation"]]
        width = 2.0 if name == "score" else 0.8
        validation.plot(
            *zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=name
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
    """A line without its timings: what two identical runs share."""
    return {key: value for key, value in line.items() if key not in TIMINGS}
