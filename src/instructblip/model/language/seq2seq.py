"""Encoder-decoder language models: queries and prompt go into the encoder."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from instructblip.core.batch import Batch
from instructblip.model.language.candidates import Forest, Layout
from instructblip.model.language.fast.packing import Packing, packs
from instructblip.model.language.generate import OnTokens, generate
from instructblip.model.language.joined import (
    Joined,
    prefix_of,
    response_losses,
)
from instructblip.model.language.ranking import (
    Prefix,
    expanded,
    of_samples,
)
from instructblip.model.language.rows import compact

SEQ2SEQ_TYPES = ("t5", "mt5")


class Seq2SeqLanguage:
    """An encoder-decoder: [queries; prompt] in the encoder, the response in the decoder."""

    def __init__(self, model: Any) -> None:
        self.model = model
        if model.config.model_type not in SEQ2SEQ_TYPES:
            raise ValueError(
                f"encoder-decoder language models must be one of {SEQ2SEQ_TYPES}; "
                f"got {model.config.model_type!r}"
            )

    def join(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Joined:
        """Encoder rows [queries; prompt; padding], decoder rows [start; response but its end]; both
        as one row without padding where the attention allows."""
        embeds, attention_mask = prefix_of(self.model, queries, batch)
        ids, mask = compact(batch.response_mask.bool(), batch.response_ids)
        decoder_ids = self._shift(ids)
        rows, columns = mask.nonzero(as_tuple=True)
        targets = ids[rows, columns]
        if not packs(self.model):
            places = rows * ids.shape[1] + columns
            return Joined(embeds, attention_mask, rows, places, targets, decoder_ids)
        packing, decoder_packing = Packing.of(attention_mask.bool()), Packing.of(mask)
        return Joined(
            inputs_embeds=packing.pack(embeds),
            attention_mask=None,
            rows=rows,
            places=torch.arange(len(rows), device=rows.device),
            targets=targets,
            decoder_ids=decoder_packing.pack(decoder_ids),
            packing=packing,
            decoder_packing=decoder_packing,
        )

    def loss(self, joined: Joined) -> Float[Tensor, " n"]:
        """Cross-entropy in nats of each response token, computed in fp32."""
        mask = joined.attention_mask
        reads: dict[str, Any] = {"attention_mask": mask}
        says: dict[str, Any] = {"encoder_attention_mask": mask}
        if joined.packing is not None and joined.decoder_packing is not None:
            reads, says = joined.packing.arguments(), joined.decoder_packing.arguments()
            says |= {"encoder_attention_mask": reads["attention_mask"], "memory": joined.packing}
        encoded = self.model.get_encoder()(inputs_embeds=joined.inputs_embeds, **reads)
        hidden = self.model.get_decoder()(
            input_ids=joined.decoder_ids,
            encoder_hidden_states=encoded.last_hidden_state,
            use_cache=False,
            **says,
        ).last_hidden_state
        states = self._scaled(hidden).flatten(0, 1).index_select(0, joined.places)
        return response_losses(self.model, states, joined.targets)

    def generate(
        self,
        queries: Float[Tensor, "B K L"],
        batch: Batch,
        on_tokens: OnTokens | None = None,
        **decoding: Any,
    ) -> list[list[int]]:
        """Ids of each response, its end token cut off. Prompts are padded on the right, as in
        training: T5's relative positions would move with padding on the left."""
        embeds, mask = prefix_of(self.model, queries, batch)
        states = BaseModelOutput(last_hidden_state=self._encode(embeds, mask))
        return generate(
            self.model, on_tokens, decoding, encoder_outputs=states, attention_mask=mask
        )

    def prefill(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Prefix:
        """Run the encoder and the decoder's start token once: the decoder then has the keys and
        values of the whole [queries; prompt]."""
        embeds, mask = prefix_of(self.model, queries, batch)
        states = self._encode(embeds, mask)
        output = self.model.get_decoder()(
            input_ids=torch.full_like(mask[:, :1], self._start),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=True,
        )
        first = self._logits(output.last_hidden_state[:, -1])
        return Prefix(first, output.past_key_values, mask, states)

    def layout(self, forest: Forest, device: torch.device) -> Layout:
        """T5's positions are distances between columns: every leaf has a row of its own."""
        return forest.rows(device)

    def proceed(self, prefix: Prefix, layout: Layout) -> Float[Tensor, "n W"]:
        """Logits at every node of the layout; cross-attention reads the stored keys and values."""
        assert prefix.states is not None
        hidden = (
            self.model.get_decoder()(
                input_ids=layout.ids,
                encoder_hidden_states=of_samples(prefix.states, layout.sample),
                encoder_attention_mask=prefix.mask[layout.sample],
                past_key_values=expanded(prefix.cache, layout.sample),
                use_cache=True,
            )
        ).last_hidden_state
        return self._logits(hidden.flatten(0, 1)[layout.place])

    def _encode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """[B, X, L], padded on the right as ``embeds`` are; at padding stands any state."""
        encoder = self.model.get_encoder()
        if not packs(self.model):
            return encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        packing = Packing.of(mask.bool())
        states = encoder(inputs_embeds=packing.pack(embeds), **packing.arguments())
        return states.last_hidden_state[0][packing.index]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(self._scaled(hidden)).float()

    def _scaled(self, hidden: Tensor) -> Tensor:
        """The first T5 scales before its head, T5 1.1 (Flan-T5) and mT5 do not."""
        config = self.model.config
        scales = getattr(config, "scale_decoder_outputs", False)
        return hidden * config.d_model**-0.5 if scales else hidden

    @property
    def _start(self) -> int:
        config = self.model.config
        start = config.decoder_start_token_id
        return config.pad_token_id if start is None else start

    def _shift(self, ids: Tensor) -> Tensor:
        return torch.cat([torch.full_like(ids[:, :1], self._start), ids[:, :-1]], dim=1)
