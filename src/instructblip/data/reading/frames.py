"""Frames of a video file, decoded with PyAV (the extra ``instructblip[video]``).

They are extracted once, when the data is prepared, and kept as RGB images.
"""

from pathlib import Path

from instructblip.core.files import replacing_directory
from instructblip.data.reading.opened import check_file

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov")
QUALITY = 95


def extract_frames(video: Path, folder: Path, max_frames: int) -> Path:
    """Writes at most ``max_frames`` evenly spaced frames to ``folder``, unless it exists.

    Raises ValueError, naming the file, when PyAV is missing or the video cannot be decoded.
    """
    if folder.is_dir():
        return folder
    check_file(video)
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise ValueError(
            f"video {video}: reading video files needs PyAV: pip install 'instructblip[video]'; "
            f"or put its frames as images into {video.with_suffix('')}/"
        ) from None
    try:
        with av.open(str(video)) as container:
            count = sum(1 for _ in container.decode(video=0))
        if not count:
            raise ValueError(f"video {video} has no frame; download it again")
        chosen = set(evenly_spaced(count, max_frames))
        with (
            replacing_directory(folder, synced=False) as temporary,
            av.open(str(video)) as container,
        ):
            for i, frame in enumerate(container.decode(video=0)):
                if i in chosen:
                    image = frame.to_image().convert("RGB")  # type: ignore[union-attr]
                    image.save(temporary / f"{i:06d}.jpg", quality=QUALITY)
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"video {video}: cannot be decoded: {error}; download it again") from None
    return folder


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """At most ``at_most`` indices below ``count``: the middles of equal parts."""
    if count <= at_most:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * at_most) for i in range(at_most)]
