"""What requests about the same image share.

A server is asked several questions about one image, and one question again and again. The features
of an image are computed once, and of an image and an instruction the language model reads the
prompt once, as long as they are among what was used lately. Keys state the whole input, so two
requests never share what differs in a byte; the answers are those of the requests alone, up to the
rounding of batches of different sizes.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from instructblip.core.batch import Sample
from instructblip.core.recent import Recent, Sized
from instructblip.model.language.running import Prompt

T = TypeVar("T", bound=Sized)
S = TypeVar("S")


class Shared:
    """Features and prompts, half of ``max_bytes`` each, from ``Engine.encode`` and ``Engine.read``.

    Samples have keys that state the content of their images.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Tensor]], list[Tensor]],
        read: Callable[[Sequence[Sample]], list[Prompt]],
        max_bytes: int,
    ) -> None:
        self._encode, self._read = encode, read
        self._features: Recent[Tensor] = Recent(max_bytes // 2)
        self._prompts: Recent[Prompt] = Recent(max_bytes // 2)

    def with_features(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with features instead of pixels."""
        pixels = {
            key: image
            for sample in samples
            for key, image in zip(sample.image_keys, sample.pixels or (), strict=True)
        }
        features = _find(self._features, pixels, self._encode)
        return [
            replace(sample, pixels=None, features=tuple(features[k] for k in sample.image_keys))
            for sample in samples
        ]

    def prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """The prompts of the samples after the language model has read them."""
        keys = [
            (each.image_keys, *map(tuple, (each.qformer_ids, each.prompt_ids)), each.image_places)
            for each in samples
        ]
        found = _find(
            self._prompts,
            dict(zip(keys, samples, strict=True)),
            lambda new: self._read(self.with_features(new)),
        )
        return [found[key] for key in keys]


def _find(
    recent: Recent[T], sources: dict[Any, S], make: Callable[[Sequence[S]], Sequence[T]]
) -> dict[Hashable, T]:
    """The value of each key: of those that are not kept, what ``make`` makes of their sources."""
    found = {key: recent.get(key) for key in sources}
    new = [key for key, value in found.items() if value is None]
    if new:
        for key, value in zip(new, make([sources[key] for key in new]), strict=True):
            found[key] = value
            recent.put(key, value)
    return found  # type: ignore[return-value]
