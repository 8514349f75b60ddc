"""Encoder-decoder language models: queries and prompt in the encoder, response in the decoder."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from instructblip.core.batch import Batch, send
from instructblip.core.regions import part
from instructblip.model.language.fast.attention import packs
from instructblip.model.language.fast.head import token_losses
from instructblip.model.language.fast.packing import Packing
from instructblip.model.language.generate import OnTokens, generate
from instructblip.model.language.inputs import Joined, compact, embed_prefix
from instructblip.model.language.ranking import Layout, Prefix, select_cache, select_samples

SEQ2SEQ_TYPES = ("t5", "mt5")


class Seq2SeqLanguage:
    """An encoder-decoder: [queries; prompt] in the encoder, the response in the decoder."""

    reads_trees = False
    """T5's positions are distances between columns, so each leaf of a prefix tree needs a row."""

    def __init__(self, model: Any) -> None:
        self.model = model
        start = model.config.decoder_start_token_id
        self._start: int = model.config.pad_token_id if start is None else start

    def join(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Joined:
        """Encoder rows [queries; prompt], and decoder rows that predict the response; or one row
        without padding for each of the two stacks (`fast.packing`).

        With K = 2 queries, the prompt 5 6 and the response 7 8 e, where e is the end token::

            encoder   q  q  5  6
            decoder   start  7  8       target   7  8  e
        """
        host, device = batch.host, queries.device
        embeds, attention_mask = embed_prefix(self.model, queries, batch)  # [B, K+T, L]
        ids, mask = compact(host.response_mask.bool(), host.response_ids)  # [B, R]
        decoder_ids = torch.cat([torch.full_like(ids[:, :1], self._start), ids[:, :-1]], dim=1)
        rows, columns = mask.nonzero(as_tuple=True)  # [m]
        places = send(rows * ids.shape[1] + columns, device)
        rows, targets = send(rows, device), send(ids[rows, columns], device)
        if not packs(self.model):
            attention_mask, decoder_ids = (send(x, device) for x in (attention_mask, decoder_ids))
            return Joined(embeds, attention_mask, rows, places, targets, decoder_ids)
        decoder_packing = Packing.of(mask)
        decoder_ids = send(decoder_packing.pack(decoder_ids), device)  # [1, m]
        packing = Packing.of(attention_mask.bool()).to(device)
        return Joined(
            inputs_embeds=packing.pack(embeds),  # [1, n, L]
            attention_mask=None,
            rows=rows,
            places=torch.arange(len(rows), device=rows.device),  # every token has a label
            targets=targets,
            decoder_ids=decoder_ids,
            packing=packing,
            decoder_packing=decoder_packing.to(device),
        )

    def loss(self, joined: Joined) -> Float[Tensor, " m"]:
        """Cross-entropy in nats of each response token, computed in fp32."""
        encoder: dict[str, Any] = {"attention_mask": joined.attention_mask}
        decoder: dict[str, Any] = {"encoder_attention_mask": joined.attention_mask}
        if joined.packing is not None and joined.decoder_packing is not None:
            encoder = joined.packing.arguments()
            decoder = joined.decoder_packing.arguments() | {
                "encoder_attention_mask": encoder["attention_mask"],
                "memory": joined.packing,
            }
        encoded = self.model.get_encoder()(inputs_embeds=joined.inputs_embeds, **encoder)
        hidden = self.model.get_decoder()(
            input_ids=joined.decoder_ids,
            encoder_hidden_states=encoded.last_hidden_state,  # [B, K+T, L]
            use_cache=False,
            **decoder,
        ).last_hidden_state  # [B, R, L]
        states = joined.labelled(self._scaled(hidden))
        with part("head"):
            return token_losses(self.model.get_output_embeddings(), states, joined.targets)

    def generate(
        self,
        queries: Float[Tensor, "B K L"],
        batch: Batch,
        on_tokens: OnTokens | None = None,
        **decoding: Any,
    ) -> list[list[int]]:
        """Token ids of each response, without its end token. Prompts are padded on the right, as in
        training: padding on the left would shift T5's relative positions."""
        embeds, mask = embed_prefix(self.model, queries, batch)
        states = BaseModelOutput(last_hidden_state=self._encode(embeds, mask))
        mask = send(mask, embeds.device)
        return generate(
            self.model, on_tokens, decoding, encoder_outputs=states, attention_mask=mask
        )

    def prefill(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Prefix:
        """Run the encoder, and the decoder's start token: its cache then holds the keys and values
        of [queries; prompt] as well."""
        embeds, mask = embed_prefix(self.model, queries, batch)
        states = self._encode(embeds, mask)
        mask = send(mask, embeds.device)
        output = self.model.get_decoder()(
            input_ids=torch.full_like(mask[:, :1], self._start),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=True,
        )
        logits = self._logits(output.last_hidden_state[:, -1])
        return Prefix(logits, output.past_key_values, mask, states)

    def node_logits(self, prefix: Prefix, layout: Layout) -> Float[Tensor, "n W"]:
        """Logits at every node of the layout; the keys and values of the prefix are reused."""
        assert prefix.states is not None
        hidden = self.model.get_decoder()(
            input_ids=layout.ids,
            encoder_hidden_states=select_samples(prefix.states, layout),
            encoder_attention_mask=prefix.mask[layout.sample],
            past_key_values=select_cache(prefix.cache, layout),
            use_cache=True,
        ).last_hidden_state
        return self._logits(hidden.flatten(0, 1)[layout.place])

    def _encode(
        self, embeds: Float[Tensor, "B X L"], mask: Int[Tensor, "B X"]
    ) -> Float[Tensor, "B X L"]:
        """States of the encoder, padded on the right as ``embeds`` are; any states at padding."""
        encoder = self.model.get_encoder()
        if not packs(self.model):
            mask = send(mask, embeds.device)
            return encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        packing = Packing.of(mask.bool()).to(embeds.device)
        states = encoder(inputs_embeds=packing.pack(embeds), **packing.arguments())
        return states.last_hidden_state[0][packing.index]

    def _logits(self, hidden: Float[Tensor, "r L"]) -> Float[Tensor, "r W"]:
        return self.model.get_output_embeddings()(self._scaled(hidden)).float()

    def _scaled(self, hidden: Tensor) -> Tensor:
        """The first T5 scales before its head; T5 1.1 (Flan-T5) and mT5 do not."""
        config = self.model.config
        scales = getattr(config, "scale_decoder_outputs", False)
        return hidden * config.d_model**-0.5 if scales else hidden
