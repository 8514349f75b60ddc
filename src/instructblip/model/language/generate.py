"""Generation by transformers, token by token told, each response cut at its end token."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

# The prompt is given as embeddings, in the official code as well: what it repeats is the answer.
warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")

OnTokens = Callable[[list[int]], None]
"""Is told the newest token of every row; after its end token a row gets padding."""


class _Listener(BaseStreamer):
    """Hands the tokens of each step on. transformers' first call brings what stood there before."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self.on_tokens, self.started = on_tokens, False

    def put(self, value: Tensor) -> None:
        if self.started:
            self.on_tokens(value.tolist())
        self.started = True

    def end(self) -> None:
        """Nothing is held back."""


def generate(
    model: Any, on_tokens: OnTokens | None, decoding: dict[str, Any], **inputs: Any
) -> list[list[int]]:
    """Run transformers' ``generate`` and cut each row at its first end token (end excluded).

    A search with beams settles its tokens at the end, so ``on_tokens`` hears nothing of it.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(**decoding)
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if ends else 0
    if on_tokens is not None and config.num_beams == 1:
        inputs["streamer"] = _Listener(on_tokens)
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=config)
    rows = output.tolist()
    if model.config.is_encoder_decoder:
        rows = [row[1:] for row in rows]  # the start token
    return [_until(row, ends) for row in rows]


def _until(row: list[int], ends: list[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in ends:
            return row[:position]
    return row
