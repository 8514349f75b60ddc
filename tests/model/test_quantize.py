"""Frozen weights in 8 or 4 bits: their error, their gradients, and checkpoints without codes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from instructblip.experiment.memory import saved_bytes
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.quantize import (
    NF4,
    QuantizedLinear,
    quantize_linears,
    quantized_bytes,
)
from instructblip.model.lora import lora_layers
from instructblip.model.placement import Kind
from tests.model.test_activations import gradients
from tests.model.test_language import tiny_model
from tests.model.test_lora import adapted
from tests.parity.tiny import tiny_batch, tiny_transformers

ERRORS: dict[Kind, float] = {"int8": 0.01, "fp8": 0.035, "nf4": 0.11}
"""Relative root mean square error of normal weights: 8 bits, 3 bits of mantissa, 4 bits."""


@pytest.mark.parametrize("kind", ERRORS)
def test_codes_approximate_the_weights(kind: Kind):
    torch.manual_seed(0)
    linear = nn.Linear(96, 50).requires_grad_(False)
    nn.init.normal_(linear.weight, std=0.02)
    layer = QuantizedLinear(linear, kind)
    weight = layer.dequantized(torch.float32)
    error = (weight - linear.weight).norm() / linear.weight.norm()
    assert ERRORS[kind] / 4 < error < ERRORS[kind]
    again = QuantizedLinear(nn.Linear(96, 50), kind)
    again.codes, again.scale = layer.codes, layer.scale
    assert torch.equal(again.dequantized(torch.float32), weight)
    numbers = layer.codes.numel() + 4 * layer.scale.numel()
    assert numbers < linear.weight.numel() * (0.6 if kind == "nf4" else 1.1)


@pytest.mark.parametrize("kind", ERRORS)
def test_layers_hold_codes_and_scales_alone(kind: Kind):
    """And what nf4 looks up. The size is known before the weights are quantized."""
    linear = nn.Linear(100, 50, bias=False).requires_grad_(False)
    layer = QuantizedLinear(linear, kind)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    table = 256 * 2 * 4 if kind == "nf4" else 0
    assert held == quantized_bytes(linear, kind) + table


def test_layers_are_quantized_on_their_device():
    """One at a time: the codes are on the device that a layer's name gives, and no weight is."""
    language: Any = tiny_model("llama").requires_grad_(False).language_model
    other = next(language.model.layers[1].parameters()).device
    meta = torch.device("meta")
    quantize_linears(language, "nf4", lambda name: meta if "layers.0." in name else other)
    for name, module in language.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.codes.is_meta == module.scale.is_meta == ("layers.0." in name)
    assert not language.get_output_embeddings().weight.is_meta


def test_levels_are_the_quantiles_of_a_normal_distribution():
    normal = torch.distributions.Normal(0, 1)
    edge = 1 - (1 / 32 + 1 / 30) / 2
    below = normal.icdf(torch.linspace(edge, 0.5, 8, dtype=torch.float64))[:-1]
    above = normal.icdf(torch.linspace(edge, 0.5, 9, dtype=torch.float64))[:-1]
    levels = torch.cat([-below, torch.zeros(1), above.flip(0)]) / above[0]
    levels[0] = -1
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), levels, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ERRORS)
def test_gradient_of_the_inputs(kind: Kind):
    linear = nn.Linear(20, 12).requires_grad_(False)
    layer = QuantizedLinear(linear, kind)
    same = nn.Linear(20, 12)
    same.weight.data, same.bias.data = layer.dequantized(torch.float32), linear.bias.data
    x = torch.randn(3, 5, 20, requires_grad=True)
    (expected,) = torch.autograd.grad(same(x).square().sum(), x)
    (got,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_model_in_8_bits(language: str, tmp_path: Path):
    tiny_transformers(language).save_pretrained(tmp_path / "start")
    plain = InstructBlip.from_pretrained(tmp_path / "start")
    batch = tiny_batch(plain.config)
    expected, exact = plain.loss(batch).loss_sum, gradients(plain, batch)
    kept = saved_bytes(lambda: plain.loss(batch).loss_sum, plain)
    model = InstructBlip.from_pretrained(tmp_path / "start")
    quantize_linears(model.language_model, "int8")
    assert isinstance(model.language_model.get_output_embeddings(), nn.Linear)
    loss = model.loss(batch).loss_sum
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    for name, value in gradients(model, batch).items():
        error = (value - exact[name]).norm()
        assert error <= 0.1 * exact[name].norm() + 1e-3, name
    assert saved_bytes(lambda: model.loss(batch).loss_sum, model) <= kept
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == load_file(tmp_path / "start" / "model.safetensors").keys()
    for name, value in load_file(tmp_path / "start" / "model.safetensors").items():
        assert torch.equal(stored[name], value), name


@pytest.mark.parametrize("language", ["llama", "t5"])
@pytest.mark.parametrize("kind", ERRORS)
def test_quantized_layers_keep_their_adapters(language: str, kind: Kind, tmp_path: Path):
    tiny_transformers(language).save_pretrained(tmp_path / "start")
    plain = InstructBlip.from_pretrained(tmp_path / "start")
    batch = tiny_batch(plain.config)
    quantize_linears(plain.language_model, kind)
    model = adapted(InstructBlip.from_pretrained(tmp_path / "start"))
    before = lora_layers(model.language_model)
    quantize_linears(model.language_model, kind)
    assert lora_layers(model.language_model) == before
    assert model.loss(batch).loss_sum != plain.loss(batch).loss_sum
    computed = gradients(model, batch)
    named = [name for name in computed if name.endswith("lora.B")]
    assert len(named) == len(before)
    assert all(computed[name].abs().max() > 0 for name in named)
    model.save_pretrained(tmp_path / "saved")
    kept = lora_layers(InstructBlip.from_pretrained(tmp_path / "saved").language_model)
    for name, adapter in kept.items():
        assert torch.equal(adapter.B, before[name].B)
    for adapter in before.values():
        adapter.B.data.zero_()
    torch.testing.assert_close(model.loss(batch).loss_sum, plain.loss(batch).loss_sum)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="gpt2 has no linear layers"):
        quantize_linears(tiny_model("gpt2").language_model, "int8")


def test_trainable_weights_are_refused():
    model: InstructBlip = tiny_model("llama").set_trainable(("language_model",))
    with pytest.raises(ValueError, match=r"model.quantize=nf4 needs a frozen.*q_proj trains"):
        quantize_linears(model.language_model, "nf4")
