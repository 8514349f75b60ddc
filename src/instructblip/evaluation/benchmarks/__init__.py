"""The benchmarks: which examples, asked how, answered how, scored by what. Frozen by a test.

A figure belongs to its prompt, decoding and scorer, so that all three stand here and are written
beside every result. Three groups: the sets of the InstructBLIP paper with its prompts (appendix
E); ``finetuned_...``, the rows of its table 3, for a model tuned on that one set; ``scenes_...``,
the sets of the embedded world, with plain prompts and greedy decoding.
Adding a benchmark is one entry in the file of its group.
"""

from collections.abc import Iterable, Mapping

from instructblip.evaluation.benchmarks.benchmark import Benchmark
from instructblip.evaluation.benchmarks.finetuned import FINETUNED
from instructblip.evaluation.benchmarks.held_in import HELD_IN
from instructblip.evaluation.benchmarks.held_out import HELD_OUT
from instructblip.evaluation.benchmarks.scenes import SCENES

GROUPS = ("held_in", "held_out", "finetuned", "scenes", "scenes_held_in", "scenes_held_out")


def select_benchmarks(
    names: Iterable[str], known: Mapping[str, Benchmark] | None = None
) -> list[Benchmark]:
    """The benchmarks called ``names``, each once; a group's name stands for its members.

    Groups: "held_in", "held_out" and "finetuned" (the paper's), "scenes", "scenes_held_in",
    "scenes_held_out". ValueError names the nearest names for one that does not exist.
    """
    known = BENCHMARKS if known is None else known
    chosen: dict[str, Benchmark] = {}
    for name in names:
        members = [b for b in known.values() if name in (b.name, *groups_of(b.name, b.role))]
        if not members:
            from difflib import get_close_matches

            near = get_close_matches(name, [*known, *GROUPS], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no benchmark or group '{name}'{hint} Groups: {', '.join(GROUPS)}")
        chosen |= {b.name: b for b in members}
    return list(chosen.values())


def groups_of(name: str, role: str) -> tuple[str, ...]:
    """The groups that the benchmark ``name`` belongs to."""
    return ("scenes", f"scenes_{role}") if name.startswith("scenes_") else (role,)


BENCHMARKS: dict[str, Benchmark] = {**HELD_IN, **HELD_OUT, **FINETUNED, **SCENES}
