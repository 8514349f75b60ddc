"""Profile of a step: a trace, and a table of the time by part.

An operation of the forward pass belongs to the part (``core.regions``) in which it runs. One of the
backward pass carries the sequence number of the operation whose gradient it computes, and belongs
to the same part.
"""

from collections import defaultdict
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


class Profile:
    """Traces ``STEPS`` steps near the start of a run if ``active``; otherwise does nothing."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.folder, self._table = folder, ""
        self._profile = None
        if active:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=1, warmup=1, active=STEPS, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> "Profile":
        if self._profile:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile:
            self._profile.__exit__(*error)

    def step(self) -> str:
        """Mark the end of a step; returns the table once, when it is ready, else ""."""
        if self._profile:
            self._profile.step()
        ready, self._table = self._table, ""
        return ready

    def _write(self, traced: profile) -> None:
        with replacing(self.folder / TRACE) as temporary:
            traced.export_chrome_trace(str(temporary))
        self._table = table(traced.events())
        write_text(self.folder / TABLE, self._table + "\n")


def times_of(events: Any) -> Times:
    """Time of all operations, without those that they call, by part."""
    on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
    on_cpu.sort(key=lambda event: event.time_range.start)
    forward: dict[int, str] = {}  # by sequence number
    for event in on_cpu:
        if event.sequence_nr >= 0 and not _is_backward(event) and (name := _label(event)):
            forward[event.sequence_nr] = name
    times: Times = defaultdict(lambda: [0.0, 0.0])
    for event in on_cpu:
        root = _backward_root(event)
        name = _label(event) or (forward.get(root.sequence_nr) if root else None)
        entry = times[name or REST, root is not None and name is not None]
        entry[0] += event.self_cpu_time_total
        entry[1] += event.self_device_time_total
    return times


def table(events: Any) -> str:
    """Milliseconds of a step by part, forward and backward, and their shares."""
    times = times_of(events)
    steps = sum(e.name.startswith(STEP) and e.device_type == DeviceType.CPU for e in events)
    on_gpu = any(gpu for _, gpu in times.values())
    column = 1 if on_gpu else 0
    wall = sum(
        e.time_range.elapsed_us()
        for e in events
        if e.name.startswith(STEP) and e.device_type == DeviceType.CPU
    )
    if on_gpu:  # the GPU is idle where it runs nothing
        times[REST, False][1] = wall - sum(gpu for _, gpu in times.values())
    whole = sum(entry[column] for entry in times.values()) or 1.0
    where = "GPU" if on_gpu else "CPU"
    lines = [f"{where + ' ms a step':20} {'forward':>9} {'backward':>9} {'share':>7}"]
    names = sorted({name for name, _ in times}, key=lambda name: (name == REST, name))
    for name in names:
        ahead, back = (times[name, b][column] / steps / 1000 for b in (False, True))
        share = (ahead + back) * steps * 1000 / whole
        lines.append(f"{name:20} {ahead:9.1f} {back:9.1f} {share:7.1%}")
    return "\n".join(lines)


def _label(event: Any) -> str | None:
    """The part whose context an operation runs in."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return None


def _backward_root(event: Any) -> Any:
    """The outermost node of the backward pass that an operation runs for, or None."""
    root = None
    while event is not None:
        if event.name.startswith(BACKWARD):
            root = event
        event = event.cpu_parent
    return root


def _is_backward(event: Any) -> bool:
    return _backward_root(event) is not None
