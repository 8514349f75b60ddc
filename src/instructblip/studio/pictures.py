"""The images of a studio as the page shows them: made by the server's decoders, kept in memory."""

import io
from collections.abc import Sequence
from typing import Literal

from PIL import Image
from starlette.concurrency import run_in_threadpool

from instructblip.core.recent import Recent
from instructblip.data.prepared.near import Look, look_of
from instructblip.serving.decoder import BadImage
from instructblip.serving.service import Service
from instructblip.studio.project import SUFFIXES, Project

Size = Literal["small", "large"]
_SIDES: dict[Size, int] = {"small": 360, "large": 1280}
_SHOWN = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}
"""Suffixes of images that the server decodes; `tune` reads more."""
_KEPT_BYTES = 96 << 20


class Pictures:
    """Thumbnails and looks of the images of a project, by their files as they are now."""

    def __init__(self, project: Project, service: Service) -> None:
        self.project, self.service = project, service
        self._kept: Recent[memoryview] = Recent(_KEPT_BYTES)
        self._looks: dict[tuple[str, int, int], Look | str] = {}

    async def view(self, name: str, size: Size) -> bytes:
        """A JPEG of the image. Raises BadImage, FileNotFoundError."""
        key = (*self._key(name), size)
        if (kept := self._kept.get(key)) is None:
            image = await self._decode(name)
            kept = memoryview(await run_in_threadpool(_jpeg, image, _SIDES[size]))
            if self._kept.get(key) is None:
                self._kept.put(key, kept)
        return bytes(kept)

    async def look(self, names: Sequence[str]) -> bool:
        """Decode one of the images that was not decoded yet; False if there is none."""
        for name in names:
            try:
                key = self._key(name)
                if key not in self._looks and is_shown(name):
                    self._looks[key] = look_of(await self._decode(name))
                    return True
            except BadImage as error:
                self._looks[key] = str(error).removeprefix(f"{name}: ")
                return True
            except OSError:  # it was removed meanwhile
                continue
        return False

    def looks(self, names: Sequence[str]) -> tuple[dict[str, Look], dict[str, str]]:
        """By name: the looks known so far, and why images cannot be read."""
        looks, unreadable = {}, {}
        for name in names:
            try:
                known = self._looks.get(self._key(name))
            except OSError:
                continue
            if isinstance(known, Look):
                looks[name] = known
            elif known is not None:
                unreadable[name] = known
        return looks, unreadable

    def _key(self, name: str) -> tuple[str, int, int]:
        status = self.project.path_of(name).stat()
        return name, status.st_mtime_ns, status.st_size

    def read(self, name: str) -> bytes:
        """The file of the image. Raises BadImage where it is too large, FileNotFoundError."""
        path, limit = self.project.path_of(name), self.service.config.max_picture_bytes
        if path.stat().st_size > limit:
            raise BadImage(f"{name}: more than {limit} bytes", 413)
        return path.read_bytes()

    async def _decode(self, name: str) -> Image.Image:
        return await self.decode(await run_in_threadpool(self.read, name), name)

    async def decode(self, data: bytes, where: str) -> Image.Image:
        """The image in ``data``. Raises BadImage."""
        service = self.service
        try:
            return await service.decoders.decode(
                data, service.config.max_pixels, where, "auto", service.deadline
            )
        except TimeoutError:
            raise BadImage(f"{where}: it takes too long to read", 504) from None


def is_shown(name: str) -> bool:
    """Whether the page can show an image of that name."""
    return any(name.lower().endswith(suffix) for suffix in _SHOWN)


def _jpeg(image: Image.Image, side: int) -> bytes:
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return data.getvalue()
