"""Embeddings of images and texts, and whether they fit each other, by the heads of retrieval."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from instructblip.core import distributed
from instructblip.data.images import ImageTransform
from instructblip.data.reading.decode import to_rgb
from instructblip.data.samples import pad
from instructblip.data.tokens import text_reader
from instructblip.inference.fingerprint import fingerprint
from instructblip.inference.inputs import ImageInput
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.checkpoints.transformers import TEXT_BRANCH_FILE
from instructblip.model.retrieval import Retriever, similarity
from instructblip.model.spread import answering_device

T = TypeVar("T")
PAIRS = 64
"""Images, texts or pairs that the Q-Former reads at a time."""
AFTER = 1000.0
"""How far below the matched ones the scores of all others are."""
MAX_CHARACTERS = 4096
"""Of a text; the rest is not read."""


class Embedder:
    """A retriever with its tokenizer and its image transform. It needs no language model.

    ``directory`` has the tokenizer; ``fingerprint`` changes whenever an embedding could.
    """

    def __init__(self, retriever: Retriever, directory: Path, transform: ImageTransform) -> None:
        self.retriever = retriever
        self.transform = transform
        longest = retriever.config.qformer.max_position_embeddings
        self.read_text = text_reader(directory, longest)
        digest = hashlib.sha256(fingerprint(directory, True, transform.window).encode())
        if (directory / TEXT_BRANCH_FILE).is_file():
            digest.update((directory / TEXT_BRANCH_FILE).read_bytes())
        digest.update(str(retriever.vision_model.dtype).encode())
        self.fingerprint = digest.hexdigest()[:16]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
    ) -> "Embedder":
        """Load a model or run directory with heads, or a Blip2ForImageTextRetrieval of
        transformers, without a language model.

        ``dtype`` is the type of the image encoder; None is fp32 on a CPU and bf16 elsewhere. Raises
        ValueError for a model without heads.
        """
        directory = model_directory(path)
        home = distributed.resolve_device(answering_device() if device == "auto" else device)
        retriever = Retriever.from_pretrained(directory).to(home)
        encoder = torch.float32 if home.type == "cpu" else torch.bfloat16
        for part in retriever.vision_model.tower:
            part.to(dtype or encoder)
        return cls(retriever, directory, ImageTransform.from_pretrained(directory))

    @property
    def device(self) -> torch.device:
        """Where the retriever is."""
        return self.retriever.query_tokens.device

    @torch.no_grad()
    def embed(
        self,
        images: ImageInput | Sequence[ImageInput | Tensor] | None = None,
        texts: str | Sequence[str] | None = None,
        instruction: str | None = None,
    ) -> Tensor:
        """Unit vectors of images [N, Q, E], one of each query, or of texts [N, E]; images may be
        pixels [3, S, S].

        The similarity of an image and a text is the cosine of the best query. With an
        ``instruction`` the queries read it beside the image and look for what it asks. Raises
        ValueError unless either images or texts are given.
        """
        if (images is None) == (texts is None):
            raise ValueError("give either images or texts to embed")
        if texts is not None:
            if instruction is not None:
                raise ValueError("an instruction goes with images; a text is embedded as it is")
            parts = [self.retriever.embed_texts(*self.ids(part)) for part in _parts(texts)]
        else:
            assert images is not None
            parts = [
                self.embed_features(self.features(part), instruction) for part in _parts(images)
            ]
        if not parts:
            raise ValueError("there is nothing to embed: the list is empty")
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def match(
        self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str]
    ) -> Float[Tensor, " N"]:
        """The probability that each text fits its image, which the Q-Former reads together.

        One image goes with all texts of a list, and one text with all images. Raises ValueError for
        counts that do not match.
        """
        given, wanted = _listed(images), _listed(texts)
        if len(given) != len(wanted) and 1 not in (len(given), len(wanted)):
            raise ValueError(
                f"got {len(given)} images and {len(wanted)} texts; expected as many of one as of "
                "the other, or one of either"
            )
        features = torch.cat([self.features(part) for part in _parts(given)])
        count = max(len(given), len(wanted))
        index = torch.arange(count) if len(given) > 1 else torch.zeros(count, dtype=torch.long)
        return self.match_features(features, wanted * (count // len(wanted)), index).softmax(1)[
            :, 1
        ]

    @torch.no_grad()
    def match_features(
        self, features: Float[Tensor, "N P V"], texts: Sequence[str], index: Int[Tensor, " M"]
    ) -> Float[Tensor, "M 2"]:
        """Logits on the CPU that each text does not fit and that it fits image ``index[i]``.

        Raises ValueError for heads that were not trained to match.
        """
        if not self.retriever.can_match:
            raise ValueError(
                "the heads of the stage retrieval embed and do not match: compare embeddings, or "
                "take a model of `instructblip pretrain --stage 1`"
            )
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        logits = torch.empty(len(texts), 2)
        for start in range(0, len(order), PAIRS):
            rows = order[start : start + PAIRS]
            ids, mask = self.ids([texts[i] for i in rows])
            shown = index[rows].to(self.device)
            logits[rows] = self.retriever.match(features, ids, mask, shown).float().cpu()
        return logits

    @torch.no_grad()
    def compare(
        self, images: Sequence[ImageInput], texts: Sequence[str], rerank: int
    ) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
        """Scores by which each image chooses among the texts, and each text among the images.

        A score is the similarity plus the matching logit of the ``rerank`` most similar; all others
        come after them, as in BLIP-2's evaluation. Without a head for matching no one is matched.
        """
        rerank = rerank if self.retriever.can_match else 0
        parts = [self.features(part).cpu() for part in _parts(images)]
        vectors = [self.embed_features(part.to(self.device)).cpu() for part in parts]
        features, embedded = torch.cat(parts), self.embed(texts=texts)
        base = torch.cat([similarity(part, embedded) for part in vectors])
        near_texts = base.topk(min(rerank, base.shape[1]), 1).indices
        near_images = base.topk(min(rerank, len(base)), 0).indices
        to_text = torch.zeros_like(base, dtype=torch.bool).scatter(1, near_texts, True)
        to_image = torch.zeros_like(base, dtype=torch.bool).scatter(0, near_images, True)
        matched = base.clone()
        for start in range(0, len(base), PAIRS):
            block = slice(start, start + PAIRS)
            rows, columns = (to_text[block] | to_image[block]).nonzero().unbind(1)
            if len(rows):
                read = [texts[int(column)] for column in columns]
                logits = self.match_features(features[block].to(self.device), read, rows)
                matched[block][rows, columns] += logits[:, 1]
        return matched.where(to_text, base - AFTER), matched.where(to_image, base - AFTER)

    @torch.no_grad()
    def embed_features(
        self, features: Float[Tensor, "N P V"], instruction: str | None = None
    ) -> Float[Tensor, "N Q E"]:
        """Embeddings of encoded images; see ``embed``."""
        if instruction is None:
            return self.retriever.embed_images(features)
        return self.retriever.embed_images(features, *self.ids([instruction] * len(features)))

    @torch.no_grad()
    def features(self, images: Sequence[ImageInput | Tensor]) -> Float[Tensor, "N P V"]:
        """Images as the encoder returns them."""
        pixels = torch.stack([self.pixels(image) for image in images])
        return self.retriever.encode_image(pixels.to(self.device))

    def pixels(self, image: ImageInput | Tensor) -> Float[Tensor, "3 S S"]:
        """An image as the encoder reads it."""
        if isinstance(image, Tensor):
            return image
        if isinstance(image, Image.Image):
            return self.transform(to_rgb(image, self.transform.window))
        return self.transform(self.transform.read(str(image)))

    def ids(self, texts: Sequence[str]) -> tuple[Int[Tensor, "M I"], Int[Tensor, "M I"]]:
        """Ids and mask of texts, on the retriever's device. Raises ValueError for an empty one."""
        if any(not text.strip() for text in texts):
            raise ValueError("a text is empty; say what to look for")
        ids, mask = pad([self.read_text(text[:MAX_CHARACTERS]) for text in texts])
        return ids.to(self.device), mask.to(self.device)


def _listed(given: T | Sequence[T]) -> list[T]:
    return [given] if isinstance(given, str | Path | Image.Image) else list(given)  # type: ignore


def _parts(given: T | Sequence[T]) -> Iterator[list[T]]:
    """What was given, ``PAIRS`` at a time."""
    rows = _listed(given)
    return (rows[start : start + PAIRS] for start in range(0, len(rows), PAIRS))
