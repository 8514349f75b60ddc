"""Training batches: ``Loader.step(step)`` is a function of (seed, step, rank) alone.

The number of a slot decides everything about its sample: the example (``order.py``), the template
and the answer, the crop. So a run resumes at step s without any other state, worker processes only
compute in advance, and W ranks together see the samples that one rank would see.

Buckets: with ``bucket_steps`` = k > 0 the slots of k successive steps form a window. They are
sorted by number of images and length of text, cut into k batches, and the batches are shuffled. A
step then has samples of similar length, hence little padding, and the window as a whole has the
same samples as without buckets.

Micro batches: a rank takes its share of a step in ``accumulate`` parts of equal size, or in parts
of at most ``tokens_per_micro_batch`` tokens. Neither changes the samples of a step, nor its loss.
"""

import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from instructblip.core.batch import Batch, Sample
from instructblip.core.example import Example
from instructblip.data.order import Draw, Mixture, Order, mix
from instructblip.data.samples import Examples, ImageReader, collate, make_sample
from instructblip.data.templates import Language, Rendered, check_template, render_instruction
from instructblip.data.tokens import Tokens


def deal(lengths: Sequence[Any], ranks: int) -> list[list[int]]:
    """The samples of a step by rank, the longest first: dealt back and forth, so that all ranks
    have nearly the same lengths, and at most one sample more than another.

    Lengths 9, 8, 5, 4, 2 for two ranks: samples 0, 3, 4 (15 together) and 1, 2 (13).
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for place, sample in enumerate(order):
        turn, seat = divmod(place, ranks)
        hands[seat if turn % 2 == 0 else ranks - 1 - seat].append(sample)
    return hands


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Samples in parts of at most ``budget`` tokens where each row is as long as the longest of its
    part; a sample that is longer than that is alone. The longest samples come first."""
    parts: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(sample)
        else:
            parts.append([sample])
    return parts


def micro_batch_size(batch_size: int, world_size: int, accumulate: int) -> int:
    """Samples of one micro batch of one rank; ValueError where a step does not divide."""
    if batch_size < 1 or batch_size % (world_size * accumulate):
        raise ValueError(
            f"batch_size {batch_size} does not divide into {world_size} ranks of "
            f"{accumulate} micro batches; expected a multiple of {world_size * accumulate}"
        )
    return batch_size // (world_size * accumulate)


class Loader:
    """The training batches of one rank, drawn from a mixture of data sets.

    Args:
        datasets: by name; ``mixture`` has the same names and sizes.
        images: reads pixels or, where it has ``features``, stored features; one reader for all data
            sets, or one for each.
        batch_size: samples of one optimizer step over all ranks and micro batches, a multiple of
            ``world_size * accumulate``.
        rank: this process among ``world_size``.
        accumulate: micro batches in one step of a rank.
        tokens_per_micro_batch: the most tokens of a micro batch, in place of ``accumulate``: the
            number of ranks may be any, and each cuts its share of a step.
        tokens_per_image: those that the language model reads of an image, for the former.
        workers: processes that compute batches in advance in ``iterate``, which change no batch; 0
            computes them here.
        bucket_steps: steps whose samples are sorted by length together. 0 keeps the order drawn; 1
            sorts within each step, so the samples of a step stay the same.
        templates: instruction templates of single data sets, in place of those of their tasks.
        languages: of the instructions of a data set; English by default.

    Raises ValueError for a batch size that does not divide, a mixture of other data sets, and a
    template with an unknown place.
    """

    def __init__(
        self,
        datasets: Mapping[str, Examples],
        mixture: Mixture,
        tokens: Tokens,
        images: ImageReader | Mapping[str, ImageReader],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        tokens_per_micro_batch: int | None = None,
        tokens_per_image: int = 0,
        workers: int = 0,
        bucket_steps: int = 0,
        templates: Mapping[str, Sequence[str]] | None = None,
        languages: Mapping[str, Language] | None = None,
    ) -> None:
        if tokens_per_micro_batch is None:
            self.micro_size = micro_batch_size(batch_size, world_size, accumulate)
        self.budget, self.tokens_per_image = tokens_per_micro_batch, tokens_per_image
        sizes = {name: len(data) for name, data in datasets.items()}
        if sizes != mixture.sizes:
            raise ValueError(f"the mixture has {mixture.sizes}; expected the data sets {sizes}")
        self.names, self.datasets = list(datasets), list(datasets.values())
        self.tokens = tokens
        self.images = dict.fromkeys(datasets, images) if isinstance(images, ImageReader) else images
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.bucket_steps = bucket_steps
        self.templates = dict(templates or {})
        self.languages: dict[str, Language] = dict(languages or {})
        for texts in self.templates.values():
            for template in texts:
                check_template(template)
        probabilities = mixture.probabilities
        self.order = Order(list(sizes.values()), [probabilities[name] for name in self.names], seed)
        self._window: tuple[int, list[list[int]]] = (-1, [])  # the last window and its batches

    def step(self, step: int) -> list[Batch]:
        """The micro batches of this rank at ``step``."""
        return [self.collate(part) for part in self.parts(step)]

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Micro batch ``micro`` of this rank at ``step``."""
        return self.collate(self.parts(step)[micro])

    def collate(self, slots: Sequence[int]) -> Batch:
        """The batch of the samples of ``slots``."""
        return collate([self.sample(slot) for slot in slots])

    def parts(self, step: int) -> list[Sequence[int]]:
        """The slots of each micro batch of this rank at ``step``."""
        if self.budget is None:
            return [self.slots(step, micro) for micro in range(self.accumulate)]
        slots = self._slots_of_all(step)
        # by characters: each rank tokenizes its samples alone
        hand = deal([self._length(slot) for slot in slots], self.world_size)[self.rank]
        mine = [slots[i] for i in hand]
        parts = cut([self._tokens(slot) for slot in mine], self.budget)
        return [[mine[i] for i in part] for part in parts]

    def _slots_of_all(self, step: int) -> Sequence[int]:
        """The slots of a step, of all ranks."""
        if self.bucket_steps:
            return self._batches(step // self.bucket_steps)[step % self.bucket_steps]
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def _tokens(self, slot: int) -> int:
        """Tokens of the language model's row of a sample."""
        example, rendered = self.rendered(slot)
        images = self.images[self.names[self.order[slot].dataset]]
        number = len(images.select(example.images))
        texts = self.tokens.tokenize(rendered, number)
        text = len(texts.prompt_ids) + len(texts.response_ids)
        return number * self.tokens_per_image + text

    def sample(self, slot: int) -> Sample:
        """The sample of a slot, with its crop, template and answer."""
        return self.sample_of(self.order[slot], self._seed_of(slot))

    def sample_of(self, draw: Draw, seed: int) -> Sample:
        """The sample of an example; ``seed`` decides crop, template and answer."""
        example, rendered = self.render(draw, seed)
        image_root = self.datasets[draw.dataset].image_root
        images = self.images[self.names[draw.dataset]]
        return make_sample(example, rendered, self.tokens, images, image_root, mix(seed, 4))

    def rendered(self, slot: int) -> tuple[Example, Rendered]:
        """The example of a slot and its texts: the same template and answer at every call."""
        return self.render(self.order[slot], self._seed_of(slot))

    def render(self, draw: Draw, seed: int) -> tuple[Example, Rendered]:
        """An example and its texts."""
        name, example = self.names[draw.dataset], self.datasets[draw.dataset][draw.example]
        rng = random.Random(seed)
        templates = self.templates.get(name)
        template = rng.choice(templates) if templates else None
        return example, render_instruction(example, rng, template, self.languages.get(name, "en"))

    def _seed_of(self, slot: int) -> int:
        return mix(self.seed, 3, slot)

    def slots(self, step: int, micro: int = 0) -> Sequence[int]:
        """The slots of a micro batch of this rank, of ``accumulate`` a step.

        Without buckets the slots of a step are dealt in blocks, first by rank, then by micro batch.
        With buckets, where they are sorted by length, all ranks take neighbouring blocks for the
        same ``micro``: similar lengths, so that no rank waits long for another.
        """
        size = self.micro_size
        if self.bucket_steps:
            batch = self._batches(step // self.bucket_steps)[step % self.bucket_steps]
            start = (micro * self.world_size + self.rank) * size
            return batch[start : start + size]
        start = step * self.batch_size + (self.rank * self.accumulate + micro) * size
        return range(start, start + size)

    def step_of(self, slot: int) -> int:
        """The step that trains on a slot."""
        if not self.bucket_steps:
            return slot // self.batch_size
        window = slot // (self.bucket_steps * self.batch_size)
        place = next(i for i, batch in enumerate(self._batches(window)) if slot in batch)
        return window * self.bucket_steps + place

    def _batches(self, window: int) -> list[list[int]]:
        """The slots of each step of a window, in the order of the steps; sorted within a step."""
        if self._window[0] != window:
            size = self.bucket_steps * self.batch_size
            slots = sorted(range(window * size, (window + 1) * size), key=self._length)
            batches = [slots[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
            random.Random(mix(self.seed, 5, window)).shuffle(batches)
            self._window = (window, batches)
        return self._window[1]

    def _length(self, slot: int) -> tuple[int, int]:
        """Images of a sample, each of which is Q tokens of its row; then its characters, which are
        near to its tokens and need no tokenizer."""
        example, rendered = self.rendered(slot)
        images = self.images[self.names[self.order[slot].dataset]]
        num_images = len(images.select(example.images))
        return num_images, len(rendered.prompt) + len(rendered.response)

    def iterate(self, step: int = 0, stop: int | None = None) -> Iterator[list[Batch]]:
        """This rank's micro batches, a list for each step from ``step`` up to ``stop`` (excluded;
        None never ends). For a GPU the images are in 8 bits, as ``Batch.to`` reads them."""
        loader = self
        if torch.cuda.is_available():
            loader = copy(self)
            readers = {
                id(reader): replace(reader, in_8_bits=True) for reader in self.images.values()
            }
            loader.images = {name: readers[id(reader)] for name, reader in self.images.items()}
        return iterate_steps(loader.step, self.workers, step, stop)


def iterate_steps(
    make: Callable[[int], list[Batch]], workers: int, step: int = 0, stop: int | None = None
) -> Iterator[list[Batch]]:
    """``make(step)`` for each step.

    ``workers`` processes prepare steps ahead; 0 prepares each when it is asked for. The batches and
    their order do not depend on ``workers``.
    """
    numbers = count(step) if stop is None else range(step, stop)
    if not workers:
        return map(make, numbers)
    loader = DataLoader(
        _Steps(make),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
    )
    return iter(loader)


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the parent decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Steps(Dataset[list[Batch]]):
    """Steps as a map from their number to micro batches, as torch's workers need it."""

    def __init__(self, make: Callable[[int], list[Batch]]) -> None:
        self.make = make

    def __getitem__(self, step: int) -> list[Batch]:
        return self.make(step)
