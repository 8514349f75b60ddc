"""Data sets for evaluation: parts of them, in order, and with swapped pictures."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from instructblip.core.batch import Batch, Example
from instructblip.data.collate import collate
from instructblip.data.samples import (
    Examples,
    Pictures,
    make_sample,
)
from instructblip.data.templates import render_prompt
from instructblip.data.tokens import Tokens


@dataclass(frozen=True)
class DatasetView:
    """Some examples of a data set, by index; ``pictures`` takes the pictures of other examples."""

    dataset: Examples
    indices: Sequence[int]
    pictures: Sequence[int] | None = None

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def image_root(self) -> Path:
        return self.dataset.image_root

    def __len__(self) -> int:
        return len(self.indices)

    def images(self) -> set[tuple[str, ...]]:
        """The distinct ``Example.images``."""
        return {self[i].images for i in range(len(self))}

    def __getitem__(self, index: int, /) -> Example:
        example = self.dataset[self.indices[index]]
        if self.pictures is None:
            return example
        return replace(example, images=self.dataset[self.pictures[index]].images)


def shuffle_pictures(dataset: Examples, seed: int = 0) -> DatasetView:
    """The blind control: every example gets the pictures of another one.

    Of another picture, too, wherever the set has one: with several questions on one picture a
    plain shuffle would give some of them their own picture back.
    """
    pictures = [dataset[i].images for i in range(len(dataset))]
    rng = random.Random(seed)
    givers = list(range(len(pictures)))
    rng.shuffle(givers)
    for i, images in enumerate(pictures):
        for _ in range(20):
            # A swap must help here and do no harm there.
            if pictures[givers[i]] != images:
                break
            j = rng.randrange(len(givers))
            if pictures[givers[i]] != pictures[j]:
                givers[i], givers[j] = givers[j], givers[i]
    return DatasetView(dataset, range(len(pictures)), givers)


def iter_eval_batches(
    dataset: Examples,
    tokens: Tokens,
    pictures: Pictures,
    batch_size: int,
    template: str | None = None,
    with_response: bool = False,
) -> Iterator[tuple[list[Example], Batch]]:
    """(examples, batch) in the order of the data set; every example once, the last batch short.

    ``template`` is the benchmark's prompt, by default the first of the task. ``with_response``
    adds the first answer, for a loss; otherwise ``response_ids`` is [B, 0].
    """
    if pictures.transform.train:
        raise ValueError("evaluation needs a transform with train=False")
    for start in range(0, len(dataset), batch_size):
        stop = min(start + batch_size, len(dataset))
        examples = [dataset[i] for i in range(start, stop)]
        samples = []
        for example in examples:
            rendered = render_prompt(example, template)
            if with_response:
                if not example.taught:
                    raise ValueError(f"{example.where}: no answer to compute a loss on")
                rendered = replace(rendered, response=example.taught[0])
            samples.append(make_sample(example, rendered, tokens, pictures, dataset.image_root))
        yield examples, collate(samples)
