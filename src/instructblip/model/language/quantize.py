"""Frozen weights of the language model in 8 or 4 bits: a linear layer that has no weight to train.

The codes are turned back into numbers for each product, forward and backward, and never kept: what
autograd holds of a layer is the codes. No kernel of its own, so it runs wherever PyTorch does; it
saves memory and not time.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Kind = Literal["int8", "fp8", "nf4"]

BLOCK = 64
"""Neighbouring nf4 weights that share a scale."""

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
"""The sixteen levels of NormalFloat4: quantiles of a normal distribution (QLoRA, appendix E)."""


def quantize(weight: Float[Tensor, "out in"], kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes (bytes) and fp32 scales: one scale a row for int8 and fp8, one a block for nf4."""
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
    codes: Tensor, scale: Tensor, kind: Kind, shape: tuple[int, int], dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """The numbers that the codes stand for."""
    if kind == "nf4":
        levels = torch.tensor(NF4, device=codes.device)
        pairs = torch.stack([codes >> 4, codes & 15], dim=1).flatten().int()
        blocks = levels[pairs].view(-1, BLOCK) * scale[:, None]
        return blocks.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)
    stored = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return (codes.view(stored).to(scale.dtype) * scale).to(dtype)


class _Product(torch.autograd.Function):
    """inputs @ weight.T with a gradient for the inputs alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(inputs, layer.dequantized(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return outer[0] @ ctx.layer.dequantized(outer[0].dtype), None


class QuantizedLinear(nn.Module):
    """A frozen nn.Linear whose weight is kept as codes."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = quantize(linear.weight, kind)
        # No part of the state dict: what is saved are the weights as they were before.
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The codes: transformers asks T5's layers for the type of their weight."""
        return self.codes.view(torch.int8)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        return dequantize(self.codes, self.scale, self.kind, shape, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        product = _Product.apply(inputs, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def quantize_linears(model: Any, kind: Kind) -> None:
    """Quantize every linear layer of a language model but its head; adapters beside them stay.

    Raises ValueError if any of them trains, or if there is none.
    """
    head, found = model.get_output_embeddings(), False
    for name, parent in list(model.named_modules()):
        for child, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or layer is head:
                continue
            if layer.weight.requires_grad:
                raise ValueError(
                    f"model.quantize={kind} needs a frozen language model, and {name}.{child} "
                    "trains: take language_model out of training.trainable, or add model.lora"
                )
            quantized = QuantizedLinear(layer, kind)
            if "lora" in layer._modules:  # the adapter, and the hook that adds what it says
                quantized.lora, quantized._forward_hooks = layer.lora, layer._forward_hooks
            setattr(parent, child, quantized)
            found = True
    if not found:
        raise ValueError(
            f"model.quantize={kind}: a {model.config.model_type} has no linear layers that could "
            "be quantized; leave it out"
        )


def quantized_names(model: nn.Module) -> list[str]:
    """Names that the weights had before they were quantized."""
    return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
