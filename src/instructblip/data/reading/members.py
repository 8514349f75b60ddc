"""Images that stay in tar shards: ``00000.tar/1536+20480`` is 20,480 bytes from byte 1,536 on.

Such a name is written in place of a path below the image root. Every function here also takes the
path of an image file.
"""

import os
import re
from pathlib import Path

from instructblip.data.reading.opened import is_special

_MEMBER = re.compile(r"(.+\.tar)/(\d+)\+(\d+)", re.DOTALL | re.IGNORECASE)


def member_name(shard: str, offset: int, length: int) -> str:
    """The name of ``length`` bytes of a shard."""
    return f"{shard}/{offset}+{length}"


def file_of(name: str) -> str:
    """The file that an image is read from: its shard, or ``name`` itself."""
    member = _MEMBER.fullmatch(name)
    return member[1] if member else name


def size_and_date(path: Path) -> tuple[int, int]:
    """Bytes of an image, and when its file was changed in nanoseconds; OSError if it is absent or
    is no file."""
    member = _MEMBER.fullmatch(str(path))
    status = (Path(member[1]) if member else path).stat()
    if is_special(status):
        raise OSError("is a pipe, a device or a socket; expected a file")
    return int(member[3]) if member else status.st_size, status.st_mtime_ns


def read_image(path: Path) -> bytes:
    """The bytes of an image; OSError if it is absent or its shard is too short."""
    member = _MEMBER.fullmatch(str(path))
    if member is None:
        return path.read_bytes()
    offset, length = int(member[2]), int(member[3])
    file = os.open(member[1], os.O_RDONLY)
    try:
        data = os.pread(file, length, offset)
    finally:
        os.close(file)
    if len(data) < length:
        raise OSError(f"the shard ends {length - len(data)} bytes early; download it again")
    return data
