"""Fused layers over packed rows: the results and gradients of their plain definitions."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from instructblip.experiment.memory import saved_bytes
from instructblip.model.language.fast.llama import (
    _FrozenLinears,
    _FrozenRMSNorm,
    _project,
    _Rotation,
    _SiluTimes,
)
from tests.model.test_activations import gradients
from tests.model.test_language import tiny_model
from tests.parity.tiny import tiny_batch

FUSED = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "smollm3", "phi3"]
"""Decoders whose layers are like Llama's."""


def gradient(result: Tensor, states: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    outer = torch.randn(result.shape, generator=generator).to(result.dtype)
    return torch.autograd.grad(result, states, outer)[0]


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_frozen_norm(dtype: torch.dtype, apart: float):
    theirs = LlamaRMSNorm(16, eps=0.1).to(dtype).requires_grad_(False)
    theirs.weight.uniform_(0.5, 1.5)
    states = torch.randn(1, 5, 16, dtype=dtype, requires_grad=True)
    expected = theirs(states)
    got = _FrozenRMSNorm.apply(states, theirs.weight, 0.1)
    torch.testing.assert_close(got, expected, rtol=apart, atol=apart)
    torch.testing.assert_close(
        gradient(got, states), gradient(expected, states), rtol=apart, atol=apart
    )


def test_rotation():
    angles = torch.rand(1, 5, 4)
    cos, sin = (torch.cat([x, x], -1) for x in (angles.cos(), angles.sin()))
    states = torch.randn(1, 5, 2, 8, requires_grad=True)
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin, unsqueeze_dim=2)
    got = _Rotation.apply(states, cos[:, :, None], angles.sin()[:, :, None])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, states), gradient(expected, states))


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gate(dtype: torch.dtype, apart: float):
    gate, up = (torch.randn(1, 5, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    for states in (gate, up):
        expected, got = torch.nn.functional.silu(gate) * up, _SiluTimes.apply(gate, up)
        torch.testing.assert_close(got, expected, rtol=apart, atol=apart)
        both = (gradient(result, states) for result in (got, expected))
        torch.testing.assert_close(*both, rtol=apart, atol=apart)
    kept = saved_bytes(lambda: _SiluTimes.apply(gate, up), torch.nn.Identity())
    assert kept == gate.nbytes + up.nbytes  # no activation beside them


@pytest.mark.parametrize("language", ["llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3"])
def test_layers_fuse_the_gate(language: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(language)  # building it runs a probe, which calls the gate as well
    calls: list[int] = []
    apply = _SiluTimes.apply
    monkeypatch.setattr(_SiluTimes, "apply", lambda *xs: calls.append(1) or apply(*xs))
    model.loss(tiny_batch(model.config))
    assert len(calls) == len(model.language_model.model.layers)


def linears(*biases: bool) -> list[torch.nn.Linear]:
    return [torch.nn.Linear(16, 8 + i, bias).requires_grad_(False) for i, bias in enumerate(biases)]


@pytest.mark.parametrize("layers", [linears(False, False), linears(True, False, True)])
def test_frozen_linears(layers: list[torch.nn.Linear]):
    states = torch.randn(1, 5, 16, requires_grad=True)
    got = _project(states, *layers)
    assert type(got[0].grad_fn).__name__ == f"{_FrozenLinears.__name__}Backward"
    expected = [layer(states) for layer in layers]
    torch.testing.assert_close(list(got), expected)
    results = [torch.cat(list(x), dim=2) for x in (got, expected)]
    torch.testing.assert_close(gradient(results[0], states), gradient(results[1], states))


def test_linears_that_train_or_autocast_run_one_by_one():
    states = torch.randn(1, 5, 16, requires_grad=True)
    layers = linears(True, True)
    layers[1].requires_grad_(True)
    sum(x.sum() for x in _project(states, *layers)).backward()
    assert layers[1].weight.grad is not None
    layers[1].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = _project(states, *layers)
    assert first.dtype == second.dtype == torch.bfloat16
    gradient(first + second[..., :8], states)


@pytest.mark.parametrize("language", FUSED)
def test_a_trainable_language_model_has_the_gradients_of_padded_rows(language: str):
    model = tiny_model(language).set_trainable(("qformer", "language_model"))
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    batch = tiny_batch(model.config)
    packed = gradients(model, batch)
    model.language_model.set_attn_implementation("sdpa")
    padded = gradients(model, batch)
    assert packed.keys() == padded.keys()
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("language", FUSED)
def test_the_last_layer_computes_only_labelled_tokens(language: str):
    model = tiny_model(language)
    batch = tiny_batch(model.config)
    counts = []
    for layer in model.language_model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs: counts.append(inputs[0].shape[1])
        )
    model.loss(batch)
    assert counts[-1] == int(batch.response_mask.sum()) < counts[0]


@pytest.mark.parametrize("language", ["llama", "qwen2", "qwen3", "phi3"])
def test_hidden_states_stay_in_fp32_under_autocast(language: str):
    """The states between layers are not rounded to the dtype of the matrix products."""
    model = tiny_model(language).to_training_dtypes(compute_dtype=torch.bfloat16)
    kinds: dict[str, set[torch.dtype]] = {"q-former": set(), "language": set()}

    def note(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, inputs: kinds[name].add(inputs[0].dtype))

    for name, module in model.qformer.named_modules():
        if name.endswith("LayerNorm"):
            note("q-former", module)
    note("language", model.language_model.model.norm)
    model.loss(tiny_batch(model.config))
    assert kinds == {name: {torch.float32} for name in kinds}
