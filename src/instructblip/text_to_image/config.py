"""Sizes of what text to image adds to an InstructBLIP, and how it trains and samples."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class _Config(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class _TransformerConfig(_Config):
    width: PositiveInt = 192
    """Width of the transformer."""
    num_heads: PositiveInt = 6
    """Attention heads of a layer."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "_TransformerConfig":
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads; got {self.width} and {self.num_heads}"
            )
        return self


class ConditionerConfig(_TransformerConfig):
    """From the Q-Former's tokens to the tokens that a decoder attends to."""

    num_queries: PositiveInt = 16
    """Generation queries beside the query tokens."""
    tokens: Literal["queries", "text", "both"] = "both"
    """What conditions the decoder: the queries' states, the words, or both."""
    num_layers: NonNegativeInt = 2
    """Bidirectional layers of the connector."""
    gain: PositiveFloat = 1.0
    """Root mean square that the decoder expects of its condition."""
    dropout: Annotated[float, Field(ge=0, le=1 / 3)] = 0.1
    """Probability of each of: dropping the instruction, the image, both."""


class NativeConfig(_TransformerConfig):
    """The native decoder: a small diffusion transformer on patches of pixels."""

    kind: Literal["native"] = "native"
    image_size: PositiveInt = 64
    """Side G of a drawn image in pixels."""
    patch_size: PositiveInt = 8
    """Side of a patch in pixels."""
    num_layers: PositiveInt = 6
    """Number of transformer layers."""
    condition_width: PositiveInt = 192
    """Width of the condition's tokens."""
    detail_width: PositiveInt = 32
    """Channels of the last convolutions."""
    predict: Literal["picture", "velocity"] = "picture"
    """Output of the last layer; the loss is that of the velocity either way."""
    noise_levels: PositiveInt = 4
    """Noise levels at which one step trains an image, under one condition."""
    noise_mean: float = 3.0
    """Mean of the logit of the noise level in training; above 0 favours noise."""
    noise_std: PositiveFloat = 2.0
    """Standard deviation of that logit."""
    shift: PositiveFloat = 4.0
    """Above 1 the sampler takes shorter steps where there is more noise."""

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
    path: str
    """The directory with model_index.json."""
    image_size: PositiveInt | None = None
    """Side of a drawn image in pixels; null: the side in the decoder's config."""


class TextToImageConfig(_Config):
    """Everything beside the InstructBLIP."""

    conditioner: ConditionerConfig = ConditionerConfig()
    """From the Q-Former to the condition."""
    decoder: NativeConfig | DiffusersConfig = Field(default=NativeConfig(), discriminator="kind")
    """The decoder that draws."""
    qformer: str | None = None
    """Hash of the Q-Former's weights; written when the model is saved."""
