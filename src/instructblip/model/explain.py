"""Where in the images the words of a response come from: maps over the grid of the image encoder.

Every method takes one sample and `words`, and returns a map of each word and image; docs/explain.md
measures how often each is right.

- ``attention``: the last cross-attention alone. It does not depend on the words.
- ``rollout``: attention through all layers of the Q-Former, half of each layer being its residual,
  weighted by how much of the log-probability of the word is due to each query.
- ``gradient``: attention of all layers, each weight times the gradient of the log-probability.
- ``features``: how long the gradient of the log-probability at the image features is.
- ``occlusion``: probability that the word loses when a window of the image is covered, plus what it
  gains when the window is all that is shown. The first alone finds nothing where either of two
  things is enough for the answer, the second alone nothing where both are needed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.model.inference import cross_attention, eval_mode
from instructblip.model.instructblip import InstructBlip
from instructblip.model.qformer import MultiHeadAttention, QFormer, QFormerLayer

Method = Literal["occlusion", "features", "gradient", "rollout", "attention"]
WordMaps = tuple[Float[Tensor, " W"], Float[Tensor, "W F G G"]]
"""Log-probabilities of words in nats, and a map of each word and image."""


def word_maps(
    model: InstructBlip,
    batch: Batch,
    words: Float[Tensor, "W R"],
    method: Method,
    chunk: int = 32,
    on_pass: Callable[[], None] = lambda: None,
) -> WordMaps:
    """Log-probability and maps of each word, for the only sample of ``batch``.

    ``words`` is 1 where a token of the response belongs to a word. ``chunk`` images run at a time,
    which limits memory and changes no map. ``on_pass`` is called before each of their passes, and
    before each pass back. The model is in eval mode, and has no gradient after it.
    """
    assert len(batch) == 1
    with eval_mode(model), torch.no_grad():
        known = replace(batch, pixel_values=None, image_features=model.features_of(batch))
        words = words.to(batch.image_index.device)
        if method == "occlusion":
            scores, maps = _occlusion(model, batch, known, words, chunk, on_pass)
        elif method == "attention":
            scores = _scores(model, known, words)[0]
            weights = cross_attention(model, known)[0].mean(1)  # [F, P]
            maps = _on_grid(model, weights).expand(len(scores), -1, -1, -1)
        else:
            scores, maps = _through_qformer(model, known, words, method, on_pass)
    return scores.cpu(), maps.float().cpu()


def _scores(model: InstructBlip, batch: Batch, words: Float[Tensor, "W R"]) -> Float[Tensor, "B W"]:
    """Log-probabilities of the words of B samples that have the same response."""
    queries = model.encode_queries(batch)
    with model.language_precision():
        losses = model.language.loss(model.language.join(queries, batch))
    return -losses.float().unflatten(0, (len(batch), -1)) @ words.T


def _on_grid(model: InstructBlip, weights: Float[Tensor, "*rows P"]) -> Float[Tensor, "*rows G G"]:
    """Without class and register tokens, which have no place."""
    vision = model.config.vision
    return weights[..., vision.num_prefix_tokens :].unflatten(-1, (vision.grid, vision.grid))


# --- occlusion ------------------------------------------------------------------------------------


def _occlusion(
    model: InstructBlip,
    batch: Batch,
    known: Batch,
    words: Float[Tensor, "W R"],
    chunk: int,
    on_pass: Callable[[], None],
) -> WordMaps:
    """A place has the mean of the windows that cover it."""
    assert batch.pixel_values is not None
    masks = windows(model.config.vision.grid).to(batch.pixel_values.device)  # [K, G, G]
    nothing, share = torch.zeros_like(masks[:1]), masks.flatten(1).float()
    scores = _scores(model, known, words)[0]  # [W]
    maps = []
    for frame in range(batch.image_index.shape[1]):
        see = functools.partial(_chances, model, batch, known, words, chunk, on_pass, frame)
        lost, gained = scores.exp() - see(~masks), see(masks) - see(nothing)
        maps.append(((lost + gained).T @ share) / share.sum(0))  # [W, G*G]
    return scores, torch.stack(maps, 1).unflatten(2, masks.shape[1:])


def _chances(
    model: InstructBlip,
    batch: Batch,
    known: Batch,
    words: Float[Tensor, "W R"],
    chunk: int,
    on_pass: Callable[[], None],
    frame: int,
    shown: Bool[Tensor, "K G G"],
) -> Float[Tensor, "K W"]:
    """Probability of each word when only some places of one of the images are shown; all else of it
    has its median colour."""
    pixels, features = batch.pixel_values, known.image_features
    assert pixels is not None
    assert features is not None
    image = pixels[batch.image_index[0, frame]]  # [3, S, S]
    colour = image.flatten(1).median(1).values[:, None, None]
    steps = torch.arange(image.shape[-1], device=image.device)
    steps = steps * shown.shape[-1] // image.shape[-1]  # the row of the grid of each pixel
    chances = []
    for part in shown.split(chunk):
        on_pass()
        pixel = part[:, steps][:, :, steps].unsqueeze(1)  # [k, 1, S, S]
        new = model.encode_image(torch.where(pixel, image, colour))
        copies = _copies(batch, frame, len(features), len(part)).to(new.device)
        copies = replace(copies, image_features=torch.cat([features, new]))
        chances.append(_scores(model, copies, words).exp())
    return torch.cat(chances)


def windows(grid: int) -> Bool[Tensor, "K G G"]:
    """Which places each window, a third of the grid wide, covers: three tilings, each shifted by a
    third of a window, so that every place is in three. K is 34 for a grid of 8 and 48 for 16."""
    side = max(1, round(grid / 3))
    places, tilings = torch.arange(grid), []
    for first in sorted({-(side * third // 3) for third in range(3)}):
        starts = torch.arange(first, grid, side)[:, None]
        lines = (places >= starts) & (places < starts + side)  # [k, G]
        tilings.append((lines[:, None, :, None] & lines[None, :, None, :]).flatten(0, 1))
    return torch.cat(tilings)


def _copies(batch: Batch, frame: int, first: int, count: int) -> Batch:
    """The sample ``count`` times; its image ``frame`` is number ``first`` in the first copy, and
    the next one in each after it."""
    host = replace(batch.host, pixel_values=None, image_features=None, kept=None)
    tensors = {name: x.expand(count, *x.shape[1:]) for name, x in host.tensors.items()}
    index = tensors["image_index"].clone()
    index[:, frame] = torch.arange(first, first + count, device=index.device)
    return replace(host, **tensors | {"image_index": index})


# --- through the Q-Former -------------------------------------------------------------------------

Weights = dict[tuple[int, str], Float[Tensor, "F heads X Y"]]
"""Attention of each layer of a Q-Former, by its number and "self" or "cross"."""


@contextlib.contextmanager
def recorded_attention(model: InstructBlip) -> Iterator[Weights]:
    """The weights of all attention of the Q-Former in the calls inside, of which gradients can be
    taken. It runs as it is defined (``qformer.py``), not as its fast twin."""
    weights: Weights = {}
    qformer, changed = model.qformer, []

    def record(attention: MultiHeadAttention, name: tuple[int, str]) -> None:
        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            heads = (attention.num_heads, -1)
            query, key, value = (x.unflatten(2, heads).transpose(1, 2) for x in (query, key, value))
            scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weight = scores.softmax(-1)
            weights[name] = weight if weight.requires_grad else weight.requires_grad_()
            return (weight @ value).transpose(1, 2).flatten(2)

        attention.attend = attend  # type: ignore[method-assign]
        changed.append(attention)

    try:
        qformer.hidden_states = functools.partial(QFormer.hidden_states, qformer)  # type: ignore[method-assign]
        for depth, layer in enumerate(qformer.encoder.layer):
            assert isinstance(layer, QFormerLayer)
            record(layer.attention.attention, (depth, "self"))
            if layer.crossattention is not None:
                record(layer.crossattention.attention, (depth, "cross"))
        yield weights
    finally:
        del qformer.hidden_states
        for attention in changed:
            del attention.attend


def _through_qformer(
    model: InstructBlip,
    batch: Batch,
    words: Float[Tensor, "W R"],
    method: Method,
    on_pass: Callable[[], None],
) -> WordMaps:
    """Maps from attention weights or features and their gradients, one pass back for each word."""
    assert batch.image_features is not None
    index = batch.image_index[0]
    with torch.enable_grad(), recorded_attention(model) as weights:
        features = batch.image_features.detach().requires_grad_()  # [N, P, V]
        queries = model.encode_queries(replace(batch, image_features=features))  # [1, F*Q, L]
        with model.language_precision():
            losses = model.language.loss(model.language.join(queries, batch))
        scores = words @ -losses.float()
        crossing = [weight for (_, kind), weight in weights.items() if kind == "cross"]
        sources = {"features": [features], "rollout": [queries], "gradient": crossing}[method]
        maps = []
        for score in scores:
            on_pass()
            gradients = torch.autograd.grad(score, sources, retain_graph=True)
            if method == "features":
                places = gradients[0].float().norm(dim=-1)[index]  # [F, P]
            elif method == "gradient":
                products = zip(crossing, gradients, strict=True)
                each = [(x * y).clamp(min=0).sum((1, 2)) for x, y in products]
                places = torch.stack(each).sum(0)
            else:
                added = (queries * gradients[0]).sum(-1).abs().view(len(index), 1, -1)
                places = (added @ _rolled_out(weights, added.shape[-1]))[:, 0]
            maps.append(_on_grid(model, places.detach()))
    return scores.detach(), torch.stack(maps)


def _rolled_out(weights: Weights, num_queries: int) -> Float[Tensor, "F Q P"]:
    """What share of each query comes from each place: attention multiplied through all layers, half
    of each layer being its residual."""
    text_and_queries, crossing = weights[0, "self"], weights[0, "cross"]
    shape = (len(crossing), text_and_queries.shape[-1], crossing.shape[-1])
    read = crossing.new_zeros(shape)  # [F, X, P]
    for (_, kind), weight in weights.items():
        mean = weight.detach().mean(1)
        if kind == "self":
            read = (mean @ read + read) / 2
        else:
            queries, text = read[:, :num_queries], read[:, num_queries:]
            read = torch.cat([(mean + queries) / 2, text], 1)
    return read[:, :num_queries]
