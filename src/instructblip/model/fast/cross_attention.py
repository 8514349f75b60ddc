"""Cross-attention in fewer products: an image has more tokens than there are queries.

The plain definition is ``MultiHeadAttention.forward``. It projects all Y tokens x of an image to
keys and values. The same scores come from (K x) . q = x . (K' q): each head takes its queries to
the width W of the image, and what they read there into the width of the head. With H heads, Q
queries of width D, that is H Q Y W + Q D W multiplications for the scores instead of Y W D + Q Y D.
1008 -> 973 ms in a step of cpu-mid (benchmarks/train_step_cpu_2026-11-23.md).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def pays(hidden: Float[Tensor, "M Q D"], num_heads: int) -> bool:
    """Whether fewer products are faster and as exact.

    They are faster where queries are fewer than a head is wide (32 and 64 in the paper). In half
    precision fused kernels keep scores in fp32, and a product would round them.
    """
    half = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype.itemsize < 4
    return not half and hidden.shape[1] < hidden.shape[2] // num_heads


def attend_in_fewer_products(
    hidden: Float[Tensor, "M Q D"],
    states: Float[Tensor, "M Y W"],
    projections: tuple[nn.Linear, nn.Linear, nn.Linear],
    num_heads: int,
    dropout: float,
) -> Float[Tensor, "M Q D"]:
    """Attention of ``hidden`` over ``states``; ``projections`` make queries, keys and values."""
    to_query, to_key, to_value = projections
    count, width = hidden.shape[1], hidden.shape[2] // num_heads
    key, value = (x.weight.unflatten(0, (num_heads, -1)) for x in (to_key, to_value))
    query = to_query(hidden).unflatten(2, (num_heads, -1)) * width**-0.5
    query = query.permute(2, 0, 1, 3).flatten(1, 2)  # [heads, M*Q, D/heads]
    query = (query @ key).unflatten(1, (-1, count)).transpose(0, 1)  # [M, heads, Q, W]
    scores = query.flatten(1, 2) @ states.transpose(1, 2)  # [M, heads*Q, Y]
    weights = F.dropout(scores.softmax(-1), dropout, dropout > 0)
    context = (weights @ states).unflatten(1, (num_heads, -1)).transpose(0, 1).flatten(1, 2)
    context = (context @ value.mT).unflatten(1, (-1, count))  # [heads, M, Q, D/heads]
    # The bias of the values counts as often as the weights sum up to: once, but for dropout. The
    # bias of the keys moves all scores of a query alike, which softmax ignores: its gradient is
    # zero, and 0 * sum makes it exist.
    total = weights.sum(2).unflatten(1, (num_heads, -1)).transpose(0, 1)[..., None]
    context = context + total * to_value.bias.view(num_heads, 1, 1, -1) + 0 * to_key.bias.sum()
    return context.permute(1, 2, 0, 3).flatten(2)
