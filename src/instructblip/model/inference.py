"""Answers by generation and by ranking candidates, and where the queries look, through the same
steps as the loss."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.model.decoding import GREEDY, Decoding
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.generate import OnTokens
from instructblip.model.language.ranking import (
    Candidates,
    Entry,
    Forest,
    Normalization,
    in_chunks,
    sort_candidates,
)
from instructblip.model.language.running import Prompt
from instructblip.model.qformer import QFormerLayer


@contextlib.contextmanager
def eval_mode(model: InstructBlip) -> Iterator[None]:
    """Eval mode inside, and the mode of before after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def generate_responses(
    model: InstructBlip,
    batch: Batch,
    on_tokens: OnTokens | None = None,
    decoding: Decoding = GREEDY,
    ends: Sequence[int] = (),
    queries: Float[Tensor, "B K L"] | None = None,
) -> list[list[int]]:
    """Token ids of each sample's response, without prompt and end token.

    Responses in the batch are ignored. The model answers in eval mode. ``on_tokens`` is called with
    the newest token of every sample [B] at each step, padding after its end; not with beams, whose
    tokens are known at the end only. It may return which samples end there; an error that it
    raises ends the run. ``ends`` are the tokens that end a response; by default those of the
    model's generation config. ``queries`` are those of the batch, where they are known.
    """
    options = decoding.generate_options() | ({"eos_token_id": list(ends)} if ends else {})
    with eval_mode(model):
        queries = model.encode_queries(batch) if queries is None else queries
        with model.language_precision():
            return model.language.generate(queries, batch, on_tokens, **options)


@torch.no_grad()
def encode_images(
    model: InstructBlip, pixel_values: Float[Tensor, "N 3 S S"]
) -> list[Float[Tensor, "P V"]]:
    """The features of each image, which do not share memory."""
    with eval_mode(model):
        return [features.clone() for features in model.encode_image(pixel_values)]


@torch.no_grad()
def read_prompts(model: InstructBlip, batch: Batch) -> list[Prompt]:
    """What the language model keeps of each sample's [queries; prompt], for `language.running`."""
    with eval_mode(model):
        queries = model.encode_queries(batch)
        with model.language_precision():
            return Prompt.of(model.language.prefill(queries, batch))


@torch.no_grad()
def rank_candidates(
    model: InstructBlip,
    batch: Batch,
    candidates: Candidates,
    normalization: Normalization = "sum",
    include_end: bool = True,
    chunk: int = 256,
    on_chunk: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Log-likelihoods in nats [C] of the candidates of each sample, to be compared by argmax.

    ``candidates[b][c]`` are token ids that end with the end token; ``include_end=False`` leaves the
    end token out of the score. "sum" adds up the tokens, "mean" divides by their number. Image
    and prompt are encoded once; at most ``chunk`` candidates run at a time as a prefix tree, fewer
    where they are long, which limits memory and changes no score. ``on_chunk`` is called before
    each chunk; an error that it raises ends the run. 1,000 candidates score 36 to 40 times as fast
    as in one forward pass each (benchmarks/rank_2-cpu-cores_2026-11-23.md).

    Raises ValueError for a candidate without a token to score.
    """
    entries = sort_candidates(candidates, include_end, len(batch))
    scores = torch.zeros(len(entries), device=model.query_tokens.device)
    for part, forest, logits in _forests(model, batch, entries, chunk, on_chunk):
        places = torch.tensor([place for _, place, _ in part], device=scores.device)
        scores[places] = forest.scores(logits, normalization)
    return list(scores.split([len(group) for group in candidates]))


def _forests(
    model: InstructBlip,
    batch: Batch,
    entries: Sequence[Entry],
    chunk: int,
    on_chunk: Callable[[], None] | None = None,
) -> Iterator[tuple[Sequence[Entry], Forest, Tensor]]:
    """Each chunk of the entries with its trees and the logits at their nodes [nodes, W]."""
    with eval_mode(model):
        queries = model.encode_queries(batch)
        device = queries.device
        with model.language_precision():
            language = model.language
            prefix = language.prefill(queries, batch)
            for part in in_chunks(entries, chunk):
                if on_chunk is not None:
                    on_chunk()
                forest = Forest.of(part)
                logits = prefix.logits[torch.tensor(forest.samples, device=device)]
                if len(forest):
                    layout = forest.layout(language.reads_trees, device)
                    logits = torch.cat([logits, language.node_logits(prefix, layout)])
                yield part, forest, logits


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a response with its log-probability in nats, and the likeliest tokens in its
    place with theirs."""

    id: int
    log_prob: float
    likeliest: list[tuple[int, float]]


@torch.no_grad()
def score_tokens(
    model: InstructBlip, batch: Batch, responses: Sequence[Sequence[int]], likeliest: int = 0
) -> list[list[ScoredToken]]:
    """The log-probability of each token of each sample's response, of which none may be empty.

    They add up to the score of `rank_candidates` for a response that ends with the end token.
    """
    entries = sort_candidates([[ids] for ids in responses], True, len(batch))
    scored: list[list[ScoredToken]] = [[] for _ in responses]
    for part, forest, logits in _forests(model, batch, entries, chunk=256):
        top = logits.topk(min(likeliest, logits.shape[1]), dim=1)
        logs = (top.values - logits.logsumexp(1, keepdim=True)).tolist()
        nodes = zip(top.indices.tolist(), logs, strict=True)
        others = [list(zip(*node, strict=True)) for node in nodes]
        scores = forest.edge_scores(logits).tolist()
        for (candidate, parent, token), score in zip(forest.edges, scores, strict=True):
            scored[part[candidate][0]].append(ScoredToken(token, score, others[parent]))
    return scored


@torch.no_grad()
def cross_attention(model: InstructBlip, batch: Batch) -> Float[Tensor, "B F Q P"]:
    """Weights of each query over the tokens of each frame, class and register tokens first. Rows
    sum to 1; they are zeros where a sample has no image.

    The mean over the heads of the last layer that attends to the image. The forward pass computes
    no weights, so they are computed again from the queries of that layer.
    """
    features = model.features_of(batch)  # [N, P, V]
    attention = [
        layer.crossattention.attention
        for layer in model.qformer.modules()
        if isinstance(layer, QFormerLayer) and layer.crossattention is not None
    ][-1]
    captured: list[Tensor] = []
    handle = attention.query.register_forward_hook(lambda *call: captured.append(call[-1]))
    try:
        model.encode_queries(replace(batch, pixel_values=None, image_features=features))
    finally:
        handle.remove()
    (query,) = captured  # [M, Q, D], of the M images that samples have
    index = batch.image_index.flatten()
    present = index >= 0
    with model.precision(model.qformer):
        key = attention.key(model.vision_model.norm(features).to(query.dtype))  # [N, P, D]
        key = key[index[present]]  # [M, P, D]
        heads = (attention.num_heads, -1)
        query, key = (x.unflatten(2, heads).transpose(1, 2) for x in (query, key))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    weights = scores.float().softmax(-1).mean(1)  # [M, Q, P]
    frames = weights.new_zeros(len(index), *weights.shape[1:])
    frames[present] = weights
    return frames.unflatten(0, batch.image_index.shape)
