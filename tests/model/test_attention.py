"""Packed attention uses a kernel only where it agrees with rows attended to one by one.

The kernel needs a GPU; a function with the same signature replaces it here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.model.language.adapters import checkpoint_layers
from instructblip.model.language.fast import attention
from tests.model.test_activations import gradients
from tests.model.test_language import tiny_model
from tests.parity.tiny import tiny_batch

CPU = torch.device("cpu")


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The documented behaviour of ``varlen_attn``."""
    assert query.shape[1] == key.shape[1], "heads are not shared by default"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert sum(lengths) == len(query) == len(key)
    assert max_q == max_k == max(lengths)
    rows = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True)
    causal = window_size == (-1, 0)
    results = [F.scaled_dot_product_attention(*row, is_causal=causal, scale=scale) for row in rows]
    return torch.cat(results, 1).transpose(0, 1)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """The CPU counts as a device of the kernel."""
    monkeypatch.setattr(attention, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(attention, "KERNEL_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(attention, "ONE_BY_ONE", ())
    attention._kernel_agrees.cache_clear()
    yield
    attention._kernel_agrees.cache_clear()


@pytest.mark.parametrize("language", ["llama", "opt", "gpt2", "qwen2"])
def test_packed_equals_padded_with_the_kernel(
    language: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []

    def counted(*states: Tensor, **settings: Any) -> Tensor:
        calls.append(len(states[0]))
        return reference(*states, **settings)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(attention, "varlen_attn", counted)
    monkeypatch.setattr(attention, "KERNEL_WIDTHS", range(1, 257))  # tiny heads are 4 wide
    model = tiny_model(language)
    batch = tiny_batch(model.config)
    losses, packed = model.loss(batch), gradients(model, batch)
    tokens = model.language.join(model.encode_queries(batch), batch).inputs_embeds.shape[1]
    assert calls.count(tokens) >= 2  # besides the comparison's
    model.language_model.set_attn_implementation("sdpa")
    padded = model.loss(batch)
    torch.testing.assert_close(losses.sample_losses, padded.sample_losses, rtol=1e-5, atol=1e-5)
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(packed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("language", ["llama", "opt"])
def test_the_comparison_may_run_inside_a_checkpointed_layer(
    language: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "varlen_attn", reference)
    monkeypatch.setattr(attention, "KERNEL_WIDTHS", range(1, 257))
    model = tiny_model(language)
    batch = tiny_batch(model.config)
    expected = gradients(model, batch)
    attention._kernel_agrees.cache_clear()
    checkpoint_layers(model.language_model)
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert attention._kernel_agrees.cache_info().hits


def sees_ahead(*states: Any, **settings: Any) -> Tensor:
    return reference(*states, **settings | {"window_size": (-1, -1)})


def sees_other_rows(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    rows = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(*rows, is_causal=True).transpose(0, 1)


def has_no_gradient(*states: Any, **settings: Any) -> Tensor:
    return reference(*states, **settings).detach()


def halves_the_gradient(*states: Any, **settings: Any) -> Tensor:
    result = reference(*states, **settings)
    return result / 2 + result.detach() / 2


def has_another_signature(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, is_causal: bool = False
) -> Tensor:
    raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (sees_ahead, "differs"),
        (sees_other_rows, "differs"),
        (has_no_gradient, "fails"),
        (halves_the_gradient, "differs"),
        (has_another_signature, "TypeError"),
        (None, "fails"),
        (attention.varlen_attn, "fails"),  # the kernel itself, which does not run on a CPU
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_fails_or_differs_is_not_used(
    kernel: Callable[..., Tensor] | None,
    says: str,
    dtype: torch.dtype,
    on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
):
    query = torch.zeros(1, 2, 4, 16, dtype=dtype)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    with pytest.warns(UserWarning, match=says):
        assert not attention.kernel_works_on(query)
    attention._kernel_agrees.cache_clear()
    monkeypatch.setattr(attention, "varlen_attn", reference)
    assert attention.kernel_works_on(query)


def test_the_comparison_keeps_the_random_state_and_runs_in_inference_mode(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "varlen_attn", reference)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert attention.kernel_works_on(torch.zeros(1, 2, 4, 16))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("width", [12, 264])
def test_head_widths_without_a_kernel(width: int, on_cpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "varlen_attn", reference)
    assert not attention.kernel_works_on(torch.zeros(1, 2, 4, width))


def test_a_cpu_does_not_use_the_kernel():
    assert not attention.kernel_works_on(torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_itself():
    query = torch.zeros(1, 2, 4, 64, dtype=torch.bfloat16, device="cuda")
    assert attention.kernel_works_on(query)
