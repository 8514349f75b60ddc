"""Profile of a step: a trace, and a table of the time by part.

An operation of the forward pass belongs to the part (``core.regions``) in which it runs. One of the
backward pass carries the sequence number of the operation whose gradient it computes, and belongs
to the same part.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile, schedule

from instructblip.core.files import replacing, write_text
from instructblip.core.regions import PREFIX

TRACE, TABLE = "trace.json", "profile.txt"
STEPS = 3
"""Steps in the trace, after one that is skipped and one that warms up."""

BACKWARD = "autograd::engine::evaluate_function"
STEP = "ProfilerStep"
REST = "idle and the rest"

Times = dict[tuple[str, bool], list[float]]
"""(part, whether backward) -> microseconds on the CPU and on the GPU."""


@contextmanager
def profiling(folder: Path, active: bool) -> Iterator[Callable[[], str]]:
    """Trace ``STEPS`` steps near the start of a run if ``active``.

    Yields a function to call at the end of each step. It returns the table once, when it is ready,
    else "".
    """
    if not active:
        yield lambda: ""
        return
    tables = []

    def write(traced: profile) -> None:
        with replacing(folder / TRACE) as temporary:
            traced.export_chrome_trace(str(temporary))
        tables.append(table(traced.events()))
        write_text(folder / TABLE, tables[0] + "\n")

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    phases = schedule(wait=1, warmup=1, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=write) as running:

        def step() -> str:
            running.step()
            return tables.pop() if tables else ""

        yield step


def table(events: Any) -> str:
    """Milliseconds of a step by part, forward and backward, and their shares."""
    on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
    on_cpu.sort(key=lambda event: event.time_range.start)
    times = _times(on_cpu)
    steps = [e for e in on_cpu if e.name.startswith(STEP)]
    on_gpu = any(gpu for _, gpu in times.values())
    if on_gpu:  # the GPU is idle where it runs nothing
        wall = sum(e.time_range.elapsed_us() for e in steps)
        times[REST, False][1] = wall - sum(gpu for _, gpu in times.values())
    column, where = (1, "GPU") if on_gpu else (0, "CPU")
    whole = sum(entry[column] for entry in times.values()) or 1.0
    lines = [f"{where + ' ms a step':20} {'forward':>9} {'backward':>9} {'share':>7}"]
    names = sorted({name for name, _ in times}, key=lambda name: (name == REST, name))
    for name in names:
        forward, backward = (times[name, b][column] for b in (False, True))
        share = (forward + backward) / whole
        forward, backward = (time / len(steps) / 1000 for time in (forward, backward))
        lines.append(f"{name:20} {forward:9.1f} {backward:9.1f} {share:7.1%}")
    return "\n".join(lines)


def _times(on_cpu: list[Any]) -> Times:
    """Time of all operations by part, without that of the operations that they call."""
    forward: dict[int, str] = {}  # by sequence number
    for event in on_cpu:
        if event.sequence_nr >= 0 and not _backward_root(event) and (name := _label(event)):
            forward[event.sequence_nr] = name
    times: Times = defaultdict(lambda: [0.0, 0.0])
    for event in on_cpu:
        root = _backward_root(event)
        name = _label(event) or (forward.get(root.sequence_nr) if root else None)
        entry = times[name or REST, root is not None and name is not None]
        entry[0] += event.self_cpu_time_total
        entry[1] += event.self_device_time_total
    return times


def _callers(event: Any) -> Iterator[Any]:
    """An operation, the one that calls it, and so on."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _label(event: Any) -> str | None:
    """The part whose context an operation runs in."""
    names = (caller.name for caller in _callers(event))
    return next((name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)), None)


def _backward_root(event: Any) -> Any:
    """The outermost node of the backward pass that an operation runs for, or None."""
    roots = [caller for caller in _callers(event) if caller.name.startswith(BACKWARD)]
    return roots[-1] if roots else None
