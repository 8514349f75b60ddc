"""The one progress bar, on a terminal and nothing where there is none, and rich's console."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

from instructblip.core.terminal import Escaping, escape, escape_output


class Terminal(Console):
    """rich's console: its own sequences reach the terminal, those of a text are escaped."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        stream: Any = sys.stderr if stderr else sys.stdout
        stream = stream.stream if isinstance(stream, Escaping) else stream
        super().__init__(file=stream, width=width, markup=False, highlight=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escape(text), style, control)


class ProgressBar:
    """What `progress_bar` yields. ``bar`` is rich's, or None where nothing is shown."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._done = 0

    def __call__(self, done: int, total: int, **fields: str) -> None:
        """Show that ``done`` of ``total`` (which may grow) is done, and ``fields`` beside it."""
        self._done = done
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, **fields)

    def advance(self, count: int, total: int) -> None:
        """Show that ``count`` more of ``total`` are done."""
        self(self._done + count, total)

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(escape(text))
        else:
            print(text, flush=True)

    @property
    def shown(self) -> bool:
        return self._bar is not None


@contextmanager
def progress_bar(
    title: str, unit: str = "", shown: bool = True, fields: tuple[str, ...] = ()
) -> Iterator[ProgressBar]:
    """Show a bar while the block runs: ``with progress_bar("vqav2", "bytes") as bar: bar(1, 10)``.

    ``fields`` are names of further values that calls give; with them the bar stays when it is done.
    """
    if not shown or not sys.stderr.isatty():
        yield ProgressBar(None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        *(TextColumn(f"{name} {{task.fields[{name}]}}") for name in fields),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Terminal(stderr=True), transient=not fields) as bar:
        escape_output()  # rich has put streams of its own in the place of ours
        values: dict[str, Any] = dict.fromkeys(fields, "-")
        bar.add_task(escape(title), total=None, **values)
        yield ProgressBar(bar)
