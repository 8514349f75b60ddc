"""Refuses image files that would cost a decoder far more than images of their size.

A few bytes can ask for minutes: a JPEG of 100 kB may have 3,000 scans, each of which visits every
pixel, and Pillow copies all Exif segments, or all comments of a GIF, again for each that follows.
The parts of a file are counted before Pillow reads it. What stays within the limits costs a core
at most about a second more than an ordinary image; counting takes at most 2 % of the time of
decoding a JPEG or a PNG, and a tenth of that of a GIF.
"""

import re
from collections.abc import Callable

import numpy as np

MAX_SCANS = 100
"""Scans of a JPEG. Encoders write at most about 20."""
MAX_SCANNED = 1 << 30
"""Pixels of a JPEG times its scans, at a nanosecond each."""
MAX_EXIF_BYTES = 1 << 17
"""Bytes of Exif, of which a JPEG segment holds half. Entries may overlap: Pillow copies up to 0.4
GB from these."""
MAX_PARTS = 1000
"""Segments of a JPEG before its first scan; chunks of a PNG beside one for each KiB, and blocks of
a GIF beside one for each 32 bytes."""
MAX_NOTE_BYTES = 1 << 16
"""Bytes of what Pillow reads slowly: comments of a GIF, tables of a JPEG, bytes between parts."""
MAX_RUN_BYTES = 1 << 20
"""Bytes of a BMP with run lengths, which Pillow decodes in Python."""


def check_cost(data: bytes) -> None:
    """Raises ValueError for an image file with more parts than an image of its size needs."""
    for start, check in _CHECKS.items():
        if data.startswith(start):
            check(data)


def check_exif(exif: bytes | str | None) -> None:
    """Raises ValueError for more Exif than ``MAX_EXIF_BYTES``, which may be written in hex."""
    size = len(exif or b"") // (2 if isinstance(exif, str) else 1)
    _limit(size, MAX_EXIF_BYTES, "bytes of Exif")


def _limit(number: int, at_most: int, what: str) -> None:
    if number > at_most:
        raise ValueError(f"{number} {what}; expected at most {at_most}")


_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_WITHOUT_LENGTH = frozenset((0x01, 0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)))
"""Markers after which libjpeg or Pillow reads no segment."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _check_jpeg(data: bytes) -> None:
    at, segments, between, tables, exif, pixels, scans = 2, 0, 0, 0, 0, 1, 0
    while found := _MARKER.search(data, at):
        kind = data[found.end() - 1]
        if scans and kind == 0xD9:
            break  # what follows is another image, or no image
        if not scans:
            segments, between = segments + 1, between + found.end() - 2 - at
            _limit(segments, MAX_PARTS, "segments before its first scan")
            _limit(between, MAX_NOTE_BYTES, "bytes between its segments")
        at = found.end()
        if kind in _WITHOUT_LENGTH:
            continue
        size = max(2, int.from_bytes(data[at : at + 2], "big"))
        if kind == 0xDA:
            scans += 1
            _limit(scans, MAX_SCANS, "scans")
            _limit(scans * pixels, MAX_SCANNED, "pixels in all its scans")
            if scans == 1 and _scan_marks(data) <= min(MAX_SCANS, MAX_SCANNED // pixels):
                break  # however the rest is read, it has no more scans
        elif kind in _FRAMES:
            height, width = data[at + 3 : at + 5], data[at + 5 : at + 7]
            pixels = max(pixels, int.from_bytes(height, "big") * int.from_bytes(width, "big"))
        if not scans and kind < 0xE0:
            tables += size
            _limit(tables, MAX_NOTE_BYTES, "bytes of tables")
        if kind == 0xE1 and data.startswith(b"Exif", at + 2):
            exif += size
            _limit(exif, MAX_EXIF_BYTES, "bytes of Exif")
        at += size


def _scan_marks(data: bytes) -> int:
    """How often FF DA is in ``data``, in a tenth of the time of ``bytes.count``."""
    pairs = (np.frombuffer(data, "<u2", (len(data) - odd) // 2, odd) for odd in (0, 1))
    return sum(int(np.count_nonzero(part == 0xDAFF)) for part in pairs)


def _check_png(data: bytes) -> None:
    at, chunks, at_most = 8, 0, MAX_PARTS + len(data) // 1024
    while at < len(data):
        chunks += 1
        _limit(chunks, at_most, "chunks")
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _check_gif(data: bytes) -> None:
    """Counts the blocks up to the second frame: nobody reads more."""
    at, blocks, between, comments, frames = 13, 0, 0, 0, 0
    at += 3 << (data[10] & 7) + 1 if data[10:11] > b"\x7f" else 0
    while at < len(data) and frames < 2 and data[at] != 0x3B:
        kind = data[at]
        if kind == 0x2C:
            frames += 1
            flags = data[at + 9] if at + 9 < len(data) else 0
            at += 11 + (3 << (flags & 7) + 1 if flags & 128 else 0)
        elif kind == 0x21:
            at += 2
        else:
            at, between = at + 1, between + 1
            _limit(between, MAX_NOTE_BYTES, "bytes between its blocks")
            continue
        is_comment = kind == 0x21 and data[at - 1 : at] == b"\xfe"
        while at < len(data):
            size = data[at]
            at, blocks = at + 1 + size, blocks + 1
            comments += size + 1 if is_comment else 0
            _limit(comments, MAX_NOTE_BYTES, "bytes of comments")
            _limit(blocks, MAX_PARTS + at // 32, "blocks in its first frames")
            if not size:
                break


def _check_bmp(data: bytes) -> None:
    if int.from_bytes(data[30:34], "little") in (1, 2):
        _limit(len(data), MAX_RUN_BYTES, "bytes of run lengths")


_CHECKS: dict[bytes, Callable[[bytes], None]] = {
    b"\xff\xd8": _check_jpeg,
    b"\x89PNG\r\n\x1a\n": _check_png,
    b"GIF8": _check_gif,
    b"BM": _check_bmp,
}
