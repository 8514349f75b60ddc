"""Sizes of what text to image adds to an InstructBLIP, and how it is trained and sampled."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


def _heads_divide(config: Any) -> Any:
    if config.width % config.num_heads:
        raise ValueError(
            f"width must be a multiple of num_heads; got {config.width} and {config.num_heads}"
        )
    return config


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ConditionerConfig(_Config):
    """How the Q-Former's tokens become what a decoder attends to."""

    num_queries: int = Field(
        default=16, gt=0, description="Generation queries beside the query tokens."
    )
    tokens: Literal["queries", "text", "both"] = Field(
        default="both",
        description="What conditions the decoder: the queries' states, the words, or both.",
    )
    num_layers: int = Field(default=2, ge=0, description="Bidirectional layers of the connector.")
    width: int = Field(default=192, gt=0, description="Width inside the connector.")
    num_heads: int = Field(default=6, gt=0, description="Attention heads of the connector.")
    gain: float = Field(
        default=1.0, gt=0, description="Root mean square that the decoder expects of its condition."
    )
    dropout: float = Field(
        default=0.1,
        ge=0,
        le=1 / 3,
        description="Chance of a sample to lose its instruction, its picture, or both: each.",
    )

    @model_validator(mode="after")
    def _divides(self) -> "ConditionerConfig":
        return _heads_divide(self)


class NativeConfig(_Config):
    """The native decoder: a small diffusion transformer on patches of pixels."""

    kind: Literal["native"] = "native"
    image_size: int = Field(default=64, gt=0, description="Side G of a drawn picture in pixels.")
    patch_size: int = Field(default=8, gt=0, description="Side of a patch in pixels.")
    width: int = Field(default=192, gt=0, description="Width of the transformer.")
    num_layers: int = Field(default=6, gt=0, description="Number of transformer layers.")
    num_heads: int = Field(default=6, gt=0, description="Attention heads of a layer.")
    condition_width: int = Field(default=192, gt=0, description="Width of the condition's tokens.")
    detail_width: int = Field(default=32, gt=0, description="Channels of the last convolutions.")
    predict: Literal["picture", "velocity"] = Field(
        default="picture",
        description="What the last layer gives; the loss is the velocity's either way.",
    )
    noise_levels: int = Field(
        default=4,
        gt=0,
        description="Noise levels at which a picture is learned in a step, under one condition.",
    )
    noise_mean: float = Field(
        default=3.0,
        description="Mean of the logit of the noise level in training; above 0 favours noise.",
    )
    noise_std: float = Field(default=2.0, gt=0, description="Deviation of that logit.")
    shift: float = Field(
        default=4.0,
        gt=0,
        description="Above 1 the sampler takes shorter steps where there is more noise.",
    )

    @model_validator(mode="after")
    def _divides(self) -> "NativeConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size; got {self.image_size} and "
                f"{self.patch_size}"
            )
        if self.image_size % 2:
            raise ValueError(f"image_size must be even; got {self.image_size}")
        return _heads_divide(self)


class DiffusersConfig(_Config):
    """A decoder from a local diffusers directory: Stable Diffusion or Sana."""

    kind: Literal["diffusers"] = "diffusers"
    path: str = Field(description="The directory with model_index.json.")
    image_size: int | None = Field(
        default=None,
        gt=0,
        description="Side of a drawn picture in pixels; null for the decoder's own.",
    )


class TextToImageConfig(_Config):
    """Everything beside the InstructBLIP. ``qformer`` names the Q-Former trained with."""

    conditioner: ConditionerConfig = Field(
        default=ConditionerConfig(), description="From the Q-Former to the condition."
    )
    decoder: NativeConfig | DiffusersConfig = Field(
        default=NativeConfig(), discriminator="kind", description="What draws."
    )
    qformer: str | None = Field(
        default=None, description="Hash of the Q-Former's weights; written when the model is saved."
    )
