"""Training batches: ``Loader.batch(step)`` is a function of (seed, step) alone.

Which examples (``order.py``), which template and answer, which crop: all follow from the number
of the slot. So resuming at step s needs s and nothing else, workers only fetch ahead, and W ranks
together see what one rank with the whole batch sees.

With ``bucket_steps`` the slots of so many steps are sorted together, pictures before videos and
short before long, cut into batches, and the batches shuffled: a step has samples of like length,
and all steps of such a window together those that they would have had.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from torch.utils.data import DataLoader

from instructblip.core.batch import (
    Batch,
    Example,
    Sample,
)
from instructblip.data.order import Mixture, Order, mix
from instructblip.data.samples import (
    Examples,
    ImageReader,
    collate,
    make_sample,
)
from instructblip.data.templates import (
    Language,
    Rendered,
    check_template,
    render_instruction,
)
from instructblip.data.tokens import Tokens


class Loader:
    """Training batches from a mixture of data sets.

    ``batch_size`` counts the samples of one optimiser step over all ranks and micro batches:
    rank r of W takes the r-th of W equal parts, in ``accumulate`` micro batches. ``templates``
    overrides the templates of single data sets; ``languages`` says which
    are instructed in Chinese. ``bucket_steps`` 0 keeps the order drawn; 1 sorts the samples of a
    step over its parts and changes no step. Raises ValueError when a number does not divide.
    """

    def __init__(
        self,
        datasets: Mapping[str, Examples],
        mixture: Mixture,
        tokens: Tokens,
        images: ImageReader,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        bucket_steps: int = 0,
        templates: Mapping[str, Sequence[str]] | None = None,
        languages: Mapping[str, Language] | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise ValueError(
                f"batch_size {batch_size} does not divide into {world_size} ranks of "
                f"{accumulate} micro batches; expected a multiple of {world_size * accumulate}"
            )
        if {name: len(data) for name, data in datasets.items()} != mixture.sizes:
            raise ValueError(f"mixture {mixture.sizes} is not of the data sets {list(datasets)}")
        self.names, self.datasets = list(datasets), list(datasets.values())
        self.tokens, self.images = tokens, images
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.bucket_steps = bucket_steps
        self._window: tuple[int, list[list[int]]] = (-1, [])
        self.templates = dict(templates or {})
        self.languages: dict[str, Language] = dict(languages or {})
        for template in (text for own in self.templates.values() for text in own):
            check_template(template)
        probabilities = mixture.probabilities
        self.order = Order(
            [len(data) for data in self.datasets], [probabilities[n] for n in self.names], seed
        )

    def batch(self, step: int, micro: int = 0) -> Batch:
        """This rank's micro batch ``micro`` of the global batch of ``step``."""
        return collate([self.sample(slot) for slot in self.slots(step, micro)])

    def slots(self, step: int, micro: int = 0) -> Sequence[int]:
        """Slot numbers of a micro batch. In the order drawn they run on over micro batches, ranks
        and steps; sorted by length they run on over ranks first, so that no rank waits long."""
        size = self.batch_size // (self.world_size * self.accumulate)
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
        """The slots of each step of a window, short to long within a step."""
        if self._window[0] != window:
            count = self.bucket_steps * self.batch_size
            slots = range(window * count, (window + 1) * count)
            ordered = sorted(slots, key=self._length)
            batches = [ordered[i : i + self.batch_size] for i in range(0, count, self.batch_size)]
            random.Random(mix(self.seed, 5, window)).shuffle(batches)
            self._window = (window, batches)
        return self._window[1]

    def _length(self, slot: int) -> tuple[int, int]:
        """The pictures of a sample, of which all in a batch should have as many (``collate``); and
        its characters: close to its tokens, and no tokenizer has to run for them."""
        example, rendered = self.rendered(slot)
        seen = self.images.seen(example.images)
        return len(seen), len(rendered.prompt) + len(rendered.response)

    def sample(self, slot: int) -> Sample:
        """The sample of a slot, with its crop, template and answer."""
        draw = self.order[slot]
        example, rendered = self.rendered(slot)
        root = self.datasets[draw.dataset].image_root
        seed = mix(self._seed_of(slot), 4)
        return make_sample(example, rendered, self.tokens, self.images, root, seed)

    def rendered(self, slot: int) -> tuple[Example, Rendered]:
        """The example of a slot and its texts: the same template and answer each time."""
        draw = self.order[slot]
        example = self.datasets[draw.dataset][draw.example]
        rng = random.Random(self._seed_of(slot))
        name = self.names[draw.dataset]
        own = self.templates.get(name)
        template = rng.choice(own) if own else None
        return example, render_instruction(example, rng, template, self.languages.get(name, "en"))

    def _seed_of(self, slot: int) -> int:
        return mix(self.seed, 3, slot)

    def iterate(self, step: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """This rank's micro batches from the first of ``step`` on, ``accumulate`` to a step.

        ``workers`` processes fetch ahead; the batches and their order do not depend on them.
        """
        first = step * self.accumulate
        numbers = count(first) if stop is None else range(first, stop * self.accumulate)
        if not self.workers:
            return map(self._numbered, numbers)
        return iter(
            DataLoader(
                _Numbered(self),  # type: ignore[arg-type]
                batch_size=None,
                sampler=numbers,  # type: ignore[arg-type]
                num_workers=self.workers,
                prefetch_factor=2,
            )
        )

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def _numbered(self, number: int) -> Batch:
        return self.batch(*divmod(number, self.accumulate))


class _Numbered:
    """The loader as a map from number to micro batch, which is what torch's workers want."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, number: int) -> Batch:
        return self.loader._numbered(number)
