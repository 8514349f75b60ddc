"""Sizes of the three parts, and their translation from and to transformers' ``config.json``.

Field names and defaults are those of transformers (a ``config.json`` leaves out what equals the
default), so the translation is a selection of keys and nothing more.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu"]

READERS = {
    "instructblip": "InstructBlip",
    "instructblipvideo": "InstructBlipVideo",
    "blip-2": "Blip2",
}
"""model_type -> how the names of transformers' classes begin."""

MOST_LAYERS, MOST_SIZE = 1024, 1 << 24
"""Layers, and widths or rows, that a ``config.json`` may ask for."""
_SIZE = re.compile("size|layers|heads|_dim|^d_|^num_")

TOKEN_KEYS = ("image_token_index", "image_token_id", "video_token_index", "video_token_id")

OTHER_TOWER = "-other-tower"
"""Suffix of the model_type of a model whose image encoder transformers' InstructBLIP does not have,
so that transformers refuses it instead of loading it wrong."""


def is_known(model_type: object) -> bool:
    """Whether a model_type is that of a BLIP-2 or an InstructBLIP, of transformers or of ours."""
    return str(model_type).removesuffix(OTHER_TOWER) in READERS


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "_Config":
        width, heads = getattr(self, "hidden_size", 1), getattr(self, "num_attention_heads", 1)
        if width % heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads; got {width} and {heads}"
            )
        return self


class VisionConfig(_Config):
    """The image encoder: a pre-norm ViT. The defaults are EVA-CLIP g/14, as in the paper."""

    hidden_size: int = Field(default=1408, gt=0, description="Width V of the image encoder.")
    intermediate_size: int = Field(default=6144, gt=0, description="Width inside the feed-forward.")
    num_hidden_layers: int = Field(default=39, gt=0, description="Number of transformer layers.")
    num_attention_heads: int = Field(default=16, gt=0, description="Attention heads per layer.")
    image_size: int = Field(default=224, gt=0, description="Side S of the square image in pixels.")
    patch_size: int = Field(default=14, gt=0, description="Side of a patch in pixels.")
    hidden_act: Activation = Field(default="gelu", description="Activation of the feed-forward.")
    layer_norm_eps: float = Field(default=1e-6, gt=0, description="Epsilon of every LayerNorm.")
    post_layernorm_eps: float | None = Field(
        default=None,
        gt=0,
        description="Epsilon of the last LayerNorm, where it differs (LAVIS: 1e-5).",
    )
    attention_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on attention weights."
    )
    qkv_bias: bool = Field(
        default=True, description="Whether the fused query-key-value layer has a bias."
    )

    class_token: bool = Field(
        default=True, description="Whether a class token comes first (SigLIP: no)."
    )
    pre_layernorm: bool = Field(
        default=False, description="A LayerNorm before the first layer (CLIP: yes)."
    )

    @model_validator(mode="after")
    def _holds_a_patch(self) -> "VisionConfig":
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size must hold one patch; got {self.image_size} < {self.patch_size}"
            )
        return self

    @property
    def grid(self) -> int:
        """G: patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the G * G patches."""
        return int(self.class_token)

    @property
    def num_tokens(self) -> int:
        """P: patches, and the class token where there is one."""
        return self.num_prefix_tokens + self.grid**2

    @property
    def in_transformers(self) -> bool:
        """Whether transformers' InstructBLIP has such an image encoder."""
        return self.class_token and not self.pre_layernorm and self.hidden_act != "quick_gelu"


class EncoderConfig(_Config):
    """An image encoder that ``VisionModel`` cannot express (``model/encoders.py``)."""

    encoder: dict[str, Any] = Field(description="Its own config, with a model_type, as a dict.")
    hidden_size: int = Field(gt=0, description="Width V of the image encoder.")
    image_size: int = Field(gt=0, description="Side S of the square image in pixels.")
    patch_size: int = Field(gt=0, description="Side in pixels of a token of the grid.")
    num_prefix_tokens: int = Field(
        default=0, ge=0, description="Class and register tokens, which come before the grid."
    )
    add_positions: bool = Field(
        default=False, description="Add the place in the grid, which convolutions do not tell."
    )

    @model_validator(mode="after")
    def _holds_whole_patches(self) -> "EncoderConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of {self.patch_size}, the pixels of a token of "
                f"this image encoder; got {self.image_size}"
            )
        return self

    @property
    def grid(self) -> int:
        """G: tokens along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """P: those before the grid, then the G * G of the grid, row by row."""
        return self.num_prefix_tokens + self.grid**2

    @property
    def num_hidden_layers(self) -> int:
        """Layers, or blocks of all stages; 0 where its config does not tell."""
        return self.encoder.get("num_hidden_layers") or sum(self.encoder.get("depths", ()))

    @property
    def in_transformers(self) -> bool:
        """Never: transformers' InstructBLIP has a ``VisionModel`` alone."""
        return False


class QFormerConfig(_Config):
    """The Q-Former: BERT-base with cross-attention in every second layer (BLIP-2, section 3.1)."""

    vocab_size: int = Field(default=30522, gt=0, description="Rows of the text embedding.")
    hidden_size: int = Field(default=768, gt=0, description="Width D of the Q-Former.")
    num_hidden_layers: int = Field(default=12, gt=0, description="Number of transformer layers.")
    num_attention_heads: int = Field(default=12, gt=0, description="Attention heads per layer.")
    intermediate_size: int = Field(
        default=3072, gt=0, description="Width inside the feed-forwards."
    )
    hidden_act: Activation = Field(default="gelu", description="Activation of the feed-forwards.")
    hidden_dropout_prob: float = Field(
        default=0.1, ge=0, lt=1, description="Dropout on hidden states."
    )
    attention_probs_dropout_prob: float = Field(
        default=0.1, ge=0, lt=1, description="Dropout on attention weights."
    )
    max_position_embeddings: int = Field(
        default=512, gt=0, description="Longest instruction in tokens."
    )
    layer_norm_eps: float = Field(default=1e-12, gt=0, description="Epsilon of every LayerNorm.")
    initializer_range: float = Field(default=0.02, gt=0, description="Deviation of new weights.")
    pad_token_id: int | None = Field(default=0, description="Row of the text embedding that pads.")
    cross_attention_frequency: int = Field(
        default=2, gt=0, description="Every n-th layer, the first included, attends to the image."
    )
    encoder_hidden_size: int = Field(
        default=1408, gt=0, description="Width V of the image features."
    )


class LoraConfig(_Config):
    """Low-rank matrices beside those of frozen layers (``model/lora.py``)."""

    rank: int = Field(default=16, gt=0, description="Rows of A, columns of B.")
    alpha: float = Field(default=32, gt=0, description="The product is scaled by alpha / rank.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    rank_pattern: dict[str, PositiveInt] = Field(
        default={}, description="Ends of layer names, as regular expressions, to their rank."
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default={}, description="Ends of layer names, as regular expressions, to their alpha."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the input.")
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="Ends of the names of adapted layers, as regular expressions; null for those "
        "that make queries and values.",
    )

    @model_validator(mode="after")
    def _patterns_compile(self) -> "LoraConfig":
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *(self.targets or ())):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return self


class InstructBlipConfig(_Config):
    """The whole model. ``instruction_aware=False`` is BLIP-2: a Q-Former without a text branch."""

    vision: VisionConfig | EncoderConfig = Field(description="The image encoder.")
    qformer: QFormerConfig = Field(description="The Q-Former.")
    language: dict[str, Any] = Field(description="transformers' text config as a dict.")
    num_query_tokens: int = Field(
        default=32, gt=0, le=4096, description="Query tokens Q per image."
    )
    instruction_aware: bool = Field(
        default=True, description="Whether the Q-Former reads the instruction."
    )
    image_token_id: int | None = Field(
        default=None,
        description="Id that transformers' processor uses as a placeholder for a query.",
    )
    video: bool = Field(
        default=False,
        description="Whether transformers reads it as InstructBlipVideo; the weights are the same.",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> "InstructBlipConfig":
        if self.qformer.encoder_hidden_size != self.vision.hidden_size:
            raise ValueError(
                "qformer.encoder_hidden_size must equal vision.hidden_size; got "
                f"{self.qformer.encoder_hidden_size} and {self.vision.hidden_size}"
            )
        return self

    @classmethod
    def from_transformers(cls, config: dict[str, Any]) -> "InstructBlipConfig":
        """Read a ``config.json`` of a model_type among ``READERS``.

        Raises ValueError for any other model_type and for values that our parts cannot express.
        """
        kind = config.get("model_type")
        if not is_known(kind):
            raise ValueError(
                f"model_type must be one of {', '.join(READERS)}; got {kind!r}. Give a directory "
                "that transformers' InstructBlip or Blip2 wrote, or one that this project wrote."
            )
        given, reader, text = (
            _section(config, f"{part}_config") for part in ("vision", "qformer", "text")
        )
        other = "encoder" in given
        vision = _select(EncoderConfig if other else VisionConfig, given)
        vision = {name: value for name, value in vision.items() if value is not None}
        for name in {"image_size", "patch_size"} & vision.keys():
            vision[name] = _side(vision[name], name)
        vision_config = EncoderConfig(**vision) if other else VisionConfig(**vision)
        qformer = _select(QFormerConfig, reader)
        # transformers derives this width as well and ignores what the file says.
        qformer["encoder_hidden_size"] = vision_config.hidden_size
        return cls(
            vision=vision_config,
            qformer=QFormerConfig(**qformer),
            language={"model_type": "opt", **text},
            num_query_tokens=config.get("num_query_tokens", 32),
            instruction_aware=str(kind).startswith("instructblip"),
            image_token_id=next((config[key] for key in TOKEN_KEYS if key in config), None),
            video=str(kind).startswith("instructblipvideo"),
        )

    @property
    def kind(self) -> str:
        """transformers' model_type."""
        if not self.instruction_aware:
            return "blip-2"
        return "instructblipvideo" if self.video else "instructblip"

    @property
    def reader(self) -> str:
        """transformers' class that loads the model."""
        return READERS[self.kind] + "ForConditionalGeneration"

    def to_transformers(self) -> dict[str, Any]:
        """The ``config.json`` that ``reader`` reads."""
        language = dict(self.language)
        # transformers 5 writes T5's untied head as (tie_word_embeddings=True,
        # scale_decoder_outputs=False); only tie_word_embeddings=False means it in 4 and 5 alike.
        if language.get("scale_decoder_outputs") is False:
            language["tie_word_embeddings"] = False
        kind, prefix = self.kind, self.kind.replace("-", "_")
        vision = self.vision.model_dump(exclude_none=True)
        if self.vision.in_transformers:
            vision = {k: v for k, v in vision.items() if k not in ("class_token", "pre_layernorm")}
        return {
            "model_type": kind if self.vision.in_transformers else kind + OTHER_TOWER,
            "architectures": [self.reader],
            "vision_config": {"model_type": f"{prefix}_vision_model", **vision},
            "qformer_config": {"model_type": f"{prefix}_qformer", **self.qformer.model_dump()},
            "text_config": language,
            "num_query_tokens": self.num_query_tokens,
            "video_token_index" if kind == "instructblipvideo" else "image_token_index": (
                self.image_token_id
            ),
        }


def _section(config: dict[Any, Any], name: Any) -> dict[Any, Any]:
    """A part of a ``config.json``. ValueError if it is no object, or has a size that no model has,
    which would be built until the memory is full."""
    values = config.get(name) or {}
    if not isinstance(values, dict):
        raise ValueError(f"config.json: {name} is {str(values)[:80]!r}; expected an object")
    for key, value in values.items():
        if isinstance(value, dict):
            _section(values, key)
        most = MOST_LAYERS if "layers" in str(key) else MOST_SIZE  # id2label has numbers as keys
        if _SIZE.search(str(key)) and isinstance(value, int) and value > most:
            raise ValueError(f"config.json: {name}.{key} is {value}; expected at most {most}")
    return values


def _select(config: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``values`` that ``config`` has; transformers adds many without effect here."""
    return {name: values[name] for name in config.model_fields if name in values}


def _side(value: Any, name: str) -> int:
    """An edge length from transformers' int or [height, width]."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ValueError(f"{name} must be square; got {value}")
    return sides.pop()
