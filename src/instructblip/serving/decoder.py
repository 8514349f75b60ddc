"""The process that decodes images: ``python -m instructblip.serving.decoder``.

A file that Pillow cannot finish, or that crashes it, ends this process and not the server. It reads
requests from its input and writes answers to its output until the input ends; both are a line of
JSON and then bytes, never pickles: what hostile bytes make of this process cannot reach further. It
does without torch.
"""

import io
import json
import sys
import warnings
from typing import IO, Any

from PIL import Image

from instructblip.data.reading.cost import check_cost
from instructblip.data.reading.decode import MAX_SIDE, Window, decode_image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class BadImage(ValueError):
    """An image that is refused; ``status`` is the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def decode(data: bytes, max_pixels: int, where: str, window: Window = "auto") -> Image.Image:
    """The image in ``data`` as RGB. Raises BadImage.

    The header is read first: a small file can declare more pixels than there is memory.
    """
    too_large = BadImage(f"{where}: more than {max_pixels} pixels", 413)
    try:
        check_cost(data)
    except ValueError as error:
        raise BadImage(f"{where}: {error}; save the image again") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as header:
                pixels, side = header.width * header.height, max(header.size)
    except Image.DecompressionBombError:
        raise too_large from None
    except Exception:
        raise BadImage(f"{where}: not an image; expected one of {', '.join(FORMATS)}") from None
    if pixels > max_pixels:
        raise too_large
    if side > MAX_SIDE:
        raise BadImage(f"{where}: more than {MAX_SIDE} pixels a side", 413)
    try:
        return decode_image(data, where, window)
    except Exception:
        raise BadImage(f"{where}: the image is damaged or cut off") from None


def write_message(file: IO[bytes], head: dict[str, Any], data: bytes) -> None:
    """A line of JSON and the bytes."""
    file.write(json.dumps({**head, "bytes": len(data)}).encode() + b"\n")
    file.write(data)
    file.flush()


def read_message(file: IO[bytes], at_most: int) -> tuple[dict[str, Any], bytes]:
    """What ``write_message`` wrote. Raises EOFError if the file ends before it does, ValueError for
    another message or one of more than ``at_most`` bytes."""
    line = file.readline(1 << 12)
    if not line:
        raise EOFError
    head = json.loads(line)
    size = int(head["bytes"])
    if not 0 <= size <= at_most:
        raise ValueError(f"{size} bytes; expected at most {at_most}")
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return head, data


def main() -> None:
    """Answer the requests of ``decoders.Decoders`` until there are no more."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            head, data = read_message(requests, sys.maxsize)
        except EOFError:
            return
        window: Any = head["window"]
        try:
            if isinstance(window, list):  # JSON's form of the tuple
                window = tuple(window)
            image = decode(data, head["max_pixels"], head["where"], window)
        except BadImage as error:
            write_message(answers, {"refused": str(error)[:1000], "status": error.status}, b"")
        else:
            write_message(answers, {"size": image.size}, image.tobytes())


if __name__ == "__main__":
    main()
