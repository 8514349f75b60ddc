"""Cross-attention in fewer products against the plain one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from instructblip.model.config import QFormerConfig
from instructblip.model.fast import cross_attend
from instructblip.model.qformer import MultiHeadAttention

CONFIG = QFormerConfig(
    vocab_size=8,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=8,
    encoder_hidden_size=10,
    attention_probs_dropout_prob=0.5,
)
ROWS, TOKENS, HEADS = 4, 9, CONFIG.num_attention_heads
WIDTH = CONFIG.hidden_size // HEADS


@pytest.fixture
def attention() -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(CONFIG, CONFIG.encoder_hidden_size).double()


def run(call: Callable, attention: MultiHeadAttention, queries: int) -> dict[str, torch.Tensor]:
    """Result and gradients of queries [4, queries, 24] that read states [4, 9, 10]."""
    torch.manual_seed(1)
    hidden = torch.randn(ROWS, queries, CONFIG.hidden_size).double().requires_grad_()
    states = torch.randn(ROWS, TOKENS, CONFIG.encoder_hidden_size).double().requires_grad_()
    context = call(attention, hidden, states)
    inputs = {"hidden": hidden, "states": states, **dict(attention.named_parameters())}
    gradients = torch.autograd.grad((context * torch.randn_like(context)).sum(), [*inputs.values()])
    return {"context": context, **dict(zip(inputs, gradients, strict=True))}


@pytest.mark.parametrize("queries", [1, WIDTH - 1, WIDTH])
def test_equals_the_plain_attention(
    attention: MultiHeadAttention, queries: int, monkeypatch: pytest.MonkeyPatch
):
    attention.eval()
    fast = run(cross_attend, attention, queries)
    if queries < WIDTH:  # and not because it ran the plain attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", None)
        run(cross_attend, attention, queries)
        monkeypatch.undo()
    for name, value in run(MultiHeadAttention.forward, attention, queries).items():
        torch.testing.assert_close(fast[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_weights_drop_as_in_the_plain_attention(
    attention: MultiHeadAttention, monkeypatch: pytest.MonkeyPatch
):
    """Where weights no longer sum to one, the bias of the values counts as often as their sum."""
    dropped = (
        torch.rand(ROWS, HEADS, 3, TOKENS).double().round() * 2
    )  # each weight twice, or nothing

    def plain(attention: MultiHeadAttention, hidden: torch.Tensor, states: torch.Tensor):
        query, key, value = (
            part(x).unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
            for part, x in (
                (attention.query, hidden),
                (attention.key, states),
                (attention.value, states),
            )
        )
        weights = (query @ key.mT * WIDTH**-0.5).softmax(-1) * dropped
        return (weights @ value).transpose(1, 2).flatten(2)

    def drop(weights: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
        assert (rate, training) == (0.5, True)
        return weights * dropped.flatten(1, 2)

    monkeypatch.setattr(F, "dropout", drop)
    fast = run(cross_attend, attention.train(), 3)
    for name, value in run(plain, attention, 3).items():
        torch.testing.assert_close(fast[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_half_precision_uses_the_plain_attention(attention: MultiHeadAttention):
    attention.float().eval()
    hidden, states = torch.randn(ROWS, 2, 24), torch.randn(ROWS, TOKENS, 10)
    with torch.autocast("cpu", torch.bfloat16):
        fast = cross_attend(attention, hidden, states)
        assert torch.equal(fast, attention(hidden, states))
    attention.bfloat16()
    hidden, states = hidden.bfloat16(), states.bfloat16()
    fast = cross_attend(attention, hidden, states)
    assert torch.equal(fast, attention(hidden, states))


def test_rows_that_share_an_image_project_it_once(attention: MultiHeadAttention):
    """The plain definition makes keys and values for 2 images, not for 4 rows."""
    made: list[tuple[int, ...]] = []
    attention.key.register_forward_hook(lambda *args: made.append(tuple(args[2].shape)))
    index = torch.tensor([0, 1, 1, 0])
    hidden, states = torch.randn(ROWS, 2, 24).double(), torch.randn(2, TOKENS, 10).double()
    attention.eval()
    shared = cross_attend(attention, hidden, states, index)
    assert made == [(2, TOKENS, 24)]
    torch.testing.assert_close(
        shared, cross_attend(attention, hidden, states[index]), rtol=1e-6, atol=1e-7
    )
