"""InstructBLIP: a frozen image encoder, a Q-Former that reads the instruction, a language model.

A batch passes through ``encode_image``, ``query_image``, ``project_queries`` and the language model
(InstructBLIP, figure 3). State-dict names are those of transformers'
InstructBlipForConditionalGeneration.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from instructblip.core.batch import Batch, LossOutput, send
from instructblip.core.regions import part
from instructblip.model.checkpoints.transformers import Pretrained
from instructblip.model.compiled import compile_forward
from instructblip.model.config import InstructBlipConfig
from instructblip.model.encoders import build_vision
from instructblip.model.fast import PackedQFormer, encode_frozen, fold_norm
from instructblip.model.language.adapters import (
    Language,
    build_language_model,
    language_of,
    stacks_of,
)
from instructblip.model.lora import lora_layers
from instructblip.model.trainable import ALIASES, PARTS, eval_frozen, is_trainable, part_of
from instructblip.model.vision import VisionLayer

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Stored generation settings that take effect at once; the others are for whoever decodes."""


class InstructBlip(Pretrained):
    """``instruction_aware=False`` in the config makes it a BLIP-2: the Q-Former reads no text.

    ``assets`` is the directory with the tokenizers and settings that ``save_pretrained`` copies,
    ``generation_settings`` its generation_config.json.
    """

    image_chunk = 64
    """Images that a frozen encoder reads at a time: it limits memory and changes no result."""

    def __init__(
        self,
        config: InstructBlipConfig,
        assets: Path | None = None,
        generation_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision_model = build_vision(config.vision)
        self.query_tokens = nn.Parameter(
            torch.randn(1, config.num_query_tokens, config.qformer.hidden_size)
            * config.qformer.initializer_range
        )
        self.qformer = PackedQFormer(config.qformer, text=config.instruction_aware)
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

    def encode_image(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
        """Features of all tokens of each image, before the last LayerNorm, which trains with the
        Q-Former. Stored features and ``Batch.image_features`` are these."""
        vision = self.vision_model
        pixel_values = pixel_values.to(vision.dtype)
        with part("vision"), self.precision(vision.encoder):
            if torch.is_grad_enabled() and is_trainable(*vision.tower):
                return vision.body(pixel_values)
            return encode_frozen(vision, pixel_values, self.image_chunk)

    def query_image(
        self,
        features: Float[Tensor, "N P V"],
        qformer_ids: Int[Tensor, "M I"],
        qformer_mask: Int[Tensor, "M I"] | None,
        image_index: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M Q D"]:
        """Ask M instructions about images whose ``features`` come from ``encode_image``.

        ``image_index`` names the image of each instruction (None: instruction i asks image i);
        without a mask no instruction has padding. All three may be on the CPU, where a mask is read
        without waiting for the device of ``features``.
        """
        norm, weights = self.vision_model.post_layernorm, {}
        trains = torch.is_grad_enabled() and norm.weight.requires_grad
        if trains and not lora_layers(self.qformer):  # an adapter reads the features as well
            features, weights = fold_norm(norm, self.qformer, features)
        else:
            features = self.vision_model.norm(features)
        rows = len(features) if image_index is None else len(image_index)
        queries = self.query_tokens.expand(rows, -1, -1)  # [M, Q, D]
        ids = send(qformer_ids, features.device)
        index = None if image_index is None else send(image_index, features.device)
        inputs = (queries, features.to(queries.dtype), ids, qformer_mask, index)
        with self.precision(self.qformer):
            return functional_call(self.qformer, weights, inputs)

    def project_queries(self, queries: Float[Tensor, "M Q D"]) -> Float[Tensor, "M Q L"]:
        """From the width of the Q-Former to that of the language model."""
        with self.precision(self.language_projection):
            return self.language_projection(queries.to(self.language_projection.weight.dtype))

    def encode_queries(self, batch: Batch) -> Float[Tensor, "B K L"]:
        """What the language model reads of the images: K = F * Q projected queries per sample.

        The Q-Former reads each frame of a video by itself, under the same instruction; the queries
        of the frames are concatenated in their order. They are zeros where a sample has no image.
        """
        features, host = self.features_of(batch), batch.host  # [N, P, V]
        samples, frames = host.image_index.shape
        index = host.image_index.flatten()  # [B*F]
        present = (index >= 0).nonzero()[:, 0]  # [M]
        rows, index = present // frames, index[present]
        in_order = torch.equal(index, torch.arange(len(features), device=index.device))
        with part("q-former"):
            queries = self.query_image(
                features,
                host.qformer_ids[rows],
                host.qformer_mask[rows],
                None if in_order else index,
            )  # [M, Q, D]
            queries = self.project_queries(queries)  # [M, Q, L]
        if len(present) < samples * frames:
            absent = queries.new_zeros(samples * frames, *queries.shape[1:])
            queries = absent.index_copy(0, send(present, absent.device), queries)  # [B*F, Q, L]
        return queries.flatten(0, 1).unflatten(0, (samples, -1))  # [B, F*Q, L]

    def loss(self, batch: Batch) -> LossOutput:
        """Language-modelling loss of the responses; prompt and padding carry none."""
        losses, rows = self.token_losses(self.encode_queries(batch), batch)
        sample_losses = losses.new_zeros(len(batch)).index_add(0, rows, losses.detach())
        sample_tokens = batch.response_mask.long().sum(1)
        return LossOutput(losses.sum(), sample_tokens.sum(), sample_losses, sample_tokens)

    def token_losses(
        self, queries: Float[Tensor, "B K L"], batch: Batch
    ) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """The loss of each response token in nats, and the sample that it belongs to."""
        with part("language"), self.language_precision():
            joined = self.language.join(queries, batch)
            return self.language.loss(joined), joined.rows

    @property
    def language(self) -> Language:
        """The adapter around ``language_model``."""
        return language_of(self.language_model)

    def features_of(self, batch: Batch) -> Float[Tensor, "N P V"]:
        """The features that the batch brings along, or those of its pixels."""
        if batch.image_features is not None:
            return batch.image_features
        assert batch.pixel_values is not None
        return self.encode_image(batch.pixel_values)

    def encoder_fingerprint(self) -> str:
        """A hash of everything that ``encode_image`` depends on besides the images."""
        vision = self.vision_model
        # in half precision the weights decide, whatever the rest computes in
        compute = self.compute_dtype if vision.dtype == torch.float32 else None
        digest = hashlib.sha256(f"{self.config.vision!r} {compute}".encode())
        for name, value in vision.state_dict().items():
            if not name.startswith("post_layernorm."):
                digest.update(f"{name} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """Where LoRA adapters may be, by the part that trains them: the language model; the
        Q-Former and its projection, by the names that they have in the whole model."""
        querying = {"qformer": self.qformer, "language_projection": self.language_projection}
        return {"lora": self.language_model, "qformer_lora": nn.ModuleDict(querying)}

    # --- what trains, and in which precision -----------------------------------------------------

    def set_trainable(self, choice: tuple[str, ...]) -> "InstructBlip":
        """Train the named ``PARTS`` and ``ALIASES`` and freeze everything else.

        The text feed-forward of the last layer never trains, because nothing reads it. Raises
        ValueError for an unknown name, and for "lora" or "qformer_lora" without an adapter.
        """
        known = [*PARTS, *ALIASES]
        unknown = [name for name in choice if name not in known]
        if unknown or not choice:
            raise ValueError(
                f"trainable parts must be some of {', '.join(known)}; got {list(choice)}"
            )
        parts = {part for name in choice for part in ALIASES.get(name, (name,))}
        for name, root in self.adapted.items():
            if name in parts and not lora_layers(root):
                raise ValueError(f"there is no adapter {name} to train: give model.{name}={{}}")
        last = len(self.qformer.encoder.layer) - 1
        unread = re.compile(rf"qformer\.encoder\.layer\.{last}\.(intermediate|output)\..*")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts and not unread.fullmatch(name))
        return self.train(self.training)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train, in the order of the state dict."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> "InstructBlip":
        """Training mode for what trains; the rest stays in eval mode (`eval_frozen`)."""
        super().train(mode)
        if mode:
            eval_frozen(self)
            for adapter in lora_layers(self).values():
                adapter.train(adapter.A.requires_grad)
        return self

    @property
    def big_parts(self) -> list[nn.Module]:
        """Image encoder and language model, which may be in half precision; the rest is fp32."""
        return [*self.vision_model.tower, self.language_model]

    def to_training_dtypes(
        self,
        frozen_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> "InstructBlip":
        """Keep what trains in fp32 (master weights) and the big frozen parts in ``frozen_dtype``.

        The big parts are image encoder and language model. Q-Former, projection and vision norm are
        always fp32: bf16 weights swallow most updates of size 1e-5. ``compute_dtype`` is the
        autocast dtype of the parts in fp32 (None: fp32).

        One parameter after the other goes to its type, and to ``device`` (None: where it is), so
        that no more than one exists twice.
        """
        frozen = {
            id(parameter)
            for part in self.big_parts
            if frozen_dtype is not None and not is_trainable(part)
            for parameter in part.parameters()
            if not parameter.requires_grad  # an adapter may
        }
        for parameter in self.parameters():
            dtype = frozen_dtype if id(parameter) in frozen else torch.float32
            parameter.data = parameter.data.to(device or parameter.device, dtype)
        self.compute_dtype = compute_dtype
        return self

    def compile_layers(self) -> "InstructBlip":
        """Compile the layers of image encoder, Q-Former and language model in their first step
        (`model.compiled`). Parameters keep their names."""
        self.vision_model.compiled = self.qformer.compiled = True
        layers = [layer for _, layers in stacks_of(self.language_model) for layer in layers]
        for layer in (*layers, *(m for m in self.modules() if isinstance(m, VisionLayer))):
            compile_forward(layer)
        return self

    def language_precision(self) -> contextlib.AbstractContextManager:
        """The context in which to call ``language``: autocast where its weights are fp32."""
        return self.precision(self.language_model)

    def precision(self, part: nn.Module) -> contextlib.AbstractContextManager:
        """Autocast to ``compute_dtype`` where the weights of ``part`` are fp32."""
        parameter = next(part.parameters())
        if self.compute_dtype is None or parameter.dtype != torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(parameter.device.type, dtype=self.compute_dtype)
