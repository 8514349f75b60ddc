"""What the program prints, without anything that a terminal would obey.

Names of files, columns and classes, texts of data sets and answers come from others, and may hold
escape sequences that clear a screen, rename a window, or turn text around. `escape_output` stands
between the command line and both streams. What is drawn with rich goes through
`progress.Terminal`.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any

# C0 but tab and newline, DEL, C1; what turns text around (bidi); lone surrogates, of which Python
# makes the bytes of a name that is not UTF-8, and which no stream can encode.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    """The text with each control character as Python writes it: ``\\x1b``, ``\\u202e``."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class Escaping:
    """A text stream that escapes what is written to it."""

    def __init__(self, stream: Any, returns: bool) -> None:
        self.stream = stream
        self._returns = returns

    def write(self, text: str) -> int:
        # A progress bar of a library returns to the beginning of its line in each write.
        kept = "\r" if self._returns and text.startswith("\r") else ""
        self.stream.write(kept + escape(text[len(kept) :]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def escape_output() -> None:
    """From now on, ``sys.stdout`` and ``sys.stderr`` escape what is written to them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Escaping):
            setattr(sys, name, Escaping(stream, returns=name == "stderr"))
