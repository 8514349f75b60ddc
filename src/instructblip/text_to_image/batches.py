"""Batches to draw, as a function of (seed, step), and their alternation with batches to answer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.data.images import ImageTransform
from instructblip.data.loader import iterate_steps, micro_batch_size
from instructblip.data.order import Mixture, Order
from instructblip.data.samples import pad
from instructblip.data.tokens import Tokens
from instructblip.text_to_image.tasks import DrawExample, Drawings
from instructblip.training.train import Batches


class DrawLoader:
    """Training batches from a mixture of drawing sets, each a function of (seed, step) alone.

    ``batch_size`` counts the samples of one optimizer step over all ranks and micro batches.
    ``transform`` is applied to subject images, ``image_size`` is the decoder's. ``starts`` maps a
    set to the step at which it joins the mixture; the default is 0. ``workers`` processes fetch
    batches in advance.

    Raises ValueError if ``batch_size`` does not divide, or if no set is drawn from at step 0.
    """

    def __init__(
        self,
        sets: Mapping[str, Drawings],
        weights: Mapping[str, float],
        tokens: Tokens,
        transform: ImageTransform,
        image_size: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        starts: Mapping[str, int] | None = None,
    ) -> None:
        self.names, self.sets = list(sets), list(sets.values())
        self.tokens, self.transform, self.image_size = tokens, transform, image_size
        self.micro_size, self.seed = micro_batch_size(batch_size, world_size, accumulate), seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.workers, self.weights, self.starts = workers, weights, starts or {}
        self._orders: dict[frozenset[str], Order] = {}
        self._order(0)  # refuses an empty mixture now

    def _order(self, step: int) -> Order:
        """The order of examples over the sets that have joined by ``step``."""
        present = frozenset(n for n in self.names if self.starts.get(n, 0) <= step)
        if present not in self._orders:
            sizes = {name: len(each) for name, each in zip(self.names, self.sets, strict=True)}
            weights = {n: self.weights.get(n, 1.0) if n in present else 0.0 for n in self.names}
            probabilities = Mixture(sizes, weights).probabilities.values()
            self._orders[present] = Order(list(sizes.values()), list(probabilities), self.seed)
        return self._orders[present]

    def iterate(self, step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro batches, a list for each step from ``step`` on."""
        return iterate_steps(self.step, self.workers, step)

    def step(self, step: int) -> list[Batch]:
        """This rank's micro batches of ``step``."""
        return [self.batch(step, micro) for micro in range(self.accumulate)]

    def batch(self, step: int, micro: int = 0) -> Batch:
        """This rank's micro batch ``micro`` of the global batch of ``step``."""
        size = self.micro_size
        start = ((step * self.world_size + self.rank) * self.accumulate + micro) * size
        order = self._order(step)
        draws = [order[slot] for slot in range(start, start + size)]
        return collate_drawings(
            [self.sets[d.dataset][d.example] for d in draws],
            self.tokens,
            self.transform,
            self.image_size,
            datasets=tuple(self.names[d.dataset] for d in draws),
            ids=tuple(str(d.example) for d in draws),
        )


def collate_drawings(
    examples: list[DrawExample],
    tokens: Tokens,
    transform: ImageTransform,
    image_size: int,
    datasets: tuple[str, ...] = (),
    ids: tuple[str, ...] = (),
) -> Batch:
    """A batch to draw; without target images, a batch to sample from.

    Raises ValueError or OSError naming the example whose image cannot be read.
    """
    subjects: list[Tensor] = []
    targets: list[Tensor] = []
    index: list[list[int]] = []
    texts: list[list[int]] = []
    for example in examples:
        texts.append(tokens.instruction(example.instruction))
        index.append([len(subjects) if example.image else -1])
        try:
            if example.image is not None:
                subjects.append(transform(example.image()))
            if example.target is not None:
                targets.append(target_pixels(example.target(), image_size))
        except (ValueError, OSError) as error:
            where = example.where or repr(example.instruction)
            raise type(error)(f"{where}: {error}") from error
    no_prompt = torch.zeros(len(examples), 0, dtype=torch.long)
    response = torch.zeros(len(examples), 1, dtype=torch.long)  # one image counts as one token
    qformer_ids, qformer_mask = pad(texts)
    return Batch(
        image_index=torch.tensor(index),
        pixel_values=torch.stack(subjects) if subjects else None,
        target_values=torch.stack(targets) if targets else None,
        qformer_ids=qformer_ids,
        qformer_mask=qformer_mask,
        prompt_ids=no_prompt,
        prompt_mask=no_prompt,
        response_ids=response,
        response_mask=response + 1,
        datasets=datasets,
        ids=ids,
    )


def target_pixels(image: Image.Image, size: int) -> Float[Tensor, "3 G G"]:
    """The largest central square of an image, resized to ``size`` pixels, in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square, np.float32) / 127.5 - 1).permute(2, 0, 1)


@dataclass(frozen=True)
class Interleaved:
    """Alternates micro batches to draw and to answer; the number of a micro batch decides its kind.

    ``share`` of the micro batches, spread evenly, come from ``understanding``. A step of either
    loader is a micro batch here, or what that loader cuts it into; ``accumulate`` of either kind
    make one optimizer step.
    """

    drawing: Batches
    understanding: Batches
    share: float
    accumulate: int = 1

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        """The micro batches of each optimizer step from ``step`` on."""
        first = step * self.accumulate
        drawn, understood = micro_batches_before(first, self.share)
        drawing, understanding = self.drawing.iterate(drawn), self.understanding.iterate(understood)
        micro_batches: list[Batch] = []
        for number in count(first + 1):
            due = micro_batches_before(number, self.share)[1] > understood
            understood += due
            micro_batches += next(understanding if due else drawing)
            if number % self.accumulate == 0:
                yield micro_batches
                micro_batches = []


def micro_batches_before(number: int, share: float) -> tuple[int, int]:
    """How many of the first ``number`` interleaved micro batches draw, and how many answer."""
    understood = int(number * share)
    return number - understood, understood
