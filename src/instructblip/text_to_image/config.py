"""Sizes of what text to image adds to an InstructBLIP, and how it trains and samples."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _TransformerConfig(_Config):
    width: int = Field(default=192, gt=0, description="Width of the transformer.")
    num_heads: int = Field(default=6, gt=0, description="Attention heads of a layer.")

    @model_validator(mode="after")
    def _heads_divide(self) -> "_TransformerConfig":
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads; got {self.width} and {self.num_heads}"
            )
        return self


class ConditionerConfig(_TransformerConfig):
    """From the Q-Former's tokens to the tokens that a decoder attends to."""

    num_queries: int = Field(
        default=16, gt=0, description="Generation queries beside the query tokens."
    )
    tokens: Literal["queries", "text", "both"] = Field(
        default="both",
        description="What conditions the decoder: the queries' states, the words, or both.",
    )
    num_layers: int = Field(default=2, ge=0, description="Bidirectional layers of the connector.")
    gain: float = Field(
        default=1.0, gt=0, description="Root mean square that the decoder expects of its condition."
    )
    dropout: float = Field(
        default=0.1,
        ge=0,
        le=1 / 3,
        description="Probability of each of: dropping the instruction, the image, both.",
    )


class NativeConfig(_TransformerConfig):
    """The native decoder: a small diffusion transformer on patches of pixels."""

    kind: Literal["native"] = "native"
    image_size: int = Field(default=64, gt=0, description="Side G of a drawn image in pixels.")
    patch_size: int = Field(default=8, gt=0, description="Side of a patch in pixels.")
    num_layers: int = Field(default=6, gt=0, description="Number of transformer layers.")
    condition_width: int = Field(default=192, gt=0, description="Width of the condition's tokens.")
    detail_width: int = Field(default=32, gt=0, description="Channels of the last convolutions.")
    predict: Literal["picture", "velocity"] = Field(
        default="picture",
        description="Output of the last layer; the loss is that of the velocity either way.",
    )
    noise_levels: int = Field(
        default=4,
        gt=0,
        description="Noise levels at which one step trains an image, under one condition.",
    )
    noise_mean: float = Field(
        default=3.0,
        description="Mean of the logit of the noise level in training; above 0 favours noise.",
    )
    noise_std: float = Field(default=2.0, gt=0, description="Standard deviation of that logit.")
    shift: float = Field(
        default=4.0,
        gt=0,
        description="Above 1 the sampler takes shorter steps where there is more noise.",
    )

    @model_validator(mode="after")
    def _patches_divide(self) -> "NativeConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size; got {self.image_size} and "
                f"{self.patch_size}"
            )
        if self.image_size % 2:
            raise ValueError(f"image_size must be even; got {self.image_size}")
        return self


class DiffusersConfig(_Config):
    """A decoder from a local diffusers directory: Stable Diffusion or Sana."""

    kind: Literal["diffusers"] = "diffusers"
    path: str = Field(description="The directory with model_index.json.")
    image_size: int | None = Field(
        default=None,
        gt=0,
        description="Side of a drawn image in pixels; null: the side in the decoder's config.",
    )


class TextToImageConfig(_Config):
    """Everything beside the InstructBLIP."""

    conditioner: ConditionerConfig = Field(
        default=ConditionerConfig(), description="From the Q-Former to the condition."
    )
    decoder: NativeConfig | DiffusersConfig = Field(
        default=NativeConfig(), discriminator="kind", description="The decoder that draws."
    )
    qformer: str | None = Field(
        default=None, description="Hash of the Q-Former's weights; written when the model is saved."
    )
