"""Candidates as prefix trees: what they share is computed once, and every token is scored.

The candidates "red", "red cat" and "dog" of one sample, each with its end token ``.``, hang on the
root, which is the last position of the prompt::

    root --red--> 1 --cat--> 2          edges (parent, token): (root, red) (1, .)
      \\---dog--> 3                      (root, red) (1, cat) (2, .)  (root, dog) (3, .)

An edge is one token of one candidate, and the logits at its parent predict it: only the nodes 1 to
3 run through the model. A sum over the edges of a candidate is its log-likelihood.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Candidates = Sequence[Sequence[Sequence[int]]]
"""Token ids of every candidate of every sample, the end token included."""

Normalization = Literal["sum", "mean"]

Pair = tuple[int, int, tuple[int, ...]]
"""Sample, place among all candidates of the batch, tokens to score."""


@dataclass(frozen=True)
class Layout:
    """The nodes of a chunk as rows that go on where a sample's prompt ends.

    ``visible[r, i, j]``: position i of row r sees position j of the row. Node n of the chunk is
    position ``place[n]`` of the flattened rows.
    """

    sample: Tensor  # int64 [r]
    ids: Tensor  # int64 [r, w]
    depth: Tensor  # int64 [r, w], 0 for the first token behind the prompt
    visible: Tensor  # bool [r, w, w]
    real: Tensor  # bool [r, w]
    place: Tensor  # int64 [n]


@dataclass(frozen=True)
class Forest:
    """The prefix trees of one chunk of candidates, one tree a sample.

    Nodes 0 to len(samples) - 1 are the roots; every other node has its parent, its token and its
    depth (the tokens between the root and itself). ``edges`` are (candidate, parent, token).
    """

    samples: list[int]
    parents: list[int]
    tokens: list[int]
    depths: list[int]
    edges: list[tuple[int, int, int]]

    @classmethod
    def of(cls, chunk: Sequence[Pair]) -> "Forest":
        """The trees of ``chunk``; candidates are counted from the first of the chunk."""
        samples = list(dict.fromkeys(sample for sample, _, _ in chunk))
        root = {sample: node for node, sample in enumerate(samples)}
        forest = cls(samples, [-1] * len(samples), [-1] * len(samples), [-1] * len(samples), [])
        children: dict[tuple[int, int], int] = {}
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

    def __len__(self) -> int:
        """Nodes below the roots: what runs through the model."""
        return len(self.parents) - len(self.samples)

    def path(self, node: int) -> list[int]:
        """The nodes from below the root to ``node``."""
        found = []
        while node >= len(self.samples):
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def packed(self, device: torch.device) -> Layout:
        """One row a tree, each node once; a node sees its ancestors and itself."""
        rows: list[list[int]] = [[] for _ in self.samples]
        tree, column = list(range(len(self.samples))), [0] * len(self.samples)
        for node in range(len(self.samples), len(self.parents)):
            tree.append(tree[self.parents[node]])
            column.append(len(rows[tree[node]]))
            rows[tree[node]].append(node)
        width = max(map(len, rows))
        seen = [
            (tree[node], column[node], column[ancestor])
            for row in rows
            for node in row
            for ancestor in self.path(node)
        ]
        visible = torch.zeros(len(rows), width, width, dtype=torch.bool)
        visible[tuple(torch.tensor(seen).T)] = True
        place = [tree[node] * width + column[node] for row in rows for node in row]
        nodes = [node for row in rows for node in row]
        return self._layout(self.samples, rows, visible, nodes, place, device)

    def rows(self, device: torch.device) -> Layout:
        """One row a leaf: the path that leads there, causal, for models that read plain rows."""
        inner = set(self.parents)
        leaves = [n for n in range(len(self.samples), len(self.parents)) if n not in inner]
        rows = [self.path(leaf) for leaf in leaves]
        width = max(map(len, rows))
        first: dict[int, int] = {}
        samples = []
        for r, row in enumerate(rows):
            samples.append(self.samples[self.parents[row[0]]])
            for c, node in enumerate(row):
                first.setdefault(node, r * width + c)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        visible = causal.expand(len(rows), width, width)
        return self._layout(samples, rows, visible, list(first), list(first.values()), device)

    def _layout(
        self,
        samples: list[int],
        rows: list[list[int]],
        visible: Tensor,
        nodes: list[int],
        place: list[int],
        device: torch.device,
    ) -> Layout:
        def spread(values: list[int]) -> Tensor:
            own = [torch.tensor([values[n] for n in row], dtype=torch.long) for row in rows]
            return pad_sequence(own, batch_first=True)

        places = torch.empty(len(self), dtype=torch.long)
        places[torch.tensor(nodes) - len(self.samples)] = torch.tensor(place)
        width = visible.shape[1]
        lengths = torch.tensor([len(row) for row in rows])
        return Layout(
            sample=torch.tensor(samples, device=device),
            ids=spread(self.tokens).to(device),
            depth=spread(self.depths).to(device),
            visible=visible.to(device),
            real=(torch.arange(width) < lengths[:, None]).to(device),
            place=places.to(device),
        )

    def scores(
        self, logits: Float[Tensor, "nodes W"], normalization: Normalization
    ) -> Float[Tensor, " c"]:
        """Log-likelihood of each candidate from the logits at all nodes, the roots first."""
        candidate, parent, token = torch.tensor(self.edges, device=logits.device).T
        found = logits[parent, token] - logits.logsumexp(1)[parent]
        counts = candidate.bincount()
        total = found.new_zeros(len(counts)).index_add(0, candidate, found)
        return total / counts if normalization == "mean" else total


def scored_tokens(candidates: Candidates, include_end: bool, num_samples: int) -> list[Pair]:
    """All candidates of a batch, each sample's in the order of their tokens, so that those with a
    common beginning fall into one chunk. ValueError for one without a token to score."""
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
    return sorted(
        ((i, place, ids) for place, (i, ids) in enumerate(flat)), key=lambda pair: pair[::2]
    )


MAX_NODES = 2000
"""Nodes of a chunk: a row of them costs their square."""


def in_chunks(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    """``size`` candidates at a time, and fewer where their trees would pass ``MAX_NODES``."""
    if size < 1:
        raise ValueError(f"chunk must be at least 1; got {size}")
    start = nodes = 0
    for end, pair in enumerate(pairs):
        own = _new_nodes(pairs[end - 1] if end > start else None, pair)
        if end - start == size or (end > start and nodes + own > MAX_NODES):
            yield pairs[start:end]
            start, nodes, own = end, 0, _new_nodes(None, pair)
        nodes += own
    if start < len(pairs):
        yield pairs[start:]


def _new_nodes(before: Pair | None, pair: Pair) -> int:
    """Nodes that a candidate adds to a forest whose newest, in order, is ``before``."""
    nodes = pair[2][:-1]  # nothing follows the last token
    if before is None or before[0] != pair[0]:
        return len(nodes)
    shared = zip(nodes, before[2][:-1], strict=False)
    return len(nodes) - sum(1 for _ in takewhile(lambda two: two[0] == two[1], shared))


def by_sample(
    pairs: Sequence[Pair], scores: Sequence[Tensor], candidates: Candidates, like: Tensor
) -> list[Tensor]:
    """Scores [C] of each sample in the order of its candidates, from those of all chunks."""
    order: Int[Tensor, " c"] = torch.tensor([place for _, place, _ in pairs], dtype=torch.long)
    flat = torch.zeros(len(pairs), device=like.device)
    if pairs:
        flat[order.to(like.device)] = torch.cat(list(scores))
    return list(flat.split([len(group) for group in candidates]))
