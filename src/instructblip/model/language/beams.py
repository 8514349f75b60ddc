"""Beam search in which the beams of a sample share its prompt and their common tokens.

transformers repeats [queries; prompt] for every beam and, at each step, copies the keys and values
of all beams into their new order. Here the prompt runs once per sample, and the tokens of its beams
follow it in one row as a growing tree: a token sees the prompt and its own ancestors. Reordering
the beams changes the mask and copies nothing. transformers keeps the search itself (scores,
penalties, ends). Five beams of cpu-mid take 1.83 instead of 3.48 s
(benchmarks/generate_cpu_2026-11-23.md).

Two beams of one sample, columns counted from the end of the prompt::

    step 0    the best first tokens are "a" and "the"             columns 0, 1    paths [[0], [1]]
              both best continuations belong to "the": reorder                    paths [[1], [1]]
    step 1    the newest tokens are "the cat" and "the dog"       columns 2, 3    paths [[1, 2],
                                                                                         [1, 3]]
              mask      prompt  a  the  cat  dog
              cat       x x x       x    x
              dog       x x x       x         x
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


class BeamTree:
    """The forward pass that transformers' ``generate`` calls, and the cache that it returns.

    transformers passes row i * beams + b for beam b of sample i. ``paths`` [B*beams, t] are the
    columns of each beam's tokens, counted from the end of the prompt.
    """

    def __init__(self, language: Any, beams: int) -> None:
        self.language, self.beams = language, beams
        self.paths = torch.empty(0)
        self.prompt_mask = torch.empty(0)  # [B, X]
        self.cache: Any = None

    def model(self) -> Any:
        """A shallow copy of the language model with this forward pass."""
        model = copy.copy(self.language.model)
        model.forward = self.forward
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B*beams, 1, W] behind the prompt, or behind the newest token of each beam."""
        if inputs_embeds is not None:
            if attention_mask is None:  # transformers drops a mask of ones
                attention_mask = torch.ones_like(inputs_embeds[:, :, 0], dtype=torch.long)
            self.cache = past_key_values
            logits = self._start(inputs_embeds[:: self.beams], attention_mask[:: self.beams])
        else:
            assert input_ids is not None
            logits = self._grow(input_ids.view(-1, self.beams))
        cache: Any = self  # transformers reorders it and passes it to the next step
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    def reorder_cache(self, beams: Int[Tensor, " b"]) -> None:
        """Row i continues what was row ``beams[i]``."""
        self.paths = self.paths[beams]

    def get_seq_length(self) -> int:
        """Tokens of each beam so far, prompt included."""
        return self.prompt_mask.shape[1] + self.paths.shape[1]

    def _start(
        self, embeds: Float[Tensor, "B X L"], mask: Int[Tensor, "B X"]
    ) -> Float[Tensor, "b W"]:
        """Logits behind the prompt, the same for all beams of a sample."""
        self.prompt_mask = mask
        self.paths = mask.new_empty(len(mask) * self.beams, 0)
        hidden = self.language.run(
            (mask.cumsum(1) - 1).clamp(min=0),
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=self.cache,
        ).last_hidden_state
        return self.language.logits(hidden[:, -1]).repeat_interleave(self.beams, 0)

    def _grow(self, ids: Int[Tensor, "B beams"]) -> Float[Tensor, "b W"]:
        """Logits behind ``ids``, the newest token of each beam."""
        step = self.paths.shape[1]
        newest = torch.arange(self.beams, device=ids.device) + step * self.beams  # columns
        self.paths = torch.cat([self.paths, newest.repeat(len(ids))[:, None]], 1)
        width = (step + 1) * self.beams
        visible = self.paths.new_zeros(len(self.paths), width, dtype=torch.bool)
        visible = visible.scatter(1, self.paths, True).unflatten(0, (-1, self.beams))
        hidden = self.language.run(
            (self.prompt_mask.sum(1, keepdim=True) + step).expand_as(ids),
            input_ids=ids,
            attention_mask=self.language.tree_mask(self.prompt_mask, visible),
            past_key_values=self.cache,
        ).last_hidden_state
        return self.language.logits(hidden).flatten(0, 1)
