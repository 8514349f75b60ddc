"""Answers by generation and by ranking candidates. Both walk the same steps as the loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.candidates import Normalization
from instructblip.model.language.generate import OnTokens
from instructblip.model.language.ranking import rank


@torch.no_grad()
def generate_responses(
    model: InstructBlip,
    batch: Batch,
    on_tokens: OnTokens | None = None,
    num_beams: int = 1,
    max_new_tokens: int = 32,
    min_new_tokens: int = 0,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Token ids of each sample's response, without prompt and end token.

    Greedy by default; beams with ``num_beams`` > 1; ``temperature`` and ``top_p`` count only when
    ``do_sample``. Responses in the batch are ignored. The model answers in eval mode.
    ``on_tokens`` is called with the newest token of every sample [B] at each step, padding after
    its end; not with beams, whose tokens are settled at the end. What it raises stops the run.
    """
    decoding: dict[str, object] = {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "length_penalty": length_penalty,
        "repetition_penalty": repetition_penalty,
        "do_sample": do_sample,
    }
    if do_sample:
        decoding |= {"temperature": temperature, "top_p": top_p}
    training = model.training
    model.eval()
    try:
        queries = model.encode_queries(batch)
        with model.language_precision():
            return model.language.generate(queries, batch, on_tokens, **decoding)
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
    end token out of the score. "sum" adds up the tokens, "mean" divides by their number. Picture
    and prompt are encoded once; at most ``chunk`` candidates run at a time as a prefix tree, fewer
    where they are long: it bounds memory and changes no score. What ``on_chunk``, called before
    each chunk, raises stops the run. Raises ValueError for a candidate without a token to score.
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
