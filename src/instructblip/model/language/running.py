"""Responses that a decoder generates together, each from its own first to its own last token.

transformers' ``generate`` runs a batch until its longest response ends. Here a response starts as
soon as its prompt is read, and its row is free when it ends; all rows share each step. A row has
its own length, so its keys and values are in its columns from the first on, and a mask states how
many it has::

    row 0    q  q  5  6  7  8         the newest token goes to column 6
    row 1    q  q  5                  the newest token goes to column 3, what is behind it is masked
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from instructblip.model.decoding import Decoding
from instructblip.model.language.ranking import Prefix

TOP_K = 50
"""Tokens to sample from at most: the default of transformers, which ``generate`` follows too."""

COLUMNS = 64
"""Columns by which the cache grows at least."""


@dataclass(frozen=True)
class Prompt:
    """[queries; prompt] of one sample after the language model has read it."""

    logits: Float[Tensor, " W"]  # of the first token behind it
    states: list[tuple[Float[Tensor, "H X d"], Float[Tensor, "G X e"]]]  # of each layer

    @classmethod
    def of(cls, prefix: Prefix) -> "list[Prompt]":
        """The rows of ``prefix``, without their padding on the left."""
        lengths = prefix.mask.sum(1).tolist()
        return [
            cls(
                prefix.logits[row].clone(),
                [
                    (layer.keys[row, :, -length:].clone(), layer.values[row, :, -length:].clone())
                    for layer in prefix.cache.layers
                ],
            )
            for row, length in enumerate(lengths)
        ]

    def __len__(self) -> int:
        """Tokens of the prompt, queries included."""
        return self.states[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        tensors = (self.logits, *(each for pair in self.states for each in pair))
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(eq=False)
class Response:
    """A response that grows: ``ids`` without its end token, and whether it has ended.

    ``ends`` are the tokens that end it. ``seed`` makes a sampled response the same whichever
    others share its steps, up to rounding. Whoever reads it may end it.
    """

    decoding: Decoding
    ends: Sequence[int]
    seed: int = 0
    ids: list[int] = field(default_factory=list, init=False)
    ended: bool = field(default=False, init=False)
    _generator: torch.Generator | None = field(default=None, init=False)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token comes next."""
        decoding = self.decoding
        free = len(self.ids) >= decoding.min_new_tokens
        return free and not decoding.do_sample and decoding.repetition_penalty == 1.0

    def choose(self, scores: Float[Tensor, "1 W"]) -> Int[Tensor, " 1"]:
        """The next token, by the settings of ``decoding``."""
        decoding = self.decoding
        ids: Any = torch.tensor([self.ids], dtype=torch.long, device=scores.device)
        if decoding.repetition_penalty != 1.0:
            scores = RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty)(ids, scores)
        if len(self.ids) < decoding.min_new_tokens:
            known = [end for end in self.ends if end < scores.shape[1]]  # a tokenizer may have more
            scores = scores.index_fill(
                1, torch.tensor(known, device=scores.device).long(), -torch.inf
            )
        if not decoding.do_sample:
            return scores.argmax(1)
        for warp in _warpers(decoding):
            scores = warp(ids, scores)
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self.seed)
        return torch.multinomial(scores.softmax(1), 1, generator=self._generator)[:, 0]

    def add(self, token: int) -> None:
        """Append the next token, or end there."""
        self.ended = token in self.ends
        if not self.ended:
            self.ids.append(token)
            self.ended = len(self.ids) >= self.decoding.max_new_tokens


def _warpers(decoding: Decoding) -> list[Callable[[Any, Tensor], Tensor]]:
    warpers: list[Any] = [TopKLogitsWarper(TOP_K)]
    if decoding.temperature != 1.0:
        warpers.insert(0, TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_p < 1.0:
        warpers.append(TopPLogitsWarper(decoding.top_p))
    return warpers


class _Rows(DynamicLayer):
    """Keys [S, H, C, d] and values of one layer: S rows of C columns, most of them used."""

    keys: Any
    values: Any
    places: Int[Tensor, " n"]
    """The column of the newest token of the rows that run, the first n."""
    width: int
    """Columns that are read."""

    def put(self, row: int, states: tuple[Tensor, Tensor], rows: int, columns: int) -> None:
        """Write a prompt into a row; there is room for ``rows`` of ``columns`` afterwards."""
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self.keys, self.values = (x.new_zeros(0, len(x), 0, x.shape[2]) for x in states)
        self.reserve(rows, columns)
        for buffer, state in zip((self.keys, self.values), states, strict=True):
            buffer[row, :, : state.shape[1]] = state

    def reserve(self, rows: int, columns: int) -> None:
        """Make room, of twice the rows and ``COLUMNS`` more columns than there were."""
        have, wide = self.keys.shape[0], self.keys.shape[2]
        if rows <= have and columns <= wide:
            return
        rows = max(rows, 2 * have) if rows > have else have
        columns = max(columns, wide + COLUMNS) if columns > wide else wide

        def grown(old: Tensor) -> Tensor:
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            new[:have, :, :wide] = old
            return new

        self.keys, self.values = grown(self.keys), grown(self.values)

    def move(self, source: int, target: int, length: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Write the newest token of each row; all keys and values [n, H, width, d]."""
        count = len(key_states)
        places = self.places.to(key_states.device)
        rows = torch.arange(count, device=places.device)
        self.keys[rows, :, places] = key_states[:, :, 0]
        self.values[rows, :, places] = value_states[:, :, 0]
        return self.keys[:count, :, : self.width], self.values[:count, :, : self.width]


class Running:
    """The responses that run; for a decoder that accepts any mask (``reads_trees``)."""

    def __init__(
        self, language: Any, precision: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        self.language, self.precision = language, precision
        self.responses: list[Response] = []
        self._lengths: list[int] = []
        """Columns of each row: its prompt and its response but for the newest token."""
        self._layers: list[_Rows] = []

    def __len__(self) -> int:
        return len(self.responses)

    @torch.no_grad()
    def start(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> None:
        """Add responses, which get their first tokens."""
        _grow(responses, torch.stack([prompt.logits for prompt in prompts]))
        if not self._layers:
            self._layers = [_Rows() for _ in prompts[0].states]
        for prompt, response in zip(prompts, responses, strict=True):
            row, size = len(self.responses), len(prompt)
            for layer, states in zip(self._layers, prompt.states, strict=True):
                layer.put(row, states, row + 1, size + 1)
            self.responses.append(response)
            self._lengths.append(size)

    @torch.no_grad()
    def step(self) -> None:
        """Leave out the responses that have ended, and let the others grow by a token."""
        self._free()
        if not self.responses:
            return
        ids = torch.tensor([[response.ids[-1]] for response in self.responses])
        places, width = torch.tensor(self._lengths), max(self._lengths) + 1
        device = self.language.model.get_input_embeddings().weight.device
        ids, places = ids.to(device), places.to(device)
        for layer in self._layers:
            layer.reserve(len(ids), width)
            layer.places, layer.width = places, width
        seen = (torch.arange(width, device=device) <= places[:, None]).long()
        with self.precision():
            hidden = self.language.run(
                places[:, None],
                input_ids=ids,
                attention_mask=self.language.tree_mask(seen, seen.new_empty(len(ids), 1, 0).bool()),
                past_key_values=Cache(layers=[*self._layers]),
            ).last_hidden_state
            logits = self.language.logits(hidden[:, -1])
        self._lengths = [length + 1 for length in self._lengths]
        _grow(self.responses, logits)

    def _free(self) -> None:
        """Remove the rows that have ended; the last one takes the place of each."""
        for row in reversed(range(len(self.responses))):
            if not self.responses[row].ended:
                continue
            response, length = self.responses.pop(), self._lengths.pop()
            if row < len(self.responses):
                for layer in self._layers:
                    layer.move(len(self.responses), row, length)
                self.responses[row], self._lengths[row] = response, length
        if not self.responses:
            self._layers = []  # memory that nothing uses


def _grow(responses: Sequence[Response], logits: Float[Tensor, "n W"]) -> None:
    """Append the next token to each response."""
    best = logits.argmax(1)
    chosen = [
        best[row : row + 1] if each.is_plain else each.choose(logits[row : row + 1])
        for row, each in enumerate(responses)
    ]
    for response, token in zip(responses, torch.cat(chosen).tolist(), strict=True):
        response.add(token)
