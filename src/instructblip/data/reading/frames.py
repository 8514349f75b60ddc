"""Frames of a video file, with PyAV (the extra ``instructblip[video]``).

They are taken once, when the data is prepared, evenly spaced and in RGB, and kept as pictures.
"""

import os
import shutil
from pathlib import Path
from typing import Any

VIDEOS = (".mp4", ".avi", ".webm", ".mkv", ".mov")
QUALITY = 95


def extract_frames(video: Path, folder: Path, most: int) -> Path:
    """Writes at most ``most`` frames of ``video`` to ``folder``, unless they are there.

    Raises ValueError, naming the file, when PyAV is missing or the video cannot be decoded.
    """
    if folder.is_dir():
        return folder
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise ValueError(
            f"video {video}: reading video files needs PyAV: pip install 'instructblip[video]'; "
            f"or put its frames as pictures into {video.with_suffix('')}/"
        ) from None
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with av.open(str(video)) as container:
            count = sum(1 for _ in container.decode(video=0))
        wanted = set(evenly_spaced(count, most))
        with av.open(str(video)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i in wanted:
                    _save(frame, temporary / f"{i:06d}.jpg")
        if not count:
            raise ValueError(f"video {video} has no frame; download it again")
        temporary.replace(folder)
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"video {video}: cannot be decoded: {error}; download it again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count``, the middles of equal parts."""
    if count <= most:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


def _save(frame: Any, path: Path) -> None:
    frame.to_image().convert("RGB").save(path, quality=QUALITY)
