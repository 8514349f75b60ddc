"""The whole model: an InstructBLIP, the conditioner around its Q-Former, and a decoder.

It is a second model for the same training loop. ``loss(batch)`` is the decoder's where the batch
has target images and the InstructBLIP's elsewhere: batches of both kinds keep understanding alive
while the Q-Former trains.
"""

import contextlib
import re
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from instructblip.core.batch import Batch, LossOutput
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import PARTS as UNDERSTANDING_PARTS
from instructblip.model.trainable import eval_frozen
from instructblip.text_to_image.conditioner import Conditioner
from instructblip.text_to_image.config import NativeConfig, TextToImageConfig
from instructblip.text_to_image.decoder import Condition, Mask, NativeDecoder
from instructblip.text_to_image.diffusers_decoder import DiffusersDecoder

PARTS = {
    "generation_queries": r"conditioner\.generation_queries",
    "null_image": r"conditioner\.null_image",
    "connector": r"conditioner\.connector\..*",
    "decoder": r"decoder\.(?!vae\.).*",
    # cross-attention of a diffusers decoder to its condition, as in SEED-X
    "decoder_keys_values": r"decoder\.(?!vae\.).*\.attn2\.to_[kv]\..*",
}
"""Parts beside the InstructBLIP -> patterns of whole parameter names."""

ALIASES = {
    "bridge": ("generation_queries", "null_image", "connector"),
    "drawing": ("generation_queries", "null_image", "connector", "decoder"),
}
ALWAYS_FROZEN = ("vision_tower", "language_model")


class TextToImage(nn.Module):
    """``condition``, then ``decoder``. Raises ValueError for an InstructBLIP whose Q-Former does
    not read the instruction.

    ``decoder_changed``: the decoder's weights differ from those of the diffusers directory that the
    config names, so they are saved. A native decoder's always are.
    """

    def __init__(
        self, instructblip: InstructBlip, config: TextToImageConfig, decoder_changed: bool = False
    ) -> None:
        super().__init__()
        if not instructblip.config.instruction_aware:
            raise ValueError(
                "text to image needs a Q-Former that reads the instruction; got a BLIP-2 without a "
                "text branch. Load it with instruction_aware=True (and a text_branch)"
            )
        self.config = config
        self.instructblip = instructblip
        decoder = config.decoder
        native = isinstance(decoder, NativeConfig)
        self.decoder: Any = (
            NativeDecoder(decoder) if native else DiffusersDecoder.from_pretrained(decoder)
        )
        self.decoder_changed = decoder_changed or native
        self.conditioner = Conditioner(
            config.conditioner,
            instructblip.qformer,
            instructblip.query_tokens,
            self.decoder.condition_width,
        )
        self.set_trainable(("drawing",) if native else ("bridge",))

    def condition(
        self,
        features: Float[Tensor, "N P V"] | None,
        image_index: Int[Tensor, " B"],
        qformer_ids: Int[Tensor, "B I"],
        qformer_mask: Int[Tensor, "B I"],
    ) -> tuple[Condition, Mask]:
        """The tokens that the decoder attends to, in fp32. ``features`` come from ``encode``."""
        with self.precision():
            condition, mask = self.conditioner(
                self.instructblip.qformer, features, image_index, qformer_ids, qformer_mask
            )
        return condition.float(), mask

    def encode(self, batch: Batch) -> Float[Tensor, "N P V"] | None:
        """Features of the subject images behind the last LayerNorm; None if there are none."""
        if batch.image_features is not None:
            return self.instructblip.vision_model.norm(batch.image_features)
        if batch.pixel_values is None or not len(batch.pixel_values):
            return None
        features = self.instructblip.encode_image(batch.pixel_values)
        return self.instructblip.vision_model.norm(features).float()

    def loss(self, batch: Batch) -> LossOutput:
        """The decoder's loss, a mean over the pixels of each image; without target images the
        language modelling loss. Drops instruction and image at random for guidance."""
        if batch.target_values is None:
            return self.instructblip.loss(batch)
        draw = torch.rand(len(batch), device=batch.qformer_mask.device)
        dropout = self.conditioner.config.dropout
        no_text = (draw < dropout) | (draw >= 1 - dropout)
        no_image = (draw >= dropout) & (draw < 2 * dropout) | (draw >= 1 - dropout)
        condition, mask = self.condition(
            self.encode(batch),
            batch.image_index[:, 0].masked_fill(no_image, -1),
            batch.qformer_ids,
            batch.qformer_mask.masked_fill(no_text[:, None], 0),
        )
        with self.precision():
            losses = self.decoder.loss(batch.target_values, condition, mask).float()
        ones = torch.ones_like(losses, dtype=torch.long)
        return LossOutput(losses.sum(), ones.sum(), losses.detach(), ones)

    def set_trainable(self, choice: tuple[str, ...]) -> "TextToImage":
        """Choose the parts (``PARTS``, ``ALIASES``, those of the InstructBLIP) that train.

        Image encoder, language model and VAE are always frozen. Raises ValueError for them and for
        unknown names.
        """
        if refused := [name for name in choice if name in ALWAYS_FROZEN]:
            raise ValueError(
                f"{', '.join(refused)} cannot train in text to image: image encoder, language "
                "model and VAE stay frozen; leave it out of training.trainable"
            )
        known = {*PARTS, *ALIASES, "qformer", *UNDERSTANDING_PARTS} - {*ALWAYS_FROZEN}
        unknown = [name for name in choice if name not in known]
        if unknown or not choice:
            raise ValueError(
                f"trainable parts must be some of {', '.join(sorted(known))}; got {unknown}"
            )
        parts = {part for name in choice for part in ALIASES.get(name, (name,)) if part in PARTS}
        if rest := tuple(name for name in choice if name not in {*PARTS, *ALIASES}):
            self.instructblip.set_trainable(rest)
        else:
            self.instructblip.requires_grad_(False)
        patterns = [re.compile(PARTS[part]) for part in parts]
        for module, prefix in ((self.conditioner, "conditioner"), (self.decoder, "decoder")):
            for name, parameter in module.named_parameters(prefix):
                parameter.requires_grad_(any(p.fullmatch(name) for p in patterns))
        self.decoder_changed |= any(p.requires_grad for p in self.decoder.parameters())
        return self.train(self.training)

    def train(self, mode: bool = True) -> "TextToImage":
        """Training mode for what trains; the rest stays in eval mode (`eval_frozen`)."""
        super().train(mode)
        if mode:
            for part in (self.conditioner, self.decoder):  # the InstructBLIP does it itself
                eval_frozen(part)
        return self

    def precision(self) -> contextlib.AbstractContextManager:
        """Autocast to the compute dtype of the InstructBLIP, if it has one. Conditioner and decoder
        keep fp32 weights."""
        return self.instructblip.precision(self.conditioner)
