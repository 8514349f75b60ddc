"""Frozen linear layers of the language model in 8 or 4 bits.

Each product, forward and backward, dequantizes the weights and discards them again, so autograd
keeps only the codes. No custom kernel is involved: it runs wherever PyTorch runs, and it saves
memory but no time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from instructblip.model.placement import Kind

BLOCK = 64
"""Consecutive nf4 weights that share a scale."""

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
"""The sixteen levels of NormalFloat4: quantiles of a normal distribution (QLoRA, appendix E)."""


def quantize(weight: Float[Tensor, "out in"], kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes as uint8 and scales in fp32: one scale per row for int8 and fp8, one per block of
    ``BLOCK`` weights for nf4, which stores two codes in a byte."""
    weight = weight.detach().float()
    if kind == "nf4":
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
        levels = torch.tensor(NF4, device=weight.device)
        middle = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(blocks / scale, middle).to(torch.uint8).flatten()
        return codes[0::2] * 16 + codes[1::2], scale[:, 0]
    largest = 127.0 if kind == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    scaled = weight / scale
    codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scale


def dequantize(
    codes: Tensor,
    scale: Tensor,
    kind: Kind,
    shape: tuple[int, int],
    dtype: torch.dtype,
    pairs: Float[Tensor, "256 2"] | None = None,
) -> Float[Tensor, "out in"]:
    """The weights that `quantize` encoded, rounded to its levels. nf4 reads ``pairs``, the two
    levels of each code (`pair_table`), on the device of the codes."""
    if kind == "nf4":
        assert pairs is not None
        blocks = F.embedding(codes.int(), pairs).view(-1, BLOCK) * scale[:, None]
        return blocks.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)
    if kind == "int8":
        return (codes.view(torch.int8) * scale).to(dtype)
    return (codes.view(torch.float8_e4m3fn).to(scale.dtype) * scale).to(dtype)


def pair_table(device: torch.device) -> Float[Tensor, "256 2"]:
    """The levels of the two nf4 weights in each byte."""
    levels = torch.tensor(NF4, device=device)
    return torch.cartesian_prod(levels, levels)


def quantized_bytes(linear: nn.Linear, kind: Kind) -> int:
    """Bytes of codes and scales of a layer's weight."""
    blocks = -(-linear.weight.numel() // BLOCK)
    if kind == "nf4":
        return blocks * (BLOCK // 2 + 4)
    return linear.weight.numel() + 4 * linear.out_features


class _Product(torch.autograd.Function):
    """inputs @ weight.T, with a gradient for the inputs only."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(inputs, layer.dequantized(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return outer[0] @ ctx.layer.dequantized(outer[0].dtype), None


class QuantizedLinear(nn.Module):
    """A frozen nn.Linear whose weight is stored as codes."""

    codes: Tensor
    scale: Tensor
    pairs: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kind: Kind, device: torch.device | None = None) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = quantize(linear.weight.detach().to(device or linear.weight.device), kind)
        # Not in the state dict: a checkpoint contains the original weights.
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        # A copy for each product would wait for the device.
        pairs = pair_table(codes.device) if kind == "nf4" else None
        self.register_buffer("pairs", pairs, persistent=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The codes, since transformers reads the dtype of the weight of T5's layers."""
        return self.codes.view(torch.int8)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        return dequantize(self.codes, self.scale, self.kind, shape, dtype, self.pairs)

    def forward(self, inputs: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        product = _Product.apply(inputs, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def quantize_linears(
    model: Any, kind: Kind, device_of: Callable[[str], torch.device] | None = None
) -> None:
    """Quantize every linear layer of a language model except its head; LoRA adapters stay.

    ``device_of`` gives the device on which a layer, by its name, is quantized and its codes stay:
    only one weight in full precision is there at a time. None: where the weight is.

    Raises ValueError if one of the layers is trainable, or if there is none.
    """
    head = model.get_output_embeddings()
    linears = [
        (f"{name}.{child}" if name else child, parent, child, layer)
        for name, parent in model.named_modules()
        for child, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and layer is not head
    ]
    if not linears:
        raise ValueError(
            f"model.quantize={kind}: a {model.config.model_type} has no linear layers to "
            "quantize; remove the key"
        )
    while linears:  # a weight is freed as soon as its codes are there
        name, parent, child, layer = linears.pop(0)
        if layer.weight.requires_grad:
            raise ValueError(
                f"model.quantize={kind} needs a frozen language model, and {name} "
                "trains: remove language_model from training.trainable, or add model.lora"
            )
        quantized = QuantizedLinear(layer, kind, device_of(name) if device_of else None)
        if "lora" in layer._modules:  # the adapter, and the hook that applies it
            quantized.lora, quantized._forward_hooks = layer.lora, layer._forward_hooks
        setattr(parent, child, quantized)


def quantized_names(model: nn.Module) -> list[str]:
    """The state-dict names of the weights that are quantized now."""
    return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
