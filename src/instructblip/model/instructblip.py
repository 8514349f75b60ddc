"""InstructBLIP: a frozen image encoder, a Q-Former that reads the instruction, a language model.

The walk of a batch (InstructBLIP, figure 3): ``encode_image`` -> ``query_image`` ->
``project_queries`` -> the language model. State-dict names are those of transformers'
InstructBlipForConditionalGeneration.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from instructblip.core.batch import Batch
from instructblip.core.regions import part
from instructblip.model.checkpoints.transformers import Pretrained
from instructblip.model.config import InstructBlipConfig
from instructblip.model.language.adapters import (
    Language,
    build_language_model,
    language_of,
)
from instructblip.model.language.lora import adapters
from instructblip.model.qformer import QFormer
from instructblip.model.vision import VisionModel

PARTS = {
    "query_tokens": r"query_tokens",
    "qformer_text_embeddings": r"qformer\.embeddings\.(word|position)_embeddings\..*",
    # The LayerNorm over the concatenation feeds the first self-attention.
    "qformer_self_attention": r"qformer\.(embeddings\.layernorm|encoder\.layer\.\d+\.attention)"
    r"\..*",
    "qformer_cross_attention": r"qformer\.encoder\.layer\.\d+\.crossattention\..*",
    "qformer_feed_forward": r"qformer\.encoder\.layer\.\d+\.(intermediate|output)(_query)?\..*",
    "projection": r"language_projection\..*",
    "vision_norm": r"vision_model\.post_layernorm\..*",
    "vision_tower": r"vision_model\.(embeddings|encoder)\..*",
    "lora": r"language_model\..*\.lora\.[AB]",
    "language_model": r"language_model\.(?!.*\.lora\.).*",
}
"""Every parameter belongs to exactly one part: part -> pattern of its whole name."""

ALIASES = {
    # What the official code trains: 188M of 8B parameters for Vicuna-7B (section 3.4).
    "qformer": (
        "query_tokens",
        "qformer_text_embeddings",
        "qformer_self_attention",
        "qformer_cross_attention",
        "qformer_feed_forward",
        "projection",
        "vision_norm",
    ),
}


SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Stored generation settings that take effect at once; the others are for whoever decodes."""


class LossOutput(NamedTuple):
    """Loss of one batch. ``loss_sum`` and ``sample_losses`` [B] are sums in nats over the response
    tokens, ``num_tokens`` and ``sample_tokens`` [B] their numbers, int64: the mean belongs to the
    caller, who knows the tokens of the whole step. Only ``loss_sum`` carries gradients."""

    loss_sum: Tensor
    num_tokens: Tensor
    sample_losses: Tensor
    sample_tokens: Tensor


class InstructBlip(Pretrained):
    """``instruction_aware=False`` in the config makes it a BLIP-2: the Q-Former reads no text.

    ``assets`` is the directory with the tokenizers and settings that ``save_pretrained`` copies,
    ``generation_settings`` its generation_config.json.
    """

    image_chunk = 64
    """Pictures per pass of a frozen image encoder: bounds its memory, not its result."""

    def __init__(
        self,
        config: InstructBlipConfig,
        assets: Path | None = None,
        generation_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config.vision)
        self.query_tokens = nn.Parameter(
            torch.randn(1, config.num_query_tokens, config.qformer.hidden_size)
            * config.qformer.initializer_range
        )
        self.qformer = QFormer(config.qformer, text=config.instruction_aware)
        self.language_model = build_language_model(config.language)
        width = self.language_model.get_input_embeddings().embedding_dim
        self.language_projection = nn.Linear(config.qformer.hidden_size, width)
        self.compute_dtype: torch.dtype | None = None
        self.assets = assets
        self.generation_settings = generation_settings or {}
        for name in SPECIAL_TOKENS:
            if self.generation_settings.get(name) is not None:
                setattr(self.language_model.generation_config, name, self.generation_settings[name])
        self.set_trainable(("qformer",))

    @property
    def language(self) -> Language:
        """The adapter around ``language_model``."""
        return language_of(self.language_model)

    # --- the walk of a batch ---------------------------------------------------------------------

    def encode_image(
        self, pixel_values: Float[Tensor, "N 3 S S"], norm: bool = True
    ) -> Float[Tensor, "N P V"]:
        """All tokens of each picture. ``norm=False`` stops before the last LayerNorm: these are
        the features that a cache holds and ``Batch.image_features`` carries."""
        vision = self.vision_model
        pixel_values = pixel_values.to(vision.embeddings.patch_embedding.weight.dtype)
        if torch.is_grad_enabled() and _trains(vision.embeddings, vision.encoder):
            with part("vision"), self._precision(vision.encoder):
                features = vision.body(pixel_values)
        else:
            with part("vision"), torch.no_grad(), self._precision(vision.encoder):
                parts = [vision.body(chunk) for chunk in pixel_values.split(self.image_chunk)]
            features = torch.cat(parts) if len(parts) != 1 else parts[0]
        return vision.norm(features) if norm else features

    def encoder_fingerprint(self) -> str:
        """A hash of all that ``encode_image(norm=False)`` depends on besides the pictures."""
        vision = self.vision_model
        digest = hashlib.sha256(f"{self.config.vision!r} {self.compute_dtype}".encode())
        for name, value in vision.state_dict().items():
            if not name.startswith("post_layernorm."):
                digest.update(f"{name} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def query_image(
        self,
        features: Float[Tensor, "N P V"],
        qformer_ids: Int[Tensor, "M I"],
        qformer_mask: Int[Tensor, "M I"] | None,
        image_index: Int[Tensor, " M"] | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "M Q D"]:
        """Ask M instructions about pictures: ``image_index`` names the picture of each (None: row i
        asks picture i). ``features`` are behind the last LayerNorm; no mask: no padding;
        ``weights`` stand in for the Q-Former's own."""
        rows = len(features) if image_index is None else len(image_index)
        query_embeds = self.query_tokens.expand(rows, -1, -1)
        with self._precision(self.qformer):
            features = features.to(self.query_tokens.dtype)
            inputs = (query_embeds, features, qformer_ids, qformer_mask, image_index)
            return functional_call(self.qformer, weights or {}, inputs)

    def project_queries(self, queries: Float[Tensor, "M Q D"]) -> Float[Tensor, "M Q L"]:
        """From the width of the Q-Former to that of the language model."""
        with self._precision(self.language_projection):
            return self.language_projection(queries.to(self.language_projection.weight.dtype))

    def encode_queries(self, batch: Batch) -> Float[Tensor, "B K L"]:
        """What the language model reads of the pictures: K = F * Q projected queries per sample.

        Each frame of a video goes through the encoder and the Q-Former on its own, under the same
        instruction; its queries are concatenated in the order of the frames.
        """
        features = batch.image_features
        if features is None:
            assert batch.pixel_values is not None
            features = self.encode_image(batch.pixel_values, norm=False)
        samples, frames = batch.image_index.shape
        index = batch.image_index.flatten()
        own = torch.equal(index, torch.arange(len(features), device=index.device))
        projected = self.ask_features(
            features,
            batch.qformer_ids.repeat_interleave(frames, dim=0),
            batch.qformer_mask.repeat_interleave(frames, dim=0),
            None if own else index,  # nothing to pick where each row has a picture of its own
        )
        return projected.flatten(0, 1).unflatten(0, (samples, -1))  # [B, F*Q, L]

    def ask_features(
        self,
        features: Float[Tensor, "N P V"],
        qformer_ids: Int[Tensor, "M I"],
        qformer_mask: Int[Tensor, "M I"] | None,
        image_index: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M Q L"]:
        """Projected queries; as ``query_image``, but of features before the last LayerNorm."""
        norm = self.vision_model.post_layernorm
        folds = torch.is_grad_enabled() and norm.weight.requires_grad
        with part("q-former"):
            seen = self.vision_model.norm(features, affine=not folds)
            weights = self._behind_norm() if folds else None
            queries = self.query_image(seen, qformer_ids, qformer_mask, image_index, weights)
            return self.project_queries(queries)

    def _behind_norm(self) -> dict[str, Tensor]:
        """Weights for features without the last LayerNorm's scale s and shift t, which train here:
        W (s x + t) + b = (W s) x + (W t + b), and the many features x need no gradient."""
        norm, folded = self.vision_model.post_layernorm, {}
        own = dict(self.qformer.named_parameters())
        for key in filter(re.compile(r"crossattention\.attention\.(key|value)\.w").search, own):
            bias = key.removesuffix("weight") + "bias"
            folded[key] = own[key] * norm.weight
            folded[bias] = torch.addmv(own[bias], own[key], norm.bias)
        return folded

    def loss(self, batch: Batch) -> LossOutput:
        """Language-modelling loss of the responses; prompt and padding carry none."""
        queries = self.encode_queries(batch)
        with part("language"), self.language_precision():
            joined = self.language.join(queries, batch)
            losses = self.language.loss(joined)  # [n]
        sample_losses = losses.new_zeros(len(batch)).index_add(0, joined.rows, losses.detach())
        sample_tokens = batch.response_mask.long().sum(1)
        return LossOutput(losses.sum(), sample_tokens.sum(), sample_losses, sample_tokens)

    def forward(self, batch: Batch) -> LossOutput:
        """The same as ``loss``: what wrappers such as DistributedDataParallel call."""
        return self.loss(batch)

    # --- what trains, and in which precision -----------------------------------------------------

    def set_trainable(self, choice: tuple[str, ...]) -> "InstructBlip":
        """Let the named ``PARTS`` and ``ALIASES`` train and freeze all the rest.

        Two feed-forwards are never trained: the text's in the last layer has no reader. Raises
        ValueError for an unknown name or a part that this model does not have.
        """
        known = [*PARTS, *ALIASES]
        unknown = [name for name in choice if name not in known]
        if unknown or not choice:
            raise ValueError(
                f"trainable parts must be some of {', '.join(known)}; got {list(choice)}"
            )
        parts = {part for name in choice for part in ALIASES.get(name, (name,))}
        if "lora" in parts and not adapters(self.language_model):
            raise ValueError("the language model has no adapter to train: give model.lora={}")
        last = len(self.qformer.encoder.layer) - 1
        unread = re.compile(rf"qformer\.encoder\.layer\.{last}\.(intermediate|output)\..*")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts and not unread.fullmatch(name))
        return self.train(self.training)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train, in the order of the state dict."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> "InstructBlip":
        """Training mode for what trains. A module without a trainable parameter stays in eval mode:
        dropout of a frozen language model would be noise in the loss (the official code leaves
        Flan-T5's on)."""
        super().train(mode)
        if mode:
            for module in self.modules():
                if any(True for _ in module.parameters()) and not _trains(module):
                    module.eval()
            for adapter in adapters(self.language_model).values():
                adapter.train(adapter.A.requires_grad)
        return self

    def to_training_dtypes(
        self, frozen_dtype: torch.dtype | None = None, compute_dtype: torch.dtype | None = None
    ) -> "InstructBlip":
        """Keep what trains in fp32 (master weights) and the big frozen parts in ``frozen_dtype``.

        Image encoder and language model are stored in ``frozen_dtype`` where frozen; Q-Former,
        projection and vision norm are small and always fp32: bf16 weights swallow most updates of
        size 1e-5. ``compute_dtype`` is the autocast type of the parts kept in fp32 (None: fp32).
        """
        self.float()
        if frozen_dtype is not None:
            for part in (
                self.vision_model.embeddings,
                self.vision_model.encoder,
                self.language_model,
            ):
                if not _trains(part):
                    for parameter in part.parameters():
                        if not parameter.requires_grad:  # an adapter may
                            parameter.data = parameter.data.to(frozen_dtype)
        self.compute_dtype = compute_dtype
        return self

    def language_precision(self) -> contextlib.AbstractContextManager:
        """The context in which to call ``language``: autocast where its weights are fp32."""
        return self._precision(self.language_model)

    def _precision(self, part: nn.Module) -> contextlib.AbstractContextManager:
        parameter = next(part.parameters())
        if self.compute_dtype is None or parameter.dtype != torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(parameter.device.type, dtype=self.compute_dtype)


def part_of(name: str) -> str:
    """The part that the parameter ``name`` belongs to."""
    parts = [part for part, pattern in PARTS.items() if re.fullmatch(pattern, name)]
    assert len(parts) == 1, f"{name} belongs to {parts}"
    return parts[0]


def _trains(*modules: nn.Module) -> bool:
    """Whether any parameter of its own trains; an adapter inside leaves a module as it is."""
    named = (pair for module in modules for pair in module.named_parameters())
    return any(p.requires_grad and "lora." not in name for name, p in named)
