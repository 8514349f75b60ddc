"""Answers by generation and by ranking candidates, through the same steps as the loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.model.decoding import GREEDY, Decoding
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.generate import OnTokens
from instructblip.model.language.ranking import Normalization, rank


@torch.no_grad()
def generate_responses(
    model: InstructBlip,
    batch: Batch,
    on_tokens: OnTokens | None = None,
    decoding: Decoding = GREEDY,
) -> list[list[int]]:
    """Token ids of each sample's response, without prompt and end token.

    Responses in the batch are ignored. The model answers in eval mode. ``on_tokens`` is called with
    the newest token of every sample [B] at each step, padding after its end; not with beams, whose
    tokens are known at the end only. An error that it raises ends the run.
    """
    training = model.training
    model.eval()
    try:
        queries = model.encode_queries(batch)
        with model.language_precision():
            return model.language.generate(queries, batch, on_tokens, **decoding.generate_options())
    finally:
        model.train(training)


@torch.no_grad()
def rank_candidates(
    model: InstructBlip,
    batch: Batch,
    candidates: Sequence[Sequence[Sequence[int]]],
    normalization: Normalization = "sum",
    include_end: bool = True,
    chunk: int = 256,
    on_chunk: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Log-likelihoods in nats [C] of the candidates of each sample, to be compared by argmax.

    ``candidates[b][c]`` are token ids that end with the end token; ``include_end=False`` leaves the
    end token out of the score. "sum" adds up the tokens, "mean" divides by their number. Image
    and prompt are encoded once; at most ``chunk`` candidates run at a time as a prefix tree, fewer
    where they are long, which limits memory and changes no score. ``on_chunk`` is called before
    each chunk; an error that it raises ends the run. Raises ValueError for a candidate without a
    token to score.
    """
    training = model.training
    model.eval()
    try:
        queries = model.encode_queries(batch)
        with model.language_precision():
            return rank(
                model.language,
                queries,
                batch,
                candidates,
                normalization,
                include_end,
                chunk,
                on_chunk,
            )
    finally:
        model.train(training)
