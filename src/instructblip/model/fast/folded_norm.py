"""The last LayerNorm of the image encoder, folded into the weights that read its output.

The plain definition is ``qformer(..., norm(features), ...)``. With normalized features x, scale s
and shift t, a layer behind the norm computes

    W (s x + t) + b  =  (W s) x + (W t + b)

and the right side needs gradients of the small s and t only, not of the many features x: at most
43 ms in a step of cpu-mid (benchmarks/train_step_cpu_2026-11-23.md).
"""

import re

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

READERS = re.compile(r"crossattention\.attention\.(key|value)\.weight$")
"""The layers of a Q-Former that read the features."""


def fold_norm(
    norm: nn.LayerNorm, qformer: nn.Module, features: Float[Tensor, "N P V"]
) -> tuple[Float[Tensor, "N P V"], dict[str, Tensor]]:
    """Features without scale and shift of the norm, and weights of ``qformer`` with both."""
    weights = dict(qformer.named_parameters())
    folded = {}
    for name in filter(READERS.search, weights):
        bias = name.removesuffix("weight") + "bias"
        folded[name] = weights[name] * norm.weight
        folded[bias] = torch.addmv(weights[bias], weights[name], norm.bias)
    features = features.to(norm.weight.dtype)
    return F.layer_norm(features, norm.normalized_shape, eps=norm.eps), folded
