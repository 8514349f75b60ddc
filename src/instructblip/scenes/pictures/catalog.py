"""The images of the packages, each with a name, a kind and a style.

A style is who drew an image: the emoji sets ``google``, ``twitter``, ``openmoji`` and ``fluent``,
and ``tux``, Tux Paint's stamps, mostly photos. An image without a short English name or without a
kind is left out.
"""

import io
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from instructblip.scenes.pictures.packages import PACKAGES, missing

SIDE = 224
"""Pixels of a side of an image."""

EMOJI = {
    "google": ("package/img/google/64", ".png"),
    "twitter": ("package/img/twitter/64", ".png"),
    "openmoji": ("package/color/svg", ".svg"),
    "fluent": ("package/assets", ".webp"),
}
"""The folder of each set of emoji in its package, and the suffix of its files."""
STAMPS = "usr/share/tuxpaint/stamps"
_KINDS: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "kinds.yaml").read_text(encoding="utf-8")
)
NO_ARTICLE = frozenset(_KINDS["no_article"])


@dataclass(frozen=True, slots=True)
class Picture:
    """One image: its file, and what it shows. ``photo`` is false for drawings."""

    path: Path
    style: str
    name: str
    kind: str
    photo: bool = False

    @property
    def head(self) -> str:
        """The last word of the name: a "red apple" and a "green apple" are both an apple."""
        return self.name.split()[-1]


def read_catalog(packages: Path) -> list[Picture]:
    """Every usable image below ``packages``, in a fixed order.

    Raises FileNotFoundError where a package is missing, ModuleNotFoundError without ``resvg_py``,
    each with the command that installs it.
    """
    if absent := missing(packages):
        names = ", ".join(PACKAGES[key].name for key in absent)
        raise FileNotFoundError(
            f"{packages} does not hold {names}; "
            f"`instructblip pictures fetch --packages {packages}` installs what is missing"
        )
    if find_spec("resvg_py") is None:
        raise ModuleNotFoundError(
            "resvg_py is missing, which draws OpenMoji's SVG files: pip install "
            "'instructblip[pictures]'"
        )
    return [*_emoji(packages), *_stamps(packages / "tux" / STAMPS)]


def _emoji(packages: Path) -> list[Picture]:
    english = packages / "emojibase" / "package" / "en"
    groups = json.loads((english / "messages.json").read_text(encoding="utf-8"))["subgroups"]
    kinds = {group["order"]: _KINDS["emoji"].get(group["key"]) for group in groups}
    pictures = []
    for record in json.loads((english / "data.json").read_text(encoding="utf-8")):
        name, kind = noun(record["label"]), kinds.get(record.get("subgroup"))
        if name is None or kind is None or name == kind:
            continue
        code = record["hexcode"].lower()
        stems = [code, f"{code}-fe0f", code.removesuffix("-fe0f")]
        stems += [stem.upper() for stem in stems]
        for style, (folder, suffix) in EMOJI.items():
            files = (packages / style / folder / f"{stem}{suffix}" for stem in stems)
            if path := next((file for file in files if file.is_file()), None):
                pictures.append(Picture(path, style, name, kind))
    return pictures


def _stamps(folder: Path) -> list[Picture]:
    pictures = []
    for text in sorted(folder.rglob("*.txt")):
        path = text.with_suffix(".png")
        parts = text.relative_to(folder).parts[:-1]
        kind = _KINDS["tux"].get("/".join(parts[:2])) or _KINDS["tux"].get(parts[0])
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        sentence = lines[0].strip() if lines else ""
        # A stamp is described by a whole sentence; only "A badger." is a name.
        named = re.fullmatch(r"(?:An?|The|Some) ([^.!?,;:—]+)[.!]?", sentence)
        name = noun(named[1]) if named else None
        if kind and name and name != kind and path.is_file():
            drawn = any(part in ("cartoon", "toys", "plastic") for part in parts)
            pictures.append(Picture(path, "tux", name, kind, photo=not drawn))
    return pictures


def noun(text: str) -> str | None:
    """``text`` as a name of one to three plain words, or None where it is none."""
    name = text.replace("’", "'").strip().removesuffix(" face")
    if len(name.split()) > 3 or len(name) > 24 or not re.fullmatch(r"[a-z][a-z' -]*", name):
        return None
    return name


def open_cut(path: Path) -> Image.Image:
    """The image, RGBA, cropped to what is not transparent."""
    with Image.open(_drawn(path) if path.suffix == ".svg" else path) as image:
        cut = image.convert("RGBA")
    box = cut.getchannel("A").point([255 * (value > 16) for value in range(256)]).getbbox()
    return cut.crop(box) if box else cut


def _drawn(path: Path) -> io.BytesIO:
    """An SVG file as a PNG of ``SIDE`` pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=SIDE, skip_system_fonts=True)
    return io.BytesIO(png)


def place(page: Image.Image, cut: Image.Image, left: int, top: int, side: int) -> None:
    """Put ``cut`` into the middle of a square of ``side`` pixels of ``page``."""
    scale = side / max(cut.size)
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    small = cut.resize(size, Image.Resampling.BICUBIC)
    page.paste(small, (left + (side - size[0]) // 2, top + (side - size[1]) // 2), small)


def single(picture: Picture) -> Image.Image:
    """The image alone on white, ``SIDE`` x ``SIDE``."""
    page = Image.new("RGB", (SIDE, SIDE), "white")
    margin = SIDE // 14
    place(page, open_cut(picture.path), margin, margin, SIDE - 2 * margin)
    return page
