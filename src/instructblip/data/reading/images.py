"""Image files -> RGB, without torch."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from instructblip.data.reading.decode import Window, decode_image, jpeg_pixels
from instructblip.data.reading.members import read_image, size_and_date
from instructblip.data.reading.records import image_name

MAX_FILE_BYTES = 1 << 28


def load_image(name: str | Path, root: Path | None = None, window: Window = "auto") -> Image.Image:
    """The image as RGB, rotated by its EXIF tag, transparency over white; of an animation the first
    frame, of a DICOM file the middle one.

    With ``root``, ``name`` must be a relative path below it, also of an image in a tar shard.
    Raises FileNotFoundError, or ValueError naming the file, for anything unreadable.
    """
    path = Path(name) if root is None else Path(root) / image_name(str(name), str(root))
    return decode_image(_file_bytes(path), str(path), window)


def load_pixels(path: str | Path, window: Window = "auto") -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of ``load_image``; with simplejpeg (extra ``fast``) faster ones of a JPEG."""
    data = _file_bytes(Path(path))
    pixels = jpeg_pixels(data)
    return np.array(decode_image(data, str(path), window)) if pixels is None else pixels


def _file_bytes(path: Path) -> bytes:
    try:
        if size_and_date(path)[0] > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES} bytes")
        return read_image(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {path} does not exist; check its name, and that all images are there"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"image {path}: cannot be read: {error}") from None
