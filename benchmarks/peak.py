"""The peak of tensor memory on a CPU, which the benchmark and the tests of memory measure."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def tensor_peak(work: Callable[[], None]) -> int:
    """Peak bytes of CPU tensors while ``work`` runs, above those that existed before.

    The process holds more: the C library keeps freed blocks, and memory fragments.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events: list[Any] = seen.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))
