"""Ranking: the likelihoods of many candidates behind one prompt that is computed once."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from instructblip.core.batch import Batch
from instructblip.model.language.candidates import (
    Candidates,
    Forest,
    Layout,
    Normalization,
    by_sample,
    in_chunks,
    scored_tokens,
)


@dataclass(frozen=True)
class Prefix:
    """[queries; prompt] of B samples as the model keeps it.

    ``first`` [B, vocabulary] are the logits of the first token behind it, ``cache`` its keys and
    values, ``mask`` [B, K+T] its tokens, ``states`` [B, K+T, L] those of an encoder.
    """

    first: Tensor
    cache: Any
    mask: Tensor
    states: Tensor | None = None


class Ranker(Protocol):
    """What ranking needs of a language model: `CausalLanguage` and `Seq2SeqLanguage`."""

    def prefill(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Prefix:
        """Run the prefix once."""
        ...

    def layout(self, forest: Forest, device: torch.device) -> Layout:
        """How the model reads a forest of candidates."""
        ...

    def proceed(self, prefix: Prefix, layout: Layout) -> Float[Tensor, "n W"]:
        """Logits at every node of the layout, behind the prefixes of their samples."""
        ...


@torch.no_grad()
def rank(
    language: Ranker,
    queries: Float[Tensor, "B K L"],
    batch: Batch,
    candidates: Candidates,
    normalization: Normalization = "sum",
    include_end: bool = True,
    chunk: int = 256,
    on_chunk: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Log-likelihood in nats of every candidate [C] of each sample.

    The prefix runs once per sample. ``chunk`` candidates at a time continue from its keys and
    values as a prefix tree, so what a candidate costs are the tokens it has for itself.
    ``on_chunk`` is called before each chunk and ends it all by raising.
    """
    pairs = scored_tokens(candidates, include_end, len(batch))
    if not pairs:
        return by_sample(pairs, [], candidates, queries)
    prefix = language.prefill(queries, batch)
    scores = []
    for part in in_chunks(pairs, chunk):
        if on_chunk is not None:
            on_chunk()
        forest = Forest.of(part)
        logits = prefix.first[torch.tensor(forest.samples, device=queries.device)]
        if len(forest):
            layout = language.layout(forest, queries.device)
            logits = torch.cat([logits, language.proceed(prefix, layout)])
        scores.append(forest.scores(logits, normalization))
    return by_sample(pairs, scores, candidates, queries)


def of_samples(values: Tensor, sample: Int[Tensor, " r"]) -> Tensor:
    """``values[sample]``; without a copy where all rows are of one sample."""
    if len(sample) > 1 and bool((sample == sample[0]).all()):
        return values[sample[:1]].expand(len(sample), *values.shape[1:])
    return values[sample]


def expanded(cache: Any, sample: Int[Tensor, " r"]) -> Any:
    """A cache with row ``sample[i]`` of ``cache`` as its row i; ``cache`` itself stays as it is."""
    if isinstance(cache, EncoderDecoderCache):
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        return EncoderDecoderCache(expanded(own, sample), expanded(cross, sample))
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            layer.keys = of_samples(layer.keys, sample)
            layer.values = of_samples(layer.values, sample)
        else:  # a state of another kind
            layer.batch_select_indices(sample)
    return chosen
