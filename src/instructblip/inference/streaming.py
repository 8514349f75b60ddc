"""Token ids that arrive one by one -> pieces of text that are final."""

import threading
from collections.abc import Callable, Collection, Iterator
from queue import Queue
from typing import Protocol, runtime_checkable

from instructblip.model.language.generate import OnTokens


@runtime_checkable
class Decoder(Protocol):
    """Turns ids into text (``Tokens``)."""

    def decode(self, ids: list[int]) -> str: ...


class TextStream:
    """The text of an answer, piece by piece: the pieces joined are ``decode`` of all ids.

    A piece waits for the next token, which may still change it: a character may be the bytes of
    several tokens, and a tokenizer may add or drop a space depending on what follows. ``ends`` are
    the end tokens; whatever follows one is padding.
    """

    def __init__(self, tokens: Decoder, ends: Collection[int]) -> None:
        self.tokens, self.ends = tokens, ends
        self.ids: list[int] = []
        self.given = ""
        self.ended = False

    def add(self, token: int) -> str:
        """The text that the newest token makes final: often none."""
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
        """The remaining text, once all ids of the answer are known."""
        return self._give(self.tokens.decode(ids))

    def _give(self, text: str) -> str:
        piece, self.given = text[len(self.given) :], text
        return piece


def stream_text(text: TextStream, respond: Callable[[OnTokens], list[int]]) -> Iterator[str]:
    """The pieces of one answer while ``respond`` makes it, in another thread.

    ``respond`` calls back with each new token and returns all ids at the end; closing the iterator
    stops it at the next token.
    """
    pieces: Queue[str | Exception | None] = Queue()
    stopped = threading.Event()

    def on_tokens(tokens: list[int]) -> None:
        if stopped.is_set():
            raise InterruptedError
        pieces.put(text.add(tokens[0]))

    def run() -> None:
        try:
            pieces.put(text.rest(respond(on_tokens)))
            pieces.put(None)
        except Exception as error:
            pieces.put(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            if piece:
                yield piece
    finally:
        stopped.set()
        worker.join()
