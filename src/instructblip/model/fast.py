"""Faster twins of plain definitions: same parameters, same results, compared in a test.

``encode_frozen`` is ``VisionModel.body``, ``PackedQFormer`` is ``QFormer``, ``cross_attend`` is the
``MultiHeadAttention`` of queries over images, and ``fold_norm`` prepares ``VisionModel.norm`` for
the Q-Former. Times are those of a step of cpu-mid (benchmarks/train_step_cpu_2026-11-23.md).
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from instructblip.core.batch import send
from instructblip.model.compiled import compiled
from instructblip.model.config import EncoderConfig
from instructblip.model.qformer import MultiHeadAttention, QFormer, QFormerLayer, attention_mask
from instructblip.model.vision import ImageEncoder, VisionLayer, VisionMLP, VisionModel

READERS = re.compile(r"crossattention\.attention\.(key|value)\.weight$")
"""The layers of a Q-Former that read the image features."""


MAPS_AT_ONCE = 4
"""Images of a convolutional encoder at a time. Its first maps are large: those of more images do
not stay in a CPU's cache (EfficientNet-Lite0, one thread: 64 at a time 5.0 images/s, 4 at a time
13.2), and on a GPU they only take memory."""


@torch.no_grad()
def encode_frozen(
    vision: ImageEncoder, pixel_values: Float[Tensor, "N 3 S S"], chunk: int
) -> Float[Tensor, "N P V"]:
    """``vision.body(pixel_values)`` without gradients, ``chunk`` images at a time.

    Without gradients nothing reads the input of a layer again, so sums and activations of a
    ``VisionModel`` overwrite it: 813 -> 797 ms.
    """
    if isinstance(vision, VisionModel):
        parts = [_encode(vision, images) for images in pixel_values.split(chunk)]
    else:
        maps = isinstance(vision.config, EncoderConfig) and vision.config.add_positions
        size = min(chunk, MAPS_AT_ONCE) if maps else chunk
        parts = [vision.body(images) for images in pixel_values.split(size)]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _encode(vision: VisionModel, pixel_values: Float[Tensor, "n 3 S S"]) -> Float[Tensor, "n P V"]:
    hidden = vision.embed(pixel_values)
    run = compiled(_encode_layer) if vision.compiled else _encode_layer
    for layer in vision.encoder.layers:
        assert isinstance(layer, VisionLayer)
        hidden = run(layer, hidden)
    return hidden


def _encode_layer(layer: VisionLayer, hidden: Float[Tensor, "n P V"]) -> Float[Tensor, "n P V"]:
    hidden.add_(layer.self_attn(layer.layer_norm1(hidden)))
    return hidden.add_(_feed_forward(layer.mlp, layer.layer_norm2(hidden)))


def _feed_forward(mlp: VisionMLP, hidden: Float[Tensor, "n P V"]) -> Float[Tensor, "n P V"]:
    """A separate function, so that the inner states are freed before the next layer."""
    inner = mlp.fc1(hidden)
    if mlp.activation is F.gelu:
        torch.ops.aten.gelu_(inner)
    else:
        inner = mlp.activation(inner)
    return mlp.fc2(inner)


def fold_norm(
    norm: nn.LayerNorm, qformer: nn.Module, features: Float[Tensor, "N P V"]
) -> tuple[Float[Tensor, "N P V"], dict[str, Tensor]]:
    """Features without scale and shift of the norm, and weights of ``qformer`` with both.

    The plain definition is ``qformer(..., norm(features), ...)``. With normalized features x, scale
    s and shift t, a layer behind the norm computes

        W (s x + t) + b  =  (W s) x + (W t + b)

    and the right side needs gradients of the small s and t only, not of the many features x: at
    most 43 ms.
    """
    weights = dict(qformer.named_parameters())
    folded = {}
    for name in filter(READERS.search, weights):
        bias = name.removesuffix("weight") + "bias"
        folded[name] = weights[name] * norm.weight
        folded[bias] = torch.addmv(weights[bias], weights[name], norm.bias)
    features = features.to(norm.weight.dtype)
    return F.layer_norm(features, norm.normalized_shape, eps=norm.eps), folded


def cross_attend(
    attention: MultiHeadAttention,
    hidden: Float[Tensor, "M Q D"],
    states: Float[Tensor, "N Y W"],
    index: Int[Tensor, " M"] | None = None,
) -> Float[Tensor, "M Q D"]:
    """``attention(hidden, states, None, index)``, in fewer products where that pays.

    The plain definition projects all Y tokens x of an image to keys and values. The same scores
    come from (K x) . q = x . (K' q): each head takes its queries to the width W of the image, and
    what they read there into the width of the head. With H heads, Q queries of width D, that is
    H Q Y W + Q D W multiplications for the scores instead of Y W D + Q Y D: 1008 -> 973 ms. It pays
    where queries are fewer than a head is wide (32 and 64 in the paper) and no rows share an image.
    In half precision fused kernels keep scores in fp32, and a product would round them. An adapter
    of keys or values is no part of their weights.
    """
    heads, count = attention.num_heads, hidden.shape[1]
    width = hidden.shape[2] // heads
    half = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype.itemsize < 4
    adapted = any("lora" in x._modules for x in (attention.key, attention.value))
    if index is not None or half or count >= width or adapted:
        return attention(hidden, states, None, index)
    key, value = (x.weight.unflatten(0, (heads, -1)) for x in (attention.key, attention.value))
    query = attention.query(hidden).unflatten(2, (heads, -1)) * width**-0.5
    query = query.permute(2, 0, 1, 3).flatten(1, 2)  # [heads, M*Q, D/heads]
    query = (query @ key).unflatten(1, (-1, count)).transpose(0, 1)  # [M, heads, Q, W]
    scores = query.flatten(1, 2) @ states.transpose(1, 2)  # [M, heads*Q, Y]
    weights = F.dropout(scores.softmax(-1), attention.dropout, attention.training)
    context = (weights @ states).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
    context = (context @ value.mT).unflatten(1, (-1, count))  # [heads, M, Q, D/heads]
    # The bias of the values counts as often as the weights sum up to: once, but for dropout. The
    # bias of the keys moves all scores of a query alike, which softmax ignores: its gradient is
    # zero, and 0 * sum makes it exist.
    total = weights.sum(2).unflatten(1, (heads, -1)).transpose(0, 1)[..., None]
    bias = attention.value.bias.view(heads, 1, 1, -1)
    context = context + total * bias + 0 * attention.key.bias.sum()
    return context.permute(1, 2, 0, 3).flatten(2)


@dataclass(frozen=True, slots=True)
class Rows:
    """Where n tokens stand in M rows [queries; text] of X slots, the text padded.

    ``index`` [M, X] names the token of each slot (padding: any), ``slots`` [n] the slot of each
    token. One query a row and texts of two words and one: index [[0, 2, 3], [1, 4, 0]], slots
    [0, 3, 1, 2, 4].
    """

    index: Int[Tensor, "M X"]
    slots: Int[Tensor, " n"]
    num_queries: int

    @classmethod
    def of(
        cls, embeds: Float[Tensor, "M X D"], num_queries: int, text_mask: Int[Tensor, "M I"] | None
    ) -> "Rows":
        """The layout of padded rows; without a mask none of their text is padding. It is computed
        where the mask is, and then sent to the device of ``embeds``."""
        count = embeds.shape[0] * embeds.shape[1]
        device = embeds.device if text_mask is None else text_mask.device
        places = torch.arange(count, device=device).unflatten(0, embeds.shape[:2])
        text = places[:, num_queries:]
        text = text.flatten() if text_mask is None else text[text_mask.bool()]
        slots = torch.cat([places[:, :num_queries].flatten(), text])
        index = torch.zeros_like(places).flatten()
        index[slots] = torch.arange(len(slots), device=device)
        index, slots = send(index.view_as(places), embeds.device), send(slots, embeds.device)
        return cls(index, slots, num_queries)

    def unpack(self, tokens: Float[Tensor, "n D"]) -> Float[Tensor, "M X D"]:
        return tokens.index_select(0, self.index.flatten()).unflatten(0, tuple(self.index.shape))

    def pack(self, rows: Float[Tensor, "M X D"]) -> Float[Tensor, "n D"]:
        return rows.flatten(0, 1).index_select(0, self.slots)


class PackedQFormer(QFormer):
    """``QFormer`` without padding, and without states that nothing reads.

    Between the layers stands a list of tokens: the queries of all rows, then the words of all rows.
    Attention alone looks at it row by row. On Scenes 61 % of the text slots of a batch are padding
    (benchmarks/padding.py). States of padding are those of any token.
    """

    compiled = False
    """Whether layers run compiled where gradients are computed."""

    def hidden_states(
        self,
        query_embeds: Float[Tensor, "M Q D"] | None,
        image_features: Float[Tensor, "N P V"] | None,
        qformer_ids: Int[Tensor, "M I"] | None,
        qformer_mask: Int[Tensor, "M I"] | None,
        image_index: Int[Tensor, " M"] | None = None,
        causal_text: bool = False,
        keep_text: bool = True,
    ) -> tuple[Float[Tensor, "M Q D"] | None, Float[Tensor, "M _ D"]]:
        hidden = self.embeddings(query_embeds, qformer_ids)  # [M, Q+I, D]
        count = 0 if query_embeds is None else query_embeds.shape[1]
        mask = None
        if qformer_mask is not None:
            mask = send(attention_mask(qformer_mask, count, causal_text), hidden.device)
        rows = Rows.of(hidden, count, qformer_mask)
        tokens = rows.pack(hidden)  # [n, D]
        last = len(self.encoder.layer) - 1
        run = compiled(_run_layer) if self.compiled and torch.is_grad_enabled() else _run_layer
        for depth, layer in enumerate(self.encoder.layer):
            assert isinstance(layer, QFormerLayer)
            keep = keep_text or depth < last
            tokens = run(layer, tokens, rows, mask, image_features, image_index, keep)
        states = rows.unpack(tokens) if keep_text else tokens.unflatten(0, (len(hidden), -1))
        queries = None if query_embeds is None else states[:, :count]
        return queries, states[:, count:]


def _run_layer(
    layer: QFormerLayer,
    tokens: Float[Tensor, "n D"],
    rows: Rows,
    mask: Bool[Tensor, "M 1 _ X"] | None,
    image_features: Float[Tensor, "N P V"] | None,
    image_index: Int[Tensor, " M"] | None,
    keep_text: bool,
) -> Float[Tensor, "_ D"]:
    """All tokens to all tokens, or without ``keep_text`` to those of the M * Q queries: then the
    text gives keys and values alone."""
    count = len(rows.index) * rows.num_queries
    readers = tokens if keep_text else tokens[:count]
    attention = layer.attention.attention
    query, key, value = attention.query(readers), attention.key(tokens), attention.value(tokens)
    key, value = rows.unpack(key), rows.unpack(value)
    if keep_text:
        context = rows.pack(attention.attend(rows.unpack(query), key, value, mask))
    else:
        query = query.unflatten(0, (-1, rows.num_queries))  # [M, Q, D]
        context = attention.attend(query, key, value, mask).flatten(0, 1)
    attended = layer.attention.output(context, readers)
    queries, text = attended[:count], attended[count:]
    outputs = []
    if count:
        queries = queries.unflatten(0, (-1, rows.num_queries))
        if layer.crossattention is not None:
            assert image_features is not None
            cross = layer.crossattention
            context = cross_attend(cross.attention, queries, image_features, image_index)
            queries = cross.output(context, queries)
        outputs.append(layer.output_query(layer.intermediate_query(queries), queries).flatten(0, 1))
    if len(text):
        outputs.append(layer.output(layer.intermediate(text), text))
    return torch.cat(outputs)
