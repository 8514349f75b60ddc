"""Where the time of a step goes: a trace to look at, and a table by part.

Operations of the forward pass belong to the part (``instructblip.core.regions``) they run in.
Those of the backward pass carry the sequence number of the operation whose gradient they compute,
and so belong to the same part.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, Self

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile, schedule

from instructblip.core.files import replacing, write_text
from instructblip.core.regions import PREFIX

TRACE, TABLE = "trace.json", "profile.txt"
STEPS = 3
"""Steps in the trace, after one to warm up and one to start the profiler."""

BACKWARD = "autograd::engine::evaluate_function"
STEP = "ProfilerStep"
REST = "idle and the rest"

Times = dict[tuple[str, bool], list[float]]
"""(part, whether backward) -> microseconds on the CPU and on the GPU."""


class Profile:
    """Traces ``STEPS`` steps near the beginning of a run, if ``active``; else does nothing."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.folder, self.said = folder, ""
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

    def __enter__(self) -> Self:
        if self._profile:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile:
            self._profile.__exit__(*error)

    def step(self) -> str:
        """Note the end of a step; returns the table when it is written, once."""
        if self._profile:
            self._profile.step()
        said, self.said = self.said, ""
        return said

    def _write(self, traced: profile) -> None:
        with replacing(self.folder / TRACE) as temporary:
            traced.export_chrome_trace(str(temporary))
        self.said = table(traced.events())
        write_text(self.folder / TABLE, self.said + "\n")


def times_of(events: Any) -> Times:
    """Own time of every operation, added up by part."""
    ours = [e for e in events if e.device_type == DeviceType.CPU]
    ours.sort(key=lambda event: event.time_range.start)
    forward: dict[int, str] = {}  # by sequence number
    for event in ours:
        if event.sequence_nr >= 0 and not _is_backward(event) and (name := _label(event)):
            forward[event.sequence_nr] = name
    times: Times = defaultdict(lambda: [0.0, 0.0])
    for event in ours:
        root = _backward_root(event)
        name = _label(event) or (forward.get(root.sequence_nr) if root else None)
        own = times[name or REST, root is not None and name is not None]
        own[0] += event.self_cpu_time_total
        own[1] += event.self_device_time_total
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
    if on_gpu:  # what the GPU did not do, it waited for
        times[REST, False][1] = wall - sum(gpu for _, gpu in times.values())
    whole = sum(own[column] for own in times.values()) or 1.0
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
