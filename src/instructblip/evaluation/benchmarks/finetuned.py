"""The paper, fine-tuning on one set: the rows of table 3, asked and scored as without tuning."""

from dataclasses import replace

from instructblip.evaluation.benchmarks.benchmark import Benchmark
from instructblip.evaluation.benchmarks.held_in import HELD_IN
from instructblip.evaluation.benchmarks.held_out import HELD_OUT


def _tuned_on(benchmark: Benchmark) -> Benchmark:
    return replace(benchmark, name=f"finetuned_{benchmark.name}", role="finetuned")


_ROWS = (
    HELD_OUT["scienceqa"],
    HELD_IN["ocrvqa"],
    HELD_IN["okvqa"],
    HELD_IN["aokvqa_direct"],
    HELD_IN["aokvqa"],
)
FINETUNED: dict[str, Benchmark] = {row.name: row for row in map(_tuned_on, _ROWS)}
