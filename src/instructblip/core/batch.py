"""The contract between the floors: what data hands to the model, and nothing else.

Dimensions, used in every signature and comment of the project:

===  ======================================================================
B    samples in a batch
N    distinct images in a batch (N <= B * F: several samples may share one)
F    frames of a sample; 1 for a still image
S    side of a square image in pixels
P    tokens that the image encoder gives for one image (patches + class)
V    width of the image encoder
Q    query tokens of the Q-Former
D    width of the Q-Former
I    tokens of the instruction as the Q-Former reads it
T    tokens of the prompt as the language model reads it
R    tokens of the response, its end token included
L    width of the language model
C    candidates of a sample that is answered by ranking
G    side of a square image to be drawn, in pixels
===  ======================================================================
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that carries no loss (the convention of torch's cross-entropy)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One example as the model reads it: images loaded, instruction rendered, text tokenized.

    ``image_keys`` tell equal images apart from different ones inside a batch, so that each
    distinct image is encoded once. Exactly one of ``pixels`` [F][3, S, S] and ``features``
    [F][P, V] is set. ``response_ids`` ends with the end token; it is empty at inference.

    ``image_places`` [F] are the numbers of prompt ids in front of each image, ascending; empty
    means that all images are in front of the prompt.

    ``scales`` [F] goes with images in 8 bits, see ``Batch.scale``.
    """

    image_keys: tuple[str, ...]
    pixels: tuple[Tensor, ...] | None = None
    features: tuple[Tensor, ...] | None = None
    scales: tuple[Tensor, ...] | None = None
    qformer_ids: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[int] = field(default_factory=list)
    image_places: tuple[int, ...] = ()
    dataset: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B samples over N distinct images. All text is padded on the right; masks are 1 on tokens.

    Exactly one of ``pixel_values`` [N, 3, S, S] and ``image_features`` [N, P, V] is set.
    ``image_index`` [B, F] says which of the N images the frames of each sample are; a sample with
    fewer than F images has -1 behind them, where the language model reads nothing.
    ``image_places`` [B, F] says how many ids of the prompt come before each of them; None where
    all images of the batch are in front.
    With ``scale`` images are in 8 bits until `to`, so that fewer bytes travel to a GPU: pixels are
    uint8 levels, with their values [3, 256] by channel, or features int8, with a factor [N, P] for
    each token.
    ``datasets`` and ``ids`` name the samples for logs and errors; the model never reads them.

    A batch of preference training has chosen responses and then as many rejected ones, with their
    log-likelihoods ``reference`` [B] under the start; ``counts`` [B] are what the samples weigh in
    the mean of the loss (None: their response tokens).

    A batch to draw has ``target_values`` [B, 3, G, G] in [-1, 1], the images that are asked for.
    There no image goes with an instruction whose ``image_index`` is -1 (no pixels at all where none
    does), and ``response_mask`` [B, 1] is all ones: an image counts as one token.
    """

    image_index: Tensor  # int64 [B, F]
    qformer_ids: Tensor  # int64 [B, I]
    qformer_mask: Tensor  # int64 [B, I]
    prompt_ids: Tensor  # int64 [B, T]
    prompt_mask: Tensor  # int64 [B, T]
    response_ids: Tensor  # int64 [B, R]
    response_mask: Tensor  # int64 [B, R]
    pixel_values: Tensor | None = None  # float [N, 3, S, S]
    image_features: Tensor | None = None  # float [N, P, V]
    target_values: Tensor | None = None  # float [B, 3, G, G]
    image_places: Tensor | None = None  # int64 [B, F]
    scale: Tensor | None = None  # float [3, 256] or [N, P]
    reference: Tensor | None = None  # float [B]
    counts: Tensor | None = None  # int64 [B]
    kept: "Batch | None" = None  # what `to` leaves on the CPU: see `host`
    datasets: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.image_index.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The same batch with every tensor on ``device``, where images in 8 bits become floats;
        ``host`` stays where it is."""
        moved = self._map(lambda tensor: send(tensor, device, non_blocking))._in_floats()
        if torch.device(device).type == "cpu":
            return replace(moved, kept=None)
        no_images = dict.fromkeys(("pixel_values", "image_features", "target_values", "scale"))
        return replace(moved, kept=replace(self.host, **no_images))

    def _in_floats(self) -> "Batch":
        scale, pixels, features = self.scale, self.pixel_values, self.image_features
        if scale is None:
            return self
        if features is not None:
            features = (features * scale[:, :, None]).to(torch.bfloat16)
        if pixels is not None:
            first = torch.arange(0, scale.numel(), scale.shape[1], device=scale.device)
            pixels = scale.take(pixels.long() + first[:, None, None])
        return replace(self, pixel_values=pixels, image_features=features, scale=None)

    @property
    def host(self) -> "Batch":
        """The texts, masks and indices on the CPU, if the batch came from there. Reading a length
        from them waits for no device."""
        return self if self.kept is None else self.kept

    def pin_memory(self) -> "Batch":
        """The same batch in memory from which a GPU copies while it computes; torch's loader calls
        it by this name."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors.items()})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def sample_names(self) -> list[str]:
        """``dataset/id`` of each sample, ``?/number`` where the batch names none."""
        datasets, ids = self.datasets or ("?",) * len(self), self.ids or range(len(self))
        return [f"{dataset}/{id_}" for dataset, id_ in zip(datasets, ids, strict=True)]

    @property
    def sample_counts(self) -> Tensor:
        """What each sample weighs in the mean of the loss [B], on the CPU: its response tokens,
        unless ``counts`` says otherwise."""
        host = self.host
        return host.response_mask.sum(1) if host.counts is None else host.counts

    @property
    def num_response_tokens(self) -> int:
        """The denominator of the mean."""
        return int(self.sample_counts.sum())


def sent_ahead(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The micro batches of each step on ``device``. A GPU copies those of the next step while it
    computes, if the caller does not wait for it in between."""
    if device.type != "cuda":
        yield from ([batch.to(device) for batch in batches] for batches in steps)
        return
    side = torch.cuda.Stream(device)
    for batches in steps:
        with torch.cuda.stream(side):
            moved = [batch.to(device) for batch in batches]
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for batch in moved:
            for tensor in batch.tensors.values():
                tensor.record_stream(current)  # its memory is not free before
        yield moved


def send(tensor: Tensor, device: torch.device | str, non_blocking: bool = True) -> Tensor:
    """``tensor`` on ``device``. The CPU does not wait for a copy to a GPU: that of a tensor that it
    made goes through pinned memory."""
    to_gpu = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    if to_gpu and non_blocking and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


class LossOutput(NamedTuple):
    """Loss of one batch. ``loss_sum`` and ``sample_losses`` [B] are sums in nats over the response
    tokens, ``num_tokens`` and ``sample_tokens`` [B] their numbers, int64: the mean belongs to the
    caller, who knows the tokens of the whole step. ``terms`` are the means that a loss of several
    adds up, by name. Only ``loss_sum`` carries gradients."""

    loss_sum: Tensor
    num_tokens: Tensor
    sample_losses: Tensor
    sample_tokens: Tensor
    terms: Mapping[str, Tensor] = MappingProxyType({})
