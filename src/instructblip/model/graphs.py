"""The three parts as plain functions of tensors, one image and one instruction at a time.

They are what `release/onnx.py` writes as ONNX, in the plain definitions and not their faster twins.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache

from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import text_config
from instructblip.model.qformer import QFormer

Pair = tuple[Tensor, Tensor]


class ImagePart(nn.Module):
    """pixel_values [1, 3, S, S] -> features [1, P, V] before the last LayerNorm."""

    def __init__(self, model: InstructBlip) -> None:
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision_model.body(pixel_values)


class QueriesPart(nn.Module):
    """features [1, P, V], and for an InstructBLIP qformer_ids [1, I] -> queries [1, Q, L]."""

    def __init__(self, model: InstructBlip) -> None:
        super().__init__()
        self.post_layernorm = model.vision_model.post_layernorm
        self.query_tokens = model.query_tokens
        self.qformer = model.qformer
        self.language_projection = model.language_projection

    def forward(self, features: Tensor, qformer_ids: Tensor | None = None) -> Tensor:
        features = self.post_layernorm(features)
        inputs = (self.query_tokens, features, qformer_ids, None)
        queries, _ = QFormer.hidden_states(self.qformer, *inputs, keep_text=False)
        return self.language_projection(queries)


class LanguagePart(nn.Module):
    """queries [1, K, L], ids [1, T] and the keys and values [1, H, X, d] of each layer -> logits
    [1, W] behind the last token, and keys and values [1, H, X+K+T, d]. K and X may be 0."""

    def __init__(self, model: InstructBlip) -> None:
        super().__init__()
        self.language: Any = model.language  # a causal one
        self.model = self.language.model
        self.model.set_attn_implementation("sdpa")

    def forward(
        self, queries: Tensor, ids: Tensor, past: Sequence[Pair]
    ) -> tuple[Tensor, list[Pair]]:
        embeds = torch.cat([queries, self.model.get_input_embeddings()(ids)], 1)  # [1, K+T, L]
        columns = torch.arange(past[0][0].shape[2] + embeds.shape[1])
        positions = columns[past[0][0].shape[2] :]
        output = self.language.run(
            positions[None],
            inputs_embeds=embeds,
            attention_mask=(columns <= positions[:, None])[None, None],
            past_key_values=DynamicCache([tuple(pair) for pair in past]),
        )
        cache = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return self.language.logits(output.last_hidden_state[:, -1]), cache


@torch.no_grad()
def parts_with_inputs(
    model: InstructBlip,
) -> dict[str, tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    """Each part by name, with inputs to trace it with and which of their sizes may change.

    Raises ValueError for a language model that no graph describes: an encoder-decoder, sliding
    windows, layers without keys and values.
    """
    check_language(model.config.language)
    size, any_size = model.config.vision.image_size, Dim.DYNAMIC
    pixels = torch.zeros(1, 3, size, size)
    image = ImagePart(model)
    features = image(pixels)
    reads: dict[str, Any] = {"features": features}
    sizes: dict[str, Any] = {"features": {}}
    if model.config.instruction_aware:
        reads["qformer_ids"] = torch.ones(1, 5, dtype=torch.long)
        sizes["qformer_ids"] = {1: any_size}
    querying = QueriesPart(model)
    queries = querying(**reads)
    language = LanguagePart(model)
    ids = torch.ones(1, 3, dtype=torch.long)
    embeds = torch.cat([queries, language.model.get_input_embeddings()(ids)], 1)
    cache = language.language.run(
        torch.arange(embeds.shape[1])[None], inputs_embeds=embeds
    ).past_key_values
    layers = getattr(cache, "layers", [])
    if not layers or not all(isinstance(getattr(one, "keys", None), Tensor) for one in layers):
        raise ValueError("the language model keeps other states than keys and values: no ONNX yet")
    given = {"queries": queries, "ids": ids, "past": [(x.keys, x.values) for x in layers]}
    changing = {
        "queries": {1: any_size},
        "ids": {1: any_size},
        "past": [({2: any_size}, {2: any_size}) for _ in layers],
    }
    return {
        "image": (image, {"pixel_values": pixels}, {"pixel_values": {}}),
        "queries": (querying, reads, sizes),
        "language": (language, given, changing),
    }


def check_language(config: dict[str, Any]) -> None:
    """Raise ValueError for a language model, by its config as a dict, that is not exported yet."""
    made = text_config(config)
    kind = made.model_type
    if made.is_encoder_decoder:
        raise ValueError(
            f"a language model of type {kind!r}, an encoder-decoder such as T5, is not exported to "
            "ONNX yet; expected a decoder such as Llama, Qwen or OPT"
        )
    kinds = set(getattr(made, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(made, "sliding_window", None)):
        raise ValueError(
            f"a language model of type {kind!r} whose layers read a sliding window is not exported "
            "to ONNX yet; expected one whose layers read all tokens"
        )
