"""Names for the parts of a step, under which a profile adds up what they cost."""

from torch.profiler import record_function

PREFIX = "instructblip: "


def part(name: str) -> record_function:
    """A context whose operations, and their backward passes, count as ``name`` in a profile."""
    return record_function(PREFIX + name)
