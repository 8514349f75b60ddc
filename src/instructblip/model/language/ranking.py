"""Ranking: log-likelihoods of many candidates behind one prompt that is computed once.

The candidates of a sample form a prefix tree, so what they share is computed once too. Three
candidates behind a prompt of four tokens, each with its end token ``.``: "red .", "red cat ." and
"dog ."::

    prompt --red--> 1 --cat--> 2      node            1    2    3
      |                               token           red  cat  dog
      +-----dog--> 3                  position        4    5    4

An edge is one token of one candidate, and the logits at its parent predict it. The end tokens need
no node, since nothing follows that their logits would predict. The score of "red cat ." is
log p(red | prompt) + log p(cat | node 1) + log p(. | node 2).

A model that accepts any mask (``reads_trees``) reads a tree as one row, each node once; any other
model reads one row per leaf::

    tree      prompt  1  2  3         leaves    red  cat
    1 red     x x x x x                         dog
    2 cat     x x x x x  x
    3 dog     x x x x       x
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

Candidates = Sequence[Sequence[Sequence[int]]]
"""Token ids of every candidate of every sample, the end token included."""

Normalization = Literal["sum", "mean"]

Entry = tuple[int, int, tuple[int, ...]]
"""One candidate: its sample, its place among all candidates of the batch, the tokens to score."""

MAX_NODES = 2000
"""Nodes per chunk: attention over a row of them costs their square."""


@dataclass(frozen=True)
class Prefix:
    """[queries; prompt] of B samples after the language model has read it."""

    logits: Float[Tensor, "B W"]  # of the first token behind it
    cache: Any  # keys and values
    mask: Int[Tensor, "B X"]
    states: Float[Tensor, "B X L"] | None = None  # of an encoder


@dataclass(frozen=True)
class Layout:
    """The nodes of a chunk as rows that continue the prompts of their samples.

    Node i of the chunk, roots not counted, is position ``place[i]`` of the flattened rows.
    """

    sample: Int[Tensor, " r"]
    ids: Int[Tensor, "r w"]
    depth: Int[Tensor, "r w"]  # 0 for the first token behind the prompt
    real: Bool[Tensor, "r w"]  # no padding
    visible: Bool[Tensor, "r w w"] | None  # [r, i, j]: i sees j; None: plain causal rows
    place: Int[Tensor, " n"]
    of_one_sample: bool  # several rows, all of one sample


def sort_candidates(candidates: Candidates, include_end: bool, num_samples: int) -> list[Entry]:
    """All candidates of a batch, those of a sample in the order of their tokens, so that candidates
    with a common beginning fall into one chunk. ValueError for a candidate without a token."""
    if len(candidates) != num_samples:
        raise ValueError(
            f"candidates must be one list per sample; got {len(candidates)} for {num_samples}"
        )
    flat = [(i, tuple(ids)) for i, group in enumerate(candidates) for ids in group]
    if not include_end:
        flat = [(i, ids[:-1]) for i, ids in flat]
    empty = [i for i, ids in flat if not ids]
    if empty:
        raise ValueError(
            f"a candidate has no token to score (sample {empty[0]} of the batch); "
            "give at least one token besides the end token"
        )
    entries = [(i, place, ids) for place, (i, ids) in enumerate(flat)]
    return sorted(entries, key=lambda entry: entry[::2])


def in_chunks(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    """``size`` candidates at a time, fewer where their trees would have over ``MAX_NODES`` nodes.
    A candidate is never cut."""
    if size < 1:
        raise ValueError(f"chunk must be at least 1; got {size}")
    start = nodes = 0
    for end, entry in enumerate(entries):
        added = _new_nodes(entries[end - 1] if end > start else None, entry)
        if end - start == size or (end > start and nodes + added > MAX_NODES):
            yield entries[start:end]
            start, nodes, added = end, 0, _new_nodes(None, entry)
        nodes += added
    if start < len(entries):
        yield entries[start:]


def _new_nodes(before: Entry | None, entry: Entry) -> int:
    """Nodes that a candidate adds to a forest whose last candidate, in order, is ``before``."""
    nodes = entry[2][:-1]
    if before is None or before[0] != entry[0]:
        return len(nodes)
    shared = zip(nodes, before[2][:-1], strict=False)
    return len(nodes) - sum(1 for _ in takewhile(lambda two: two[0] == two[1], shared))


@dataclass(frozen=True)
class Forest:
    """The prefix trees of one chunk of candidates, one tree per sample.

    Nodes 0 to len(samples) - 1 are the roots. Every other node has a parent, a token and a depth,
    the number of tokens between the root and itself. ``edges`` are (candidate, parent, token). The
    example above, with root 0::

        parents  [-1, 0, 1, 0]    tokens  [-1, red, cat, dog]    depths  [-1, 0, 1, 0]
        edges    (0, 0, red) (0, 1, .)    (1, 0, red) (1, 1, cat) (1, 2, .)    (2, 0, dog) (2, 3, .)
    """

    samples: list[int]
    parents: list[int]
    tokens: list[int]
    depths: list[int]
    edges: list[tuple[int, int, int]]

    @classmethod
    def of(cls, chunk: Sequence[Entry]) -> "Forest":
        """The trees of ``chunk``; candidates are counted from the first of the chunk."""
        samples = list(dict.fromkeys(sample for sample, _, _ in chunk))
        root = {sample: node for node, sample in enumerate(samples)}
        forest = cls(samples, [-1] * len(samples), [-1] * len(samples), [-1] * len(samples), [])
        children: dict[tuple[int, int], int] = {}  # (node, token) -> node
        for candidate, (sample, _, ids) in enumerate(chunk):
            node = root[sample]
            for depth, token in enumerate(ids):
                forest.edges.append((candidate, node, token))
                if depth == len(ids) - 1:  # nothing follows that its logits would predict
                    break
                child = children.setdefault((node, token), len(forest.parents))
                if child == len(forest.parents):
                    forest.parents.append(node)
                    forest.tokens.append(token)
                    forest.depths.append(depth)
                node = child
        return forest

    @property
    def nodes(self) -> range:
        """The nodes below the roots: what runs through the model."""
        return range(len(self.samples), len(self.parents))

    def __len__(self) -> int:
        return len(self.nodes)

    def path(self, node: int) -> list[int]:
        """The nodes from below the root to ``node``."""
        path = []
        while node >= len(self.samples):
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def layout(self, as_trees: bool, device: torch.device) -> Layout:
        """One row per tree, in which a node sees its ancestors and itself; or one row per leaf, the
        path to it."""
        samples, rows = self.samples, [[] for _ in self.samples]
        if as_trees:
            for node in self.nodes:
                rows[self.parents[self.path(node)[0]]].append(node)
        else:
            inner = set(self.parents)
            rows = [self.path(node) for node in self.nodes if node not in inner]
            samples = [self.samples[self.parents[row[0]]] for row in rows]
        place: dict[int, tuple[int, int]] = {}  # row and column of each node
        for r, row in enumerate(rows):
            for column, node in enumerate(row):
                place.setdefault(node, (r, column))  # in other rows its logits are the same
        nodes = pad_sequence([torch.tensor(row).long() for row in rows], True, padding_value=-1)
        real, visible = nodes >= 0, None
        width = nodes.shape[1]
        if as_trees:
            paths = [(node, self.path(node)) for node in self.nodes]
            sees = [(*place[node], place[above][1]) for node, path in paths for above in path]
            visible = torch.zeros(len(rows), width, width, dtype=torch.bool)
            visible[tuple(torch.tensor(sees).T)] = True
            visible = visible.to(device)
        row_of, column_of = torch.tensor([place[node] for node in self.nodes]).T
        ids, depth = (
            torch.tensor(values)[nodes].masked_fill(~real, 0).to(device)
            for values in (self.tokens, self.depths)
        )
        return Layout(
            sample=torch.tensor(samples, device=device),
            of_one_sample=len(samples) > 1 and len(set(samples)) == 1,
            ids=ids,
            depth=depth,
            real=real.to(device),
            visible=visible,
            place=(row_of * width + column_of).to(device),
        )

    def edge_scores(self, logits: Float[Tensor, "nodes W"]) -> Float[Tensor, " edges"]:
        """Log-likelihood of the token of each edge, from the logits at all nodes, the roots
        first."""
        _, parent, token = torch.tensor(self.edges, device=logits.device).T
        return logits[parent, token] - logits.logsumexp(1)[parent]

    def scores(
        self, logits: Float[Tensor, "nodes W"], normalization: Normalization
    ) -> Float[Tensor, " c"]:
        """Log-likelihood of each candidate, from the logits as above."""
        candidate = torch.tensor(self.edges, device=logits.device).T[0]
        scores = self.edge_scores(logits)
        counts = candidate.bincount()
        total = scores.new_zeros(len(counts)).index_add(0, candidate, scores)
        return total / counts if normalization == "mean" else total


def select_samples(values: Tensor, layout: Layout) -> Tensor:
    """``values`` of the sample of each row; a view where all rows belong to one sample."""
    sample = layout.sample.to(values.device)  # a layer may be on another device
    if layout.of_one_sample:
        return values[sample[:1]].expand(len(sample), *values.shape[1:])
    return values[sample]


def select_cache(cache: Any, layout: Layout) -> Any:
    """A cache whose row i is that of the sample of row i; ``cache`` does not change."""
    if isinstance(cache, EncoderDecoderCache):
        attention, cross = cache.self_attention_cache, cache.cross_attention_cache
        return EncoderDecoderCache(select_cache(attention, layout), select_cache(cross, layout))
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in selected.layers:
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            layer.keys = select_samples(layer.keys, layout)
            layer.values = select_samples(layer.values, layout)
        else:  # another kind of state
            layer.batch_select_indices(layout.sample)
    return selected
