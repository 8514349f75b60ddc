"""A data set in memory and a model that answers by rule."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructblip.core.example import Example
from instructblip.evaluation.benchmarks import Benchmark


@dataclass
class ListDataset:
    """Examples of one set."""

    examples: list[Example]
    name: str = "toy"
    image_root: Path = Path("/nowhere")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[index]


@dataclass
class FakeEngine:
    """Answers and ranks by the colour in the name of the image (``red_3.png``)."""

    fingerprint: str = "fake"
    stop_after: int | None = None
    batches: list[list[str]] = field(default_factory=list)
    decoding: dict[str, Any] = field(default_factory=dict)

    def _see(self, examples: Sequence[Example]) -> list[str]:
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        self.batches.append([example.id for example in examples])
        return [Path(example.images[0]).stem.split("_")[0] for example in examples]

    def answer_examples(
        self, examples: Sequence[Example], prompts: Sequence[str], image_root: Path, **decoding: Any
    ) -> list[str]:
        self.decoding = decoding
        return self._see(examples)

    def rank_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        image_root: Path,
        candidates: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        seen = self._see(examples)
        return [
            [0.0 if text == colour else -1.0 - place for place, text in enumerate(texts)]
            for colour, texts in zip(seen, candidates, strict=True)
        ]


COLOURS = ("red", "green", "blue")


def colour_questions(count: int = 12) -> ListDataset:
    """What colour? Two questions about each image, whose name contains the right answer."""
    examples = []
    for i in range(count):
        colour = COLOURS[(i // 2) % 3]
        examples.append(
            Example(
                dataset="toy",
                split="val",
                id=str(i),
                images=(f"{colour}_{i // 2}.png",),
                task="vqa",
                question="what colour" + " is it" * (i % 4) + "?",
                answers=(colour,),
                choices=COLOURS,
                where=f"toy.json:record {i}",
            )
        )
    return ListDataset(examples)


def benchmark(**changes: Any) -> Benchmark:
    """A benchmark over ``colour_questions``."""
    return Benchmark(
        **{
            "name": "toy",
            "title": "toy colours",
            "source": "toy",
            "split": "val",
            "prompt": "Question: {question} Short answer:",
            "mode": "generate",
            "metric": "exact_match",
            "role": "held_in",
            "decoding": {"num_beams": 1, "max_new_tokens": 5},
            **changes,
        }
    )
