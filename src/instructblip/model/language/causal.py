"""Decoder-only language models: queries, prompt and response in one row."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from instructblip.core.batch import Batch, send
from instructblip.core.regions import part
from instructblip.model.language.beams import BeamTree
from instructblip.model.language.fast.attention import ATTENTION, packs
from instructblip.model.language.fast.head import token_losses
from instructblip.model.language.fast.packing import Packing
from instructblip.model.language.fast.probe import abilities_of
from instructblip.model.language.generate import OnTokens, generate
from instructblip.model.language.inputs import (
    Joined,
    compact,
    embed_prefix,
    insert_queries,
    pad_left,
    query_mask,
)
from instructblip.model.language.ranking import Layout, Prefix, select_cache


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
        """Rows [queries; prompt; response], or the same tokens as one row without padding
        (`fast.packing`), and the positions that predict the response.

        With K = 2 queries, the prompt 5 6 and the response 7 8 e, where e is the end token::

            input     q  q  5  6  7  8       e predicts nothing and is not read
            target             7  8  e       places 3, 4, 5
        """
        host, device = batch.host, queries.device
        ids = torch.cat([host.prompt_ids, host.response_ids], dim=1)  # [B, T+R]
        mask = torch.cat([host.prompt_mask, host.response_mask], dim=1).bool()
        is_response = torch.zeros_like(mask)
        is_response[:, host.prompt_ids.shape[1] :] = host.response_mask.bool()
        ids, is_response, mask = compact(mask, ids, is_response)
        rows, columns = is_response.nonzero(as_tuple=True)  # [m]
        targets = ids[rows, columns]
        # mask[:, 1:] has one real position less per row: the last token of each row is left out.
        read = query_mask(queries, batch)
        embeds, attention_mask = insert_queries(
            self.model, queries, read, ids[:, :-1], mask[:, 1:], host.image_places
        )
        # Token j of a row stands behind its queries and is predicted one position earlier.
        places = rows * embeds.shape[1] + columns + read.sum(1)[rows] - 1
        packing = None
        if packs(self.model):
            packing = Packing.of(attention_mask.bool())
            places = packing.index.flatten()[places]
            if abilities_of(self.model).fused:
                packing = replace(packing, read=places)
            packing = packing.to(device)
        rows, places, targets = (send(x, device) for x in (rows, places, targets))
        if packing is None:
            return Joined(embeds, send(attention_mask, device), rows, places, targets)
        return Joined(packing.pack(embeds), None, rows, places, targets, packing=packing)

    def loss(self, joined: Joined) -> Float[Tensor, " m"]:
        """Cross-entropy in nats of each response token, computed in fp32."""
        packing = joined.packing
        arguments = packing.arguments() if packing else {"attention_mask": joined.attention_mask}
        hidden = self.model.base_model(
            inputs_embeds=joined.inputs_embeds, use_cache=False, **arguments
        ).last_hidden_state  # [B, X, L]
        with part("head"):
            head = self.model.get_output_embeddings()
            return token_losses(head, joined.labelled(hidden), joined.targets)

    def generate(
        self,
        queries: Float[Tensor, "B K L"],
        batch: Batch,
        on_tokens: OnTokens | None = None,
        **decoding: Any,
    ) -> list[list[int]]:
        """Token ids of each response, without its end token. Prompts are padded on the left."""
        embeds, mask = pad_left(*embed_prefix(self.model, queries, batch))
        mask = send(mask, embeds.device)
        beams = decoding.get("num_beams", 1)
        shares = beams > 1 and self.reads_trees
        model = BeamTree(self, beams).model() if shares else self.model
        return generate(model, on_tokens, decoding, inputs_embeds=embeds, attention_mask=mask)

    def prefill(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Prefix:
        """Run [queries; prompt] once, padded on the left, so that all rows end together."""
        embeds, mask = pad_left(*embed_prefix(self.model, queries, batch))
        mask = send(mask, embeds.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self.run(positions, inputs_embeds=embeds, attention_mask=mask)
        return Prefix(self.logits(output.last_hidden_state[:, -1]), output.past_key_values, mask)

    def node_logits(self, prefix: Prefix, layout: Layout) -> Float[Tensor, "n W"]:
        """Logits at every node of the layout; the keys and values of the prefix are reused."""
        prefix_mask = prefix.mask[layout.sample]  # [r, X]
        if layout.visible is None:
            mask = torch.cat([prefix_mask, layout.real.to(prefix_mask.dtype)], dim=1)
        else:
            mask = self.tree_mask(prefix_mask, layout.visible)
        output = self.run(
            prefix_mask.sum(1, keepdim=True) + layout.depth,
            inputs_embeds=self.model.get_input_embeddings()(layout.ids),
            attention_mask=mask,
            past_key_values=select_cache(prefix.cache, layout),
        )
        return self.logits(output.last_hidden_state.flatten(0, 1)[layout.place])

    def run(self, position_ids: Int[Tensor, "r w"], **inputs: Any) -> Any:
        """The output of the model without its head, with a cache; ALiBi models derive positions
        from the mask and are not given any."""
        accepted = inspect.signature(self.model.base_model.forward).parameters
        if "position_ids" in accepted:
            inputs["position_ids"] = position_ids
        return self.model.base_model(use_cache=True, **inputs)

    def logits(self, hidden: Float[Tensor, "*rows L"]) -> Float[Tensor, "*rows W"]:
        """Logits of all tokens of the vocabulary, in fp32."""
        return self.model.get_output_embeddings()(hidden).float()

    def tree_mask(self, prefix_mask: Int[Tensor, "r X"], visible: Bool[Tensor, "r w v"]) -> Tensor:
        """[r, 1, w, X+v]: w tokens that see the prefix, and behind it what ``visible`` states."""
        prefix = prefix_mask.bool()[:, None].expand(-1, visible.shape[1], -1)
        mask = torch.cat([prefix, visible], dim=2)[:, None]
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype  # eager attention adds its mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    @property
    def reads_trees(self) -> bool:
        """Whether the model accepts any positions and any mask, and so a prefix tree as one row."""
        implementation = self.model.config._attn_implementation
        known = implementation in (ATTENTION, "sdpa", "eager")
        return known and abilities_of(self.model).trees
