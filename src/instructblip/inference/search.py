"""A folder of images as a search engine: the most similar of stored embeddings, then the best
matching of these.

Embeddings are stored by the sha256 of an image's bytes, so that an image that is new or changed is
embedded, and one that was moved is not embedded again.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from PIL import Image, ImageDraw
from torch import Tensor

from instructblip.core.files import cache_folder, replacing, write_text
from instructblip.core.pages import data_url, page_template
from instructblip.data.features import Features, FeatureStore, fill
from instructblip.data.prepared.images import FACTS_FILE, update_facts
from instructblip.data.reading.images import load_image
from instructblip.data.reading.records import IMAGE_SUFFIXES
from instructblip.inference.embedder import Embedder
from instructblip.inference.inputs import ImageInput

MOST_IMAGES = 2_000_000
"""In a folder: their names and places have to fit into memory."""
BATCH = 64
"""Images that are embedded at a time."""
BLOCK = 1 << 18
"""Numbers of stored embeddings that are compared at a time: they fit into a processor's cache."""
SIDE = 224
"""Pixels of a thumbnail."""


@dataclass(frozen=True, slots=True)
class Found:
    """An image with its similarity, -1 to 1, and where the Q-Former read both the probability that
    the text fits it."""

    path: Path
    similarity: float
    match: float | None = None

    @property
    def scores(self) -> str:
        """Both scores as text."""
        matched = "" if self.match is None else f"match {self.match:6.1%}  "
        return f"{matched}similarity {self.similarity:.3f}"


def similarities(
    stored: Sequence[Shaped[Tensor, "_ Q E"]], wanted: Float[Tensor, "*Q E"]
) -> Float[Tensor, " N"]:
    """Of all N stored images in turn: with a text [E] the cosine of the best query; with an image
    [Q, E] the mean of the cosines of equal queries."""
    scores = []
    for part in stored:
        size = max(1, BLOCK // part[0].numel()) if len(part) else 1
        for block in part.split(size):
            values = block.to(torch.float32)
            if wanted.ndim == 1:
                scores.append((values @ wanted).amax(1))
            else:
                scores.append(values.flatten(1) @ wanted.flatten() / len(wanted))
    return torch.cat(scores)


class Gallery:
    """Images with stored embeddings, ``paths[i]`` with the one of ``keys[i]`` in the store."""

    def __init__(
        self, embedder: Embedder, paths: Sequence[Path], keys: Sequence[str], store: FeatureStore
    ) -> None:
        self.embedder = embedder
        self.paths = paths
        self.stored = store.shards()
        self.rows = torch.tensor(store.rows(keys), dtype=torch.long)

    def find(self, text: str, limit: int = 10, rerank: int = 32) -> list[Found]:
        """The ``limit`` images that fit a text best, best first.

        The Q-Former reads the ``rerank`` most similar ones together with the text; they are
        ordered by their matching logit plus their similarity, as in BLIP-2's evaluation, and stand
        before the others. With heads that were not trained to match similarity alone counts.
        """
        rerank = rerank if self.embedder.retriever.can_match else 0
        scores = self._scores(self.embedder.embed(texts=text)[0])
        top = scores.topk(min(max(limit, rerank), len(scores))).indices.tolist()
        found = [Found(self.paths[i], float(scores[i])) for i in top]
        if near := found[:rerank]:
            features = torch.cat(
                [
                    self.embedder.features([each.path for each in near[start : start + BATCH]])
                    for start in range(0, len(near), BATCH)
                ]
            )
            index = torch.arange(len(near))
            logits = self.embedder.match_features(features, [text] * len(near), index)
            fits = logits.softmax(1)[:, 1].tolist()
            total = logits[:, 1] + torch.tensor([each.similarity for each in near])
            found[:rerank] = [
                Found(near[i].path, near[i].similarity, fits[i])
                for i in total.argsort(descending=True).tolist()
            ]
        return found[:limit]

    def like(self, image: ImageInput, limit: int = 10) -> list[Found]:
        """The ``limit`` images that are most similar to an image."""
        scores = self._scores(self.embedder.embed(images=image)[0])
        top = scores.topk(min(limit, len(scores))).indices.tolist()
        return [Found(self.paths[i], float(scores[i])) for i in top]

    def _scores(self, wanted: Float[Tensor, "*Q E"]) -> Float[Tensor, " N"]:
        return similarities(self.stored, wanted)[self.rows]


def open_gallery(embedder: Embedder, folder: Path, cache: Path | None = None) -> Gallery:
    """The images below ``folder``, whose embeddings are computed where they are not in ``cache``
    (None: the user's cache).

    Images that do not open are left out with a printed line. Raises FileNotFoundError or ValueError
    for a folder without images.
    """
    names = _names(folder)
    place = cache or cache_folder() / "search" / _hash(str(folder.resolve()))
    place.mkdir(parents=True, exist_ok=True)
    facts = update_facts(place / FACTS_FILE, dict.fromkeys(names), folder, "images")
    broken = [name for name in names if facts[name].fault]
    if broken:
        print(f"{len(broken)} images are left out; {broken[0]} {facts[broken[0]].fault}")
    names = [name for name in names if not facts[name].fault]
    if not names:
        raise ValueError(f"{folder}: no image opens")
    digests = {str(folder / name): facts[name].sha256.hex() for name in names}
    features = Features(FeatureStore(place / embedder.fingerprint, "bf16"), digests)

    def encode(pixels: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N Q E"]:
        with torch.no_grad():
            encoded = embedder.retriever.encode_image(pixels.to(embedder.device))
        return embedder.embed_features(encoded)

    workers = min(8, (os.cpu_count() or 1) - 1)
    fill(features, embedder.transform.for_features(), encode, BATCH, workers)
    paths = [folder / name for name in names]
    keys = [features.key(str(path), 0) for path in paths]
    return Gallery(embedder, paths, keys, features.store)


def _names(folder: Path) -> list[str]:
    """The images below a folder, by their paths relative to it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of images")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not names:
        raise ValueError(f"{folder} has no images; expected files such as .jpg or .png")
    if len(names) > MOST_IMAGES:
        raise ValueError(
            f"{folder} has {len(names):,} images, and a search takes at most {MOST_IMAGES:,}: "
            "search a folder below it"
        )
    return names


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def write_page(file: Path, title: str, found: Sequence[Found]) -> None:
    """Write the images with their scores as a page (.html), or as one image (.png, .jpg)."""
    if file.suffix.lower() == ".html":
        template = page_template(Path(__file__).with_suffix(".html.j2"))
        shown = [(each, data_url(thumbnail(each.path), "JPEG", quality=88)) for each in found]
        write_text(file, template.render(title=title, shown=shown))
        return
    columns = min(5, len(found))
    rows = -(-len(found) // columns)
    cell, gap, line = SIDE, 12, 16
    height = cell + line + gap
    sheet = Image.new(
        "RGB", (columns * (cell + gap) + gap, rows * height + gap + 2 * line), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap // 2), title[:200], fill="black")
    for number, each in enumerate(found):
        left = gap + number % columns * (cell + gap)
        top = gap + line + number // columns * height
        sheet.paste(thumbnail(each.path), (left, top))
        draw.text((left, top + cell + 2), f"{number + 1}  {each.scores}", fill="black")
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        sheet.save(temporary, "PNG" if file.suffix.lower() == ".png" else "JPEG")


def thumbnail(path: Path) -> Image.Image:
    """The image on a square, small ones enlarged."""
    image = load_image(path)
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    square = Image.new("RGB", (SIDE, SIDE), "white")
    left, top = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    square.paste(image.resize(size, Image.Resampling.LANCZOS), (left, top))
    return square
