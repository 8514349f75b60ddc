"""Batches to draw, as a function of (seed, step) alone, and batches of two kinds in turn."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.data.images import ImageTransform
from instructblip.data.loader import iterate_batches
from instructblip.data.order import Mixture, Order
from instructblip.data.samples import pad
from instructblip.data.templates import Rendered
from instructblip.data.tokens import Tokens
from instructblip.text_to_image.tasks import DrawExample, Drawings
from instructblip.training.train import Batches


class DrawLoader:
    """Training batches from a mixture of drawing sets; ``iterate(step)`` is what the loop drives.

    ``batch_size`` counts the samples of one optimiser step over all ranks and micro batches.
    ``image_size`` is the decoder's, ``transform`` that of the reference pictures. ``starts``: the
    step at which a set joins the mixture, if that is not the first.
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
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise ValueError(
                f"batch_size {batch_size} does not divide into {world_size} ranks of "
                f"{accumulate} micro batches; expected a multiple of {world_size * accumulate}"
            )
        self.names, self.sets = list(sets), list(sets.values())
        self.tokens, self.transform, self.image_size = tokens, transform, image_size
        self.size, self.seed, self.rank = batch_size // (world_size * accumulate), seed, rank
        self.world_size, self.accumulate, self.workers = world_size, accumulate, workers
        self.weights, self.starts = dict(weights), dict(starts or {})
        self._orders: dict[frozenset[str], Order] = {}
        self._order(0)  # an empty mixture is noticed now

    def _order(self, step: int) -> Order:
        """Which example stands where, among the sets that have joined by ``step``."""
        present = frozenset(n for n in self.names if self.starts.get(n, 0) <= step)
        if present not in self._orders:
            sizes = {name: len(each) for name, each in zip(self.names, self.sets, strict=True)}
            weights = {n: self.weights.get(n, 1.0) if n in present else 0.0 for n in self.names}
            probabilities = Mixture(sizes=sizes, weights=weights).probabilities
            chances = [probabilities[name] for name in self.names]
            self._orders[present] = Order(list(sizes.values()), chances, self.seed)
        return self._orders[present]

    def iterate(self, step: int = 0) -> Iterator[Batch]:
        """This rank's micro batches from the first of ``step`` on, ``accumulate`` for each step."""
        return iterate_batches(self.batch, self.accumulate, self.workers, step)

    def batch(self, step: int, micro: int = 0) -> Batch:
        start = ((step * self.world_size + self.rank) * self.accumulate + micro) * self.size
        order = self._order(step)
        draws = [order[slot] for slot in range(start, start + self.size)]
        examples = [self.sets[d.dataset][d.example] for d in draws]
        names = tuple(self.names[d.dataset] for d in draws)
        ids = tuple(str(d.example) for d in draws)
        return collate_drawings(examples, self.tokens, self.transform, self.image_size, names, ids)


def collate_drawings(
    examples: list[DrawExample],
    tokens: Tokens,
    transform: ImageTransform,
    image_size: int,
    datasets: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
) -> Batch:
    """Examples -> a batch to draw; without target pictures, one to sample from.

    Raises ValueError naming the example whose picture cannot be read.
    """
    references: list[Tensor] = []
    targets: list[Tensor] = []
    index: list[list[int]] = []
    texts: list[list[int]] = []
    for example in examples:
        instruction = Rendered(example.instruction, example.instruction)
        texts.append(tokens.tokenize(instruction)[0])
        index.append([len(references) if example.image else -1])
        try:
            if example.image is not None:
                references.append(transform(example.image()))
            if example.target is not None:
                targets.append(target_pixels(example.target(), image_size))
        except (ValueError, OSError) as error:
            where = example.where or repr(example.instruction)
            raise type(error)(f"{where}: {error}") from error
    none = torch.zeros(len(examples), 0, dtype=torch.long)
    one = torch.zeros(len(examples), 1, dtype=torch.long)
    ids, mask = pad(texts)
    return Batch(
        image_index=torch.tensor(index),
        pixel_values=torch.stack(references) if references else None,
        target_values=torch.stack(targets) if targets else None,
        qformer_ids=ids,
        qformer_mask=mask,
        prompt_ids=none,
        prompt_mask=none,
        response_ids=one,
        response_mask=one + 1,
        datasets=datasets,
        ids=names,
    )


def target_pixels(picture: Image.Image, size: int) -> Tensor:
    """The largest square in the middle of a picture as float [3, size, size] in [-1, 1]."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square, np.float32) / 127.5 - 1).permute(2, 0, 1)


class Interleaved:
    """Micro batches to draw and to understand: which one it is follows from its number alone.

    ``share`` of the micro batches, spread evenly, come from ``understanding``. Both loaders give
    one micro batch a step of their own; ``accumulate`` of the mixed ones make a step of the run.
    """

    def __init__(
        self, drawing: Batches, understanding: Batches, share: float, accumulate: int = 1
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share of understanding must lie between 0 and 1; got {share}")
        self.drawing, self.understanding = drawing, understanding
        self.share, self.accumulate = share, accumulate

    def iterate(self, step: int) -> Iterator[Batch]:
        number = step * self.accumulate
        understood = int(number * self.share)
        drawing = self.drawing.iterate(number - understood)
        understanding = self.understanding.iterate(understood)
        while True:
            number += 1
            due = int(number * self.share) > understood
            understood += due
            yield next(understanding if due else drawing)
