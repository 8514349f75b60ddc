"""Language models behind one small interface; the only file that imports transformers' models.

Both kinds read projected queries in front of the prompt. A decoder-only model goes on with the
response in the same row; an encoder-decoder reads [queries; prompt] in its encoder and the
response in its decoder. Rows are compact: real tokens without a hole, so that positions are the
same whatever the padding; most decoders read a batch as one row without any. The head runs at
labelled positions only.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from instructblip.batch import Batch
from instructblip.model.beams import BeamTree
from instructblip.model.candidates import Forest, Layout
from instructblip.model.candidates import Normalization as Normalization
from instructblip.model.head import token_losses
from instructblip.model.packing import ATTENTION, PACKED_TYPES, Packing, allow_packing, packs
from instructblip.model.ranking import Prefix
from instructblip.model.rows import compact, pad_left
from instructblip.parts import part

# The prompt is given as embeddings, in the official code as well: what it repeats is the answer.
warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")

SEQ2SEQ_TYPES = ("t5", "mt5")

OnTokens = Callable[[list[int]], None]
"""Is told the newest token of every row; after its end token a row gets padding."""


@dataclass(frozen=True)
class Joined:
    """What the language model reads for one training batch, and where it is held to account.

    ``inputs_embeds`` [B, X, L] with ``attention_mask`` [B, X] (None: no padding), or [1, n, L] with
    ``packing``; ``decoder_ids`` [B, R] for an encoder-decoder, else None. ``places`` [m] are the
    positions, counted over all rows, whose output predicts ``targets`` [m]; ``rows`` [m] are their
    samples, in order.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    places: Tensor
    targets: Tensor
    decoder_ids: Tensor | None = None
    packing: Packing | None = None


def build_language_model(config: dict[str, Any]) -> Any:
    """A transformers language model with fresh weights from a text config as a dict.

    Raises ValueError for a model type that neither adapter can drive.
    """
    values = dict(config)
    kind = values.pop("model_type", None)
    if not kind:
        raise ValueError(f"the language config has no model_type; its keys are {sorted(config)}")
    text_config = AutoConfig.for_model(kind, **values)
    if "dense_act_fn" in values:  # T5's config derives it from another field and forgets this one
        text_config.dense_act_fn = values["dense_act_fn"]
    if kind in SEQ2SEQ_TYPES:
        return AutoModelForSeq2SeqLM.from_config(text_config)
    if getattr(text_config, "is_encoder_decoder", False):
        raise ValueError(
            f"encoder-decoder language models must be one of {SEQ2SEQ_TYPES}; got {kind!r}"
        )
    model = AutoModelForCausalLM.from_config(text_config)
    allow_packing(model)
    return model


def untie_head(model: Any) -> None:
    """Give the output head a weight of its own.

    transformers 5 ties T5's head to its input embedding whatever the config says; Flan-T5 has two
    different matrices, and loading both into one tensor would keep whichever came last.
    """
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)


def stacks_of(model: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Each module that owns transformer layers, with these layers: one stack, or T5's two."""
    found = []
    for stack in model.modules():
        for child in stack.children():
            if isinstance(child, nn.ModuleList) and isinstance(
                next(iter(child), None), GradientCheckpointingLayer
            ):
                found.append((stack, list(child)))
    return found


def checkpoint_layers(model: Any) -> None:
    """Keep of each layer its input alone for the backward pass, and run the layer again there.

    transformers' own switch works in training mode only, and a frozen model stays in eval mode.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = functools.partial(_rerun, layer.forward)


def _rerun(forward: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **settings)
    return checkpoint(forward, *inputs, use_reentrant=False, **settings)


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
        """Rows [queries; prompt; response; padding] and the positions that predict the response."""
        ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
        mask = torch.cat([batch.prompt_mask, batch.response_mask], dim=1).bool()
        is_response = torch.zeros_like(mask)
        is_response[:, batch.prompt_ids.shape[1] :] = batch.response_mask.bool()
        ids, is_response, mask = compact(mask, ids, is_response)
        embeds, attention_mask = _behind_queries(self.model, queries, ids, mask)
        rows, columns = is_response.nonzero(as_tuple=True)
        targets = ids[rows, columns]
        # Token j of a row sits behind K queries and is predicted one position earlier.
        columns = columns + queries.shape[1] - 1
        if not packs(self.model):
            return Joined(embeds, attention_mask, rows, rows * embeds.shape[1] + columns, targets)
        packing = Packing.of(attention_mask.bool())
        packed = embeds.flatten(0, 1).index_select(0, packing.slots)[None]
        return Joined(packed, None, rows, packing.index[rows, columns], targets, packing=packing)

    def loss(self, joined: Joined) -> Float[Tensor, " n"]:
        """Cross-entropy in nats of each response token, computed in fp32."""
        packing = joined.packing
        hidden = self.model.base_model(
            inputs_embeds=joined.inputs_embeds,
            use_cache=False,
            **(packing.arguments() if packing else {"attention_mask": joined.attention_mask}),
        ).last_hidden_state
        return _token_losses(self.model, hidden, joined)

    def generate(
        self,
        queries: Float[Tensor, "B K L"],
        batch: Batch,
        on_tokens: OnTokens | None = None,
        **decoding: Any,
    ) -> list[list[int]]:
        """Ids of each response, its end token cut off. Prompts are padded on the left."""
        embeds, mask = pad_left(*_prefix(self.model, queries, batch))
        beams = decoding.get("num_beams", 1)
        model = BeamTree(self, beams).model() if beams > 1 and self._packs else self.model
        return _generate(model, on_tokens, decoding, inputs_embeds=embeds, attention_mask=mask)

    def run(self, position_ids: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states of a call that fills a cache."""
        own = self._positions(position_ids)
        return self.model.base_model(use_cache=True, **inputs, **own).last_hidden_state

    def prefill(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Prefix:
        """Run [queries; prompt] once; padded on the left, so that all rows end together."""
        embeds, mask = pad_left(*_prefix(self.model, queries, batch))
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
        embeds = self.model.get_input_embeddings()(layout.ids)
        hidden = self.model.base_model(
            inputs_embeds=embeds,
            attention_mask=(
                self.tree_mask(known, layout.visible)
                if self._packs
                else torch.cat([known, layout.real.to(known.dtype)], dim=1)
            ),
            past_key_values=_expanded(prefix.cache, layout.sample),
            use_cache=True,
            **self._positions(positions),
        ).last_hidden_state
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
        """Encoder rows [queries; prompt; padding], decoder rows [start; response but its end]."""
        embeds, attention_mask = _prefix(self.model, queries, batch)
        rows, columns = batch.response_mask.nonzero(as_tuple=True)
        return Joined(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            rows=rows,
            places=rows * batch.response_ids.shape[1] + columns,
            targets=batch.response_ids[rows, columns],
            decoder_ids=self._shift(batch.response_ids),
        )

    def loss(self, joined: Joined) -> Float[Tensor, " n"]:
        """Cross-entropy in nats of each response token, computed in fp32."""
        assert joined.decoder_ids is not None
        states = self._encode(joined.inputs_embeds, joined.attention_mask)
        hidden = self._decode(joined.decoder_ids, states, joined.attention_mask)
        return _token_losses(self.model, self._scaled(hidden), joined)

    def generate(
        self,
        queries: Float[Tensor, "B K L"],
        batch: Batch,
        on_tokens: OnTokens | None = None,
        **decoding: Any,
    ) -> list[list[int]]:
        """Ids of each response, its end token cut off. Prompts are padded on the right, as in
        training: T5's relative positions would move with padding on the left."""
        embeds, mask = _prefix(self.model, queries, batch)
        states = BaseModelOutput(last_hidden_state=self._encode(embeds, mask))
        return _generate(
            self.model, on_tokens, decoding, encoder_outputs=states, attention_mask=mask
        )

    def prefill(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Prefix:
        """Run the encoder and the decoder's start token once: the decoder then has the keys and
        values of the whole [queries; prompt]."""
        embeds, mask = _prefix(self.model, queries, batch)
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
                encoder_hidden_states=_of_samples(prefix.states, layout.sample),
                encoder_attention_mask=prefix.mask[layout.sample],
                past_key_values=_expanded(prefix.cache, layout.sample),
                use_cache=True,
            )
        ).last_hidden_state
        return self._logits(hidden.flatten(0, 1)[layout.place])

    def _encode(self, embeds: Tensor, mask: Tensor | None) -> Tensor:
        encoder = self.model.get_encoder()
        return encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state

    def _decode(self, ids: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        return self.model.get_decoder()(
            input_ids=ids,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state

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


Language = CausalLanguage | Seq2SeqLanguage


def language_of(model: Any) -> Language:
    """The adapter for a transformers language model; it holds no state of its own."""
    return (Seq2SeqLanguage if model.config.is_encoder_decoder else CausalLanguage)(model)


def _token_losses(model: Any, hidden: Tensor, joined: Joined) -> Tensor:
    states = hidden.flatten(0, 1).index_select(0, joined.places)
    with part("head"):
        return token_losses(model.get_output_embeddings(), states, joined.targets)


def _behind_queries(
    model: Any, queries: Tensor, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """[queries; tokens] as embeddings [B, K+X, L] in the model's precision, and their mask."""
    tokens = model.get_input_embeddings()(ids)
    ones = torch.ones(queries.shape[:2], dtype=torch.long, device=ids.device)
    embeds = torch.cat([queries.to(tokens.dtype), tokens], dim=1)
    return embeds, torch.cat([ones, mask.long()], dim=1)


def _prefix(model: Any, queries: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """[queries; prompt], padded on the right."""
    ids, mask = compact(batch.prompt_mask.bool(), batch.prompt_ids)
    return _behind_queries(model, queries, ids, mask)


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


def _generate(
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


def _of_samples(values: Tensor, sample: Int[Tensor, " r"]) -> Tensor:
    """``values[sample]``; without a copy where all rows are of one sample."""
    if len(sample) > 1 and bool((sample == sample[0]).all()):
        return values[sample[:1]].expand(len(sample), *values.shape[1:])
    return values[sample]


def _expanded(cache: Any, sample: Int[Tensor, " r"]) -> Any:
    """A cache with row ``sample[i]`` of ``cache`` as its row i; ``cache`` itself stays as it is."""
    if isinstance(cache, EncoderDecoderCache):
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        return EncoderDecoderCache(_expanded(own, sample), _expanded(cross, sample))
    expanded = copy.copy(cache)
    expanded.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in expanded.layers:
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            layer.keys = _of_samples(layer.keys, sample)
            layer.values = _of_samples(layer.values, sample)
        else:  # a state of another kind
            layer.batch_select_indices(sample)
    return expanded
