"""Decoder-only language models: queries, prompt and response in one row."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.model.language.beams import BeamTree
from instructblip.model.language.candidates import Forest, Layout
from instructblip.model.language.fast.llama import reads_last
from instructblip.model.language.fast.packing import (
    ATTENTION,
    PACKED_TYPES,
    Packing,
    packs,
)
from instructblip.model.language.generate import OnTokens, generate
from instructblip.model.language.joined import (
    Joined,
    behind_queries,
    prefix_of,
    response_losses,
)
from instructblip.model.language.ranking import Prefix, expanded
from instructblip.model.language.rows import compact, pad_left


class CausalLanguage:
    """A decoder-only language model: [queries; prompt; response] in one row."""

    def __init__(self, model: Any) -> None:
        self.model = model
        for name, neutral in (
            ("final_logit_softcapping", None),
            ("logit_scale", None),
            ("logits_scaling", 1),
        ):
            if getattr(model.config, name, neutral) not in (None, neutral):
                raise ValueError(
                    f"language models that change their logits after the head ({name}) are not "
                    f"supported; got {model.config.model_type!r}"
                )

    def join(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Joined:
        """Rows [queries; prompt; response but for its last token; padding] and the positions that
        predict the response."""
        ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
        mask = torch.cat([batch.prompt_mask, batch.response_mask], dim=1).bool()
        is_response = torch.zeros_like(mask)
        is_response[:, batch.prompt_ids.shape[1] :] = batch.response_mask.bool()
        ids, is_response, mask = compact(mask, ids, is_response)
        rows, columns = is_response.nonzero(as_tuple=True)
        targets = ids[rows, columns]
        # Nothing is predicted from the last token of a row, and no other token sees it.
        embeds, attention_mask = behind_queries(self.model, queries, ids[:, :-1], mask[:, 1:])
        # Token j of a row sits behind K queries and is predicted one position earlier.
        columns = columns + queries.shape[1] - 1
        if not packs(self.model):
            return Joined(embeds, attention_mask, rows, rows * embeds.shape[1] + columns, targets)
        packing = Packing.of(attention_mask.bool())
        places = packing.index[rows, columns]
        if reads_last(self.model):
            packing = replace(packing, read=places)
        return Joined(packing.pack(embeds), None, rows, places, targets, packing=packing)

    def loss(self, joined: Joined) -> Float[Tensor, " n"]:
        """Cross-entropy in nats of each response token, computed in fp32."""
        packing = joined.packing
        hidden = self.model.base_model(
            inputs_embeds=joined.inputs_embeds,
            use_cache=False,
            **(packing.arguments() if packing else {"attention_mask": joined.attention_mask}),
        ).last_hidden_state
        states = hidden.flatten(0, 1)
        if packing is None or packing.read is None:
            states = states.index_select(0, joined.places)
        return response_losses(self.model, states, joined.targets)

    def generate(
        self,
        queries: Float[Tensor, "B K L"],
        batch: Batch,
        on_tokens: OnTokens | None = None,
        **decoding: Any,
    ) -> list[list[int]]:
        """Ids of each response, its end token cut off. Prompts are padded on the left."""
        embeds, mask = pad_left(*prefix_of(self.model, queries, batch))
        beams = decoding.get("num_beams", 1)
        model = BeamTree(self, beams).model() if beams > 1 and self._packs else self.model
        return generate(model, on_tokens, decoding, inputs_embeds=embeds, attention_mask=mask)

    def run(self, position_ids: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states of a call that fills a cache."""
        own = self._positions(position_ids)
        return self.model.base_model(use_cache=True, **inputs, **own).last_hidden_state

    def prefill(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Prefix:
        """Run [queries; prompt] once; padded on the left, so that all rows end together."""
        embeds, mask = pad_left(*prefix_of(self.model, queries, batch))
        output = self.model.base_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            use_cache=True,
            **self._positions((mask.cumsum(1) - 1).clamp(min=0)),
        )
        first = self.logits(output.last_hidden_state[:, -1])
        return Prefix(first, output.past_key_values, mask)

    def layout(self, forest: Forest, device: torch.device) -> Layout:
        """How this model reads a forest: packed where it can."""
        return forest.packed(device) if self._packs else forest.rows(device)

    def proceed(self, prefix: Prefix, layout: Layout) -> Float[Tensor, "n W"]:
        """Logits at every node of the layout, the prefix's keys and values taken as they are."""
        known = prefix.mask[layout.sample]
        positions = known.sum(1, keepdim=True) + layout.depth
        if self._packs:
            mask = self.tree_mask(known, layout.visible)
        else:  # plain rows
            mask = torch.cat([known, layout.real.to(known.dtype)], dim=1)
        hidden = self.run(
            positions,
            inputs_embeds=self.model.get_input_embeddings()(layout.ids),
            attention_mask=mask,
            past_key_values=expanded(prefix.cache, layout.sample),
        )
        return self.logits(hidden.flatten(0, 1)[layout.place])

    @property
    def _packs(self) -> bool:
        config = self.model.config
        return config.model_type in PACKED_TYPES and config._attn_implementation in (
            ATTENTION,
            "sdpa",
            "eager",
        )

    def tree_mask(self, known: Int[Tensor, "r X"], visible: Bool[Tensor, "r w w2"]) -> Tensor:
        """[r, 1, w, X+w2]: w tokens that see what is ``known``, and each other by ``visible``."""
        before = known.bool()[:, None].expand(-1, visible.shape[1], -1)
        mask = torch.cat([before, visible], dim=2)[:, None]
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head says, in fp32."""
        return self.model.get_output_embeddings()(hidden).float()

    def _positions(self, position_ids: Tensor) -> dict[str, Tensor]:
        """Explicit positions where the model takes them; ALiBi models count the mask themselves."""
        accepted = inspect.signature(self.model.base_model.forward).parameters
        return {"position_ids": position_ids} if "position_ids" in accepted else {}
