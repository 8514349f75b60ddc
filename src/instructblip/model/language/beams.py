"""Beam search in which the beams of a sample share what they have in common.

transformers repeats [queries; prompt] for every beam, and at each step copies the keys and values
of all beams into their new order. Here the prompt runs once a sample, and the beams' tokens follow
it in one row as a growing tree: each sees the prompt and its own ancestors. A new order of the
beams changes the mask and nothing else. The search (scores, penalties, ends) stays transformers'.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


class BeamTree:
    """What transformers' ``generate`` calls in place of the model, and the cache it hands back.

    Row i * beams + b of what transformers passes is beam b of sample i. ``paths`` [B*beams, t] are
    the ancestors of each beam, the beam itself last, as positions behind the prompt.
    """

    def __init__(self, language: Any, beams: int) -> None:
        self.language, self.beams = language, beams
        self.paths = torch.empty(0)
        self.known = torch.empty(0)  # mask of the prompts [B, X]
        self.cache: Any = None

    def model(self) -> Any:
        """The language model with this forward; all else is shared with the model itself."""
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
        """Logits [B*beams, 1, vocabulary] behind the prompt, or behind the beams' newest tokens."""
        if inputs_embeds is not None:
            if attention_mask is None:  # transformers leaves out a mask of ones
                attention_mask = torch.ones_like(inputs_embeds[:, :, 0], dtype=torch.long)
            self.cache = past_key_values
            logits = self._start(inputs_embeds[:: self.beams], attention_mask[:: self.beams])
        else:
            assert input_ids is not None
            logits = self._grow(input_ids.view(-1, self.beams))
        cache: Any = self  # what is asked to reorder, and handed back at the next step
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    def reorder_cache(self, beams: Tensor) -> None:
        """Row i goes on from what row ``beams[i]`` was."""
        self.paths = self.paths[beams]

    def get_seq_length(self) -> int:
        """Tokens that each beam has behind it, prompt included."""
        return self.known.shape[1] + self.paths.shape[1]

    def _start(self, embeds: Tensor, mask: Tensor) -> Tensor:
        self.known = mask
        self.paths = mask.new_empty(len(mask) * self.beams, 0)
        hidden = self.language.run(
            (mask.cumsum(1) - 1).clamp(min=0),
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=self.cache,
        )
        return self.language.logits(hidden[:, -1]).repeat_interleave(self.beams, 0)

    def _grow(self, ids: Tensor) -> Tensor:
        step = self.paths.shape[1]
        newest = torch.arange(self.beams, device=ids.device) + step * self.beams
        self.paths = torch.cat([self.paths, newest.repeat(len(ids))[:, None]], 1)
        width = (step + 1) * self.beams
        visible = self.paths.new_zeros(len(self.paths), width, dtype=torch.bool)
        visible = visible.scatter(1, self.paths, True).unflatten(0, (-1, self.beams))
        positions = (self.known.sum(1, keepdim=True) + step).expand_as(ids)
        hidden = self.language.run(
            positions,
            input_ids=ids,
            attention_mask=self.language.tree_mask(self.known, visible),
            past_key_values=self.cache,
        )
        return self.language.logits(hidden).flatten(0, 1)
