"""Data whose root is a URL (``s3://``, ``gs://``, ``https://``, ``zip://``, ...), fetched once.

fsspec fetches it; most protocols need their own package (s3fs, gcsfs, ...), which fsspec names
when it is missing.
"""

from pathlib import Path

import fsspec

from instructblip.core.files import replacing
from instructblip.core.progress import progress_bar
from instructblip.data.reading.records import image_name


def is_remote(root: str) -> bool:
    return "://" in root and not root.startswith("file:")


def fetch_tree(url: str, folder: Path) -> Path:
    """Copies all files below ``url`` to ``folder``, except those there with the same size.

    Raises ValueError for a protocol that is not installed and for a name that leaves ``folder``.
    """
    try:
        system, top = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"data root {url}: {error}") from None
    files = system.find(top, detail=True)
    if not files:
        raise FileNotFoundError(f"data root {url}: there is no file; check the address")
    with progress_bar(f"fetching {url}", "files") as advance:
        for i, (path, facts) in enumerate(files.items()):
            name = path.removeprefix(top).lstrip("/")
            target = folder / image_name(name, url)
            if not (target.is_file() and target.stat().st_size == facts.get("size")):
                with replacing(target, synced=False) as temporary:
                    system.get_file(path, str(temporary))
            advance(i + 1, len(files))
    return folder
