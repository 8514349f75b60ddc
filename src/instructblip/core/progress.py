"""The one progress bar: on a terminal, and nothing where there is none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
            self._bar.console.print(text, highlight=False, markup=False)
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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        *(TextColumn(f"{name} {{task.fields[{name}]}}") for name in fields),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=not fields) as bar:
        values: dict[str, Any] = dict.fromkeys(fields, "-")
        bar.add_task(title, total=None, **values)
        yield ProgressBar(bar)
