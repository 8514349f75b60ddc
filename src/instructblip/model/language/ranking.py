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

A model that accepts any mask reads a tree as one row, each node once (`Forest.packed`); any other
model reads one row per leaf (`Forest.unpacked`)::

    packed    prompt  1  2  3         unpacked    red  cat
    1 red     x x x x x                           dog
    2 cat     x x x x x  x
    3 dog     x x x x       x
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from instructblip.core.batch import Batch

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


@runtime_checkable
class Ranker(Protocol):
    """What ranking needs of a language model: `CausalLanguage` and `Seq2SeqLanguage`."""

    def prefill(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Prefix:
        """Run [queries; prompt] once."""
        ...

    def layout(self, forest: "Forest", device: torch.device) -> Layout:
        """How the model reads a forest of candidates."""
        ...

    def node_logits(self, prefix: Prefix, layout: Layout) -> Float[Tensor, "n W"]:
        """Logits at every node of the layout, behind the prefixes of their samples."""
        ...


@torch.no_grad()
def rank(
    language: Ranker,
    queries: Float[Tensor, "B K L"],
    batch: Batch,
    candidates: Candidates,
    normalization: Normalization = "sum",
    include_end: bool = True,
    chunk: int = 256,
    on_chunk: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Log-likelihoods in nats [C] of the candidates of each sample, in the order given.

    The prefix runs once per sample, and at most ``chunk`` candidates at a time continue from its
    keys and values. ``on_chunk`` is called before each chunk; an exception that it raises ends the
    ranking. 1,000 candidates score 36 to 40 times as fast as in one forward pass each
    (benchmarks/rank_2-cpu-cores_2026-11-23.md).
    """
    entries = sort_candidates(candidates, include_end, len(batch))
    if not entries:
        return [torch.zeros(0, device=queries.device) for _ in candidates]
    prefix = language.prefill(queries, batch)
    scores = torch.zeros(len(entries), device=queries.device)
    for part in in_chunks(entries, chunk):
        if on_chunk is not None:
            on_chunk()
        forest = Forest.of(part)
        logits = prefix.logits[torch.tensor(forest.samples, device=queries.device)]
        if len(forest):
            layout = language.layout(forest, queries.device)
            logits = torch.cat([logits, language.node_logits(prefix, layout)])
        places = torch.tensor([place for _, place, _ in part], device=queries.device)
        scores[places] = forest.scores(logits, normalization)
    return list(scores.split([len(group) for group in candidates]))


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

    def packed(self, device: torch.device) -> Layout:
        """One row per tree, each node once; a node sees its ancestors and itself."""
        rows: list[list[int]] = [[] for _ in self.samples]
        tree, column = list(range(len(self.samples))), [-1] * len(self.samples)  # of each node
        for node in self.nodes:
            tree.append(tree[self.parents[node]])
            column.append(len(rows[tree[node]]))
            rows[tree[node]].append(node)
        sees = [
            (tree[node], column[node], column[ancestor])
            for node in self.nodes
            for ancestor in self.path(node)
        ]
        width = max(map(len, rows))
        visible = torch.zeros(len(rows), width, width, dtype=torch.bool)
        visible[tuple(torch.tensor(sees).T)] = True
        return self._layout(self.samples, rows, visible.to(device), device)

    def unpacked(self, device: torch.device) -> Layout:
        """One row per leaf, the path to it, for models that read plain rows."""
        inner = set(self.parents)
        rows = [self.path(node) for node in self.nodes if node not in inner]
        samples = [self.samples[self.parents[row[0]]] for row in rows]
        return self._layout(samples, rows, None, device)

    def _layout(
        self,
        samples: list[int],
        rows: list[list[int]],
        visible: Tensor | None,
        device: torch.device,
    ) -> Layout:
        def padded(values: list[list[int]]) -> Tensor:
            tensors = [torch.tensor(row, dtype=torch.long) for row in values]
            return pad_sequence(tensors, batch_first=True)

        width = max(map(len, rows))
        place: dict[int, int] = {}  # a node may stand in several rows, with the same logits
        for r, row in enumerate(rows):
            for column, node in enumerate(row):
                place.setdefault(node, r * width + column)
        return Layout(
            sample=torch.tensor(samples, device=device),
            ids=padded([[self.tokens[node] for node in row] for row in rows]).to(device),
            depth=padded([[self.depths[node] for node in row] for row in rows]).to(device),
            real=padded([[1] * len(row) for row in rows]).bool().to(device),
            visible=visible,
            place=torch.tensor([place[node] for node in self.nodes], device=device),
        )

    def scores(
        self, logits: Float[Tensor, "nodes W"], normalization: Normalization
    ) -> Float[Tensor, " c"]:
        """Log-likelihood of each candidate from the logits at all nodes, the roots first."""
        candidate, parent, token = torch.tensor(self.edges, device=logits.device).T
        scores = logits[parent, token] - logits.logsumexp(1)[parent]
        counts = candidate.bincount()
        total = scores.new_zeros(len(counts)).index_add(0, candidate, scores)
        return total / counts if normalization == "mean" else total


def select_samples(values: Tensor, sample: Int[Tensor, " r"]) -> Tensor:
    """``values[sample]``; a view where all rows belong to one sample."""
    if len(sample) > 1 and bool((sample == sample[0]).all()):
        return values[sample[:1]].expand(len(sample), *values.shape[1:])
    return values[sample]


def select_cache(cache: Any, sample: Int[Tensor, " r"]) -> Any:
    """A cache whose row i is row ``sample[i]`` of ``cache``, which does not change."""
    if isinstance(cache, EncoderDecoderCache):
        attention, cross = cache.self_attention_cache, cache.cross_attention_cache
        return EncoderDecoderCache(select_cache(attention, sample), select_cache(cross, sample))
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in selected.layers:
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            layer.keys = select_samples(layer.keys, sample)
            layer.values = select_samples(layer.values, sample)
        else:  # another kind of state
            layer.batch_select_indices(sample)
    return selected
