"""Token ids that come one by one -> pieces of text that never have to be taken back."""

from collections.abc import Collection
from typing import Protocol


class Decoder(Protocol):
    """What turns ids into text (``Tokens``)."""

    def decode(self, ids: list[int]) -> str: ...


class TextStream:
    """The text of an answer, piece by piece: the pieces joined are ``decode`` of all ids.

    A piece waits for the next token, which may still change it: the bytes of a character come in
    several tokens, and a tokenizer may put or drop a space depending on what follows. ``ends`` are
    the end tokens; what comes after one is padding.
    """

    def __init__(self, tokens: Decoder, ends: Collection[int]) -> None:
        self.tokens, self.ends = tokens, ends
        self.ids: list[int] = []
        self.given = ""
        self.ended = False

    def add(self, token: int) -> str:
        """What the newest token makes certain: often nothing."""
        self.ended = self.ended or token in self.ends
        if self.ended:
            return ""
        settled = self.tokens.decode(self.ids)
        self.ids.append(token)
        if settled.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        certain = settled if self.tokens.decode(self.ids).startswith(settled) else self.given
        return self._give(certain)

    def rest(self, ids: list[int]) -> str:
        """The remainder, once the answer's ids are all known."""
        return self._give(self.tokens.decode(ids))

    def _give(self, text: str) -> str:
        piece, self.given = text[len(self.given) :], text
        return piece
