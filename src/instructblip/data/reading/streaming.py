"""Streams a JSON file: one element of a large array or object at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from instructblip.core.files import unique_keys
from instructblip.data.reading.opened import open_text

CHUNK = 1 << 20
MAX_VALUE = 1 << 26
"""Characters of one element; a longer one is an error, so memory is bounded."""


def stream_values(path: Path, *fields: str) -> Iterator[tuple[str, Any]]:
    """Yields (key, element) of the array or object at ``fields`` of the JSON file ``path``.

    ``stream_values(p, "data", "dialogs")`` reads ``{"data": {"dialogs": [...]}}``. The key of an
    array's element is its index. Raises ValueError with file, record and line for text that is not
    JSON (a truncated download, NaN) and for a missing field.
    """
    with _scan(path) as scanner:
        yield from scanner.walk(fields)


def has_field(path: Path, name: str) -> bool:
    """Whether the object at the top of the JSON file ``path`` has the field ``name``."""
    with _scan(path) as scanner:
        if scanner.peek() != "{":
            return False
        for key in scanner.fields():
            if key == name:
                return True
            scanner.skip()
        return False


def is_list(path: Path) -> bool:
    """Whether the JSON file ``path`` holds an array: LAVIS rewrites many owners' objects so."""
    with _scan(path) as scanner:
        return scanner.peek() == "["


@contextmanager
def _scan(path: Path) -> "Iterator[_Scanner]":
    with open_text(path) as file:
        scanner = _Scanner(path, file)
        try:
            yield scanner
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path.name}:{scanner.record}: is not UTF-8 ({error.reason})"
            ) from None


def refuse_constant(constant: str) -> NoReturn:
    """For ``json``: NaN and Infinity are errors."""
    raise ValueError(f"{constant} is not a value of JSON")


class _Scanner:
    """A position in a file, and a buffer of as much text as one element needs."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.buffer, self.position, self.ended = "", 0, False
        self.line = 1
        self.decoder = json.JSONDecoder(
            parse_constant=refuse_constant, object_pairs_hook=unique_keys
        )
        self.record = "start of file"

    def walk(self, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for depth, name in enumerate(fields):
            if self.peek() != "{":
                self.fail(f"expected an object with the field '{name}'")
            for key in self.fields():
                if key == name:
                    break
                self.skip()
            else:
                self.fail(f"field '{'.'.join(fields[: depth + 1])}' is missing")
        if self.peek() not in ("[", "{"):
            self.fail("expected an array or an object")
        yield from self.elements()
        if not fields and (more := self.peek()):
            self.fail(f"'{more}' follows the end of the value; expected one array or object")

    def elements(self) -> Iterator[tuple[str, Any]]:
        is_object = self.peek() == "{"
        for key in self.fields() if is_object else map(str, self.positions("[", "]")):
            self.record = f"record {key}"
            yield key, self.value()

    def fields(self) -> Iterator[str]:
        """The names of an object's fields; the caller reads one value after each."""
        for _ in self.positions("{", "}"):
            if self.peek() != '"':
                self.fail("expected a field name in quotes")
            key = self.value()
            self.take(":")
            yield key

    def positions(self, start: str, end: str) -> Iterator[int]:
        """0, 1, 2, ... at the beginning of each element between two brackets."""
        self.take(start)
        index = 0
        while self.peek() != end:
            if index:
                self.take(",")
            yield index
            index += 1
        self.take(end)

    def skip(self) -> None:
        if self.peek() in ("[", "{"):
            for _ in self.elements():
                pass
        else:
            self.value()

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
                # A number at the end of the buffer may continue in the next chunk.
                if end < len(self.buffer) or self.ended:
                    self.position = end
                    return value
            except ValueError as error:
                if self.ended or not isinstance(error, json.JSONDecodeError):
                    self.fail(str(error))
            except RecursionError:
                self.fail("the value is nested too deeply")
            self.fill()

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            while self.position < len(self.buffer):
                if self.buffer[self.position] not in " \t\r\n":
                    return self.buffer[self.position]
                self.position += 1
            if self.ended:
                return ""
            self.fill()

    def take(self, expected: str) -> None:
        got = self.peek()
        if got != expected:
            self.fail(f"expected '{expected}', got '{got}'" if got else "the file ends too early")
        self.position += 1

    def fill(self) -> None:
        rest = len(self.buffer) - self.position
        if rest > MAX_VALUE:
            self.fail(f"one value has more than {MAX_VALUE} characters, or is not closed")
        self.line += self.buffer.count("\n", 0, self.position)
        # Doubling the buffer keeps repeated attempts linear in the length of the text.
        more = self.file.read(max(CHUNK, rest))
        self.buffer, self.position = self.buffer[self.position :] + more, 0
        self.ended = not more

    def fail(self, reason: str) -> NoReturn:
        line = self.line + self.buffer.count("\n", 0, self.position)
        raise ValueError(
            f"{self.path.name}:{self.record} (line {line}): not readable as JSON: {reason}. "
            "Download the file again, or repair it there"
        )
