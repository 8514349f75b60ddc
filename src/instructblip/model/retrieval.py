"""Image-text retrieval with the Q-Former of BLIP-2's first stage: similarity and matching.

Similarity compares an image with a text, each read apart: the query that fits best counts. For
matching the queries read the image and the text together, which is slower and more exact (BLIP-2,
section 3.1). ``retrieval.safetensors`` in a model directory has the heads by transformers' names
(Blip2ForImageTextRetrieval), and the weights of the Q-Former that was trained with them where the
model's were trained further.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from instructblip.core.files import read_json, replacing_directory
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.checkpoints.transformers import (
    READ_BY_RETRIEVAL,
    by_our_names,
    load_weights,
    read_retrieval,
    retrieval_weights,
    to_retrieval,
    write_retrieval,
)
from instructblip.model.checkpoints.weights import (
    NoRandomWeights,
    NoStorage,
    read_weights,
    write_weights,
)
from instructblip.model.config import InstructBlipConfig
from instructblip.model.encoders import build_vision
from instructblip.model.fast import PackedQFormer, encode_frozen
from instructblip.model.instructblip import InstructBlip

HEADS = {
    "vision_projection": "image_head",
    "text_projection": "text_head",
    "itm_head": "match_head",
}
"""transformers' names of the heads, and ours."""
PARTS = ("vision_model.", "query_tokens", "qformer.")


class Heads(nn.Module):
    """What stage 1 has besides the Q-Former: projections of width E, matching, temperature."""

    def __init__(self, width: int, embedding: int = 256) -> None:
        super().__init__()
        self.image_head = nn.Linear(width, embedding)
        self.text_head = nn.Linear(width, embedding)
        self.match_head = nn.Linear(width, 2)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))

    def embed_queries(self, queries: Float[Tensor, "M Q D"]) -> Float[Tensor, "M Q E"]:
        """Unit vectors of queries that read an image."""
        return F.normalize(self.image_head(queries), dim=-1)

    def embed_text(self, text: Float[Tensor, "M I D"]) -> Float[Tensor, "M E"]:
        """Unit vectors of texts, by the state of their first token."""
        return F.normalize(self.text_head(text[:, 0]), dim=-1)

    def fit(self, queries: Float[Tensor, "M Q D"]) -> Float[Tensor, "M 2"]:
        """Logits that the text does not fit and that it fits, of queries that read both."""
        return self.match_head(queries).mean(1)


def similarity(images: Float[Tensor, "A Q E"], texts: Float[Tensor, "B E"]) -> Float[Tensor, "A B"]:
    """The cosine of each image's best query with each text."""
    return torch.einsum("iqe,je->ijq", images, texts).amax(2)


class Retriever(Heads):
    """Image encoder, Q-Former and heads of a model, without its language model."""

    image_chunk = 64
    """Images that the encoder reads at a time."""

    def __init__(self, config: InstructBlipConfig, embedding: int) -> None:
        super().__init__(config.qformer.hidden_size, embedding)
        self.config = config
        self.vision_model = build_vision(config.vision)
        shape = (1, config.num_query_tokens, config.qformer.hidden_size)
        self.query_tokens = nn.Parameter(torch.empty(shape))
        self.qformer = PackedQFormer(config.qformer, text=True)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Retriever":
        """The retriever of a model or run directory with ``retrieval.safetensors``, or of a
        directory of transformers' Blip2ForImageTextRetrieval; in fp32, on the CPU.

        Raises ValueError for a model without heads.
        """
        directory = model_directory(path)
        config = InstructBlipConfig.from_transformers(read_json(directory / "config.json"))
        stored = read_weights(directory)
        if "itm_head.weight" in stored:
            heads, weights = stored, retrieval_weights(directory)
        else:
            heads, weights = read_retrieval(directory)
        encoder = {n: v for n, v in by_our_names(stored).items() if is_encoder(n)}
        retriever = cls._empty(config, heads, weights)
        load_weights(retriever, encoder | weights | our_heads(heads), directory)
        return retriever.requires_grad_(False).eval()

    @classmethod
    def of(cls, model: InstructBlip) -> "Retriever":
        """The retriever of a loaded model, which shares its image encoder and is on its device.

        Raises ValueError for a model without heads.
        """
        if model.assets is None:
            raise ValueError("a model that was not loaded from a directory has no retrieval heads")
        heads, weights = read_retrieval(model.assets)
        retriever = cls._empty(model.config, heads, weights)
        device = model.query_tokens.device
        placed = {n: v.to(device, torch.float32) for n, v in (weights | our_heads(heads)).items()}
        encoder = {n: v for n, v in model.state_dict(keep_vars=True).items() if is_encoder(n)}
        retriever.load_state_dict(encoder | placed, assign=True)
        return retriever.to(device).eval()

    @classmethod
    def _empty(
        cls, config: InstructBlipConfig, heads: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> "Retriever":
        """A retriever for weights of these sizes. A BLIP-2's config says nothing true about its
        text branch."""
        tables = {"vocab_size": "word", "max_position_embeddings": "position"}
        sizes = {
            field: len(weights[f"qformer.embeddings.{table}_embeddings.weight"])
            for field, table in tables.items()
        }
        qformer = config.qformer.model_copy(update=sizes)
        config = config.model_copy(update={"qformer": qformer, "instruction_aware": True})
        with NoRandomWeights(), NoStorage():
            retriever = cls(config, len(heads["vision_projection.weight"]))
        if "itm_head.weight" not in heads:
            del retriever.match_head
        return retriever

    def save_pretrained(self, path: Path) -> None:
        """Write config and weights as transformers' Blip2ForImageTextRetrieval, whole or not at
        all.

        Raises ValueError for heads that were not trained to match, and for an image encoder that
        transformers' BLIP-2 does not have.
        """
        if not self.can_match:
            raise ValueError(
                "a Blip2ForImageTextRetrieval matches, and the heads of the stage retrieval do "
                "not: export a model of `instructblip pretrain --stage 1`"
            )
        if not self.config.vision.in_transformers:
            raise ValueError(
                "transformers' BLIP-2 has no image encoder such as this model's: search with "
                "`instructblip search`, or train stage 1 on an EVA-CLIP"
            )
        config = self.config.model_copy(update={"instruction_aware": False, "image_token_id": None})
        values = config.to_transformers()
        values |= {"architectures": ["Blip2ForImageTextRetrieval"], "dtype": "float32"}
        values["qformer_config"]["use_qformer_text_input"] = True
        values["image_text_hidden_size"] = self.image_head.out_features
        heads = named_heads(self)
        del heads["temp"]  # transformers has no place for it
        weights = {n: v for n, v in self.state_dict().items() if n.startswith(PARTS)}
        with replacing_directory(path) as directory:
            text = json.dumps(values, indent=2, sort_keys=True) + "\n"
            (directory / "config.json").write_text(text, encoding="utf-8")
            write_weights(to_retrieval(weights) | heads, directory / "model.safetensors")

    @property
    def can_match(self) -> bool:
        """Whether its heads were trained to match; those of the stage `retrieval` were not."""
        return hasattr(self, "match_head")

    def encode_image(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
        """As ``InstructBlip.encode_image``, without gradients."""
        vision = self.vision_model
        return encode_frozen(vision, pixel_values.to(vision.dtype), self.image_chunk)

    def query(
        self,
        features: Float[Tensor, "N P V"],
        ids: Int[Tensor, "M I"],
        mask: Int[Tensor, "M I"],
        index: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M Q D"]:
        """Queries that read text i and image ``index[i]`` (None: image i); I may be 0."""
        features = self.vision_model.norm(features).to(self.query_tokens.dtype)
        queries = self.query_tokens.expand(len(ids), -1, -1)
        return self.qformer(queries, features, ids, mask, index)

    def embed_images(
        self,
        features: Float[Tensor, "N P V"],
        ids: Int[Tensor, "N I"] | None = None,
        mask: Int[Tensor, "N I"] | None = None,
    ) -> Float[Tensor, "N Q E"]:
        """Unit vectors of each query; with ``ids`` the queries read an instruction as well."""
        if ids is None or mask is None:
            ids = mask = torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
        return self.embed_queries(self.query(features, ids, mask))

    def embed_texts(
        self, ids: Int[Tensor, "M I"], mask: Int[Tensor, "M I"]
    ) -> Float[Tensor, "M E"]:
        """Unit vectors of texts."""
        return self.embed_text(self.qformer.hidden_states(None, None, ids, mask)[1])

    def match(
        self,
        features: Float[Tensor, "N P V"],
        ids: Int[Tensor, "M I"],
        mask: Int[Tensor, "M I"],
        index: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M 2"]:
        """Logits that text i does not fit image ``index[i]``, and that it fits."""
        return self.fit(self.query(features, ids, mask, index))


def is_encoder(name: str) -> bool:
    """Whether a parameter belongs to the image encoder without its last LayerNorm."""
    return name.startswith("vision_model.") and not READ_BY_RETRIEVAL.fullmatch(name)


def our_heads(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The heads among tensors by transformers' names, by ours."""
    heads = {
        f"{HEADS[part]}.{rest}": value
        for name, value in weights.items()
        for part, _, rest in [name.partition(".")]
        if part in HEADS
    }
    temperature = weights.get("temp", torch.tensor(0.07))  # which transformers leaves out
    return heads | {"log_temperature": temperature.float().log()}


def named_heads(heads: Heads) -> dict[str, Tensor]:
    """The heads by transformers' names."""
    named = {
        f"{theirs}.{part}": value
        for theirs, ours in HEADS.items()
        if hasattr(heads, ours)
        for part, value in getattr(heads, ours).state_dict().items()
    }
    return named | {"temp": heads.log_temperature.detach().exp()}


def write_heads(heads: Heads, model: InstructBlip, directory: Path) -> None:
    """Write ``retrieval.safetensors`` into a model directory: the heads, and what in the ``model``
    that was trained with them differs from the one there."""
    weights = {n: v for n, v in model.state_dict().items() if READ_BY_RETRIEVAL.fullmatch(n)}
    write_retrieval(named_heads(heads), weights, directory)
