"""Generation by transformers, with each response cut at its end token."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

from instructblip.model.language.fast.attention import packs

STATIC_DEVICES = ("cuda",)
"""Where the cache of a decoder has its full size from the start. A cache that grows is copied for
each token, three passes over its memory instead of one; on a CPU short answers matter more."""

OnTokens = Callable[[list[int]], Sequence[bool] | None]
"""Receives the newest token of every row at each step, padding after the row's end. Returns which
rows end here; None ends none."""


class _Watched(StoppingCriteria):
    """Calls ``on_tokens`` at each step, and ends the rows that it returns."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self.on_tokens = on_tokens
        self.lengths: dict[int, int] = {}
        """Row that was ended -> number of its tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        for row, ended in enumerate(self.on_tokens(input_ids[:, -1].tolist()) or ()):
            if ended:
                self.lengths.setdefault(row, input_ids.shape[1])
        ended = [row in self.lengths for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)  # [B]


def generate(
    model: Any, on_tokens: OnTokens | None, decoding: dict[str, Any], **inputs: Any
) -> list[list[int]]:
    """Token ids of each row from transformers' ``generate``, up to and without its end token, or
    up to where ``on_tokens`` ends it.

    A beam search decides its tokens at the end, so it does not call ``on_tokens``.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(**decoding)
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if ends else 0
    if _is_static(model) and config.num_beams == 1:  # compiling it would take longer than an answer
        config.update(cache_implementation="static", disable_compile=True)
    watched = None if on_tokens is None or config.num_beams > 1 else _Watched(on_tokens)
    # The prompt is passed as embeddings, as in the official code: the penalty applies to the
    # response. transformers would not apply it to as many tokens as the prompt has padding.
    penalty, config.repetition_penalty = config.repetition_penalty or 1.0, None
    with torch.no_grad():
        output = model.generate(
            **inputs,
            generation_config=config,
            logits_processor=[] if penalty == 1.0 else [RepetitionPenaltyLogitsProcessor(penalty)],
            stopping_criteria=None if watched is None else [watched],
        )
    rows = output.tolist()
    if watched is not None:
        rows = [row[: watched.lengths.get(i)] for i, row in enumerate(rows)]
    if model.config.is_encoder_decoder:
        rows = [row[1:] for row in rows]  # without the start token
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


def _is_static(model: Any) -> bool:
    """Whether the cache may have its full size: a decoder as a whole on a device for that."""
    whole = {parameter.device for parameter in model.parameters()} == {model.device}
    return (
        model.device.type in STATIC_DEVICES
        and packs(model)
        and whole
        and not (model.config.is_encoder_decoder)
    )
