"""Generation by transformers, with each response cut at its end token."""

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

# The prompt is passed as embeddings, as in the official code: the penalty applies to the response.
warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")

OnTokens = Callable[[list[int]], None]
"""Receives the newest token of every row at each step, padding after the row's end token."""


class _Streamer(BaseStreamer):
    """Calls ``on_tokens`` at each step. transformers' first call contains the prompt."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self.on_tokens, self.started = on_tokens, False

    def put(self, value: Tensor) -> None:
        if self.started:
            self.on_tokens(value.tolist())
        self.started = True

    def end(self) -> None:
        """Nothing is buffered."""


def generate(
    model: Any, on_tokens: OnTokens | None, decoding: dict[str, Any], **inputs: Any
) -> list[list[int]]:
    """Token ids of each row from transformers' ``generate``, up to and without its end token.

    A beam search decides its tokens at the end, so it does not call ``on_tokens``.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(**decoding)
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if ends else 0
    if on_tokens is not None and config.num_beams == 1:
        inputs["streamer"] = _Streamer(on_tokens)
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=config)
    rows = output.tolist()
    if model.config.is_encoder_decoder:
        rows = [row[1:] for row in rows]  # without the start token
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
