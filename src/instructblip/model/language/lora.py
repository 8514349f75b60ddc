"""LoRA on the frozen language model, in PEFT's file format.

An adapter adds a product of two thin matrices to the result of a linear layer W:
W x + (alpha / rank) B A x (Hu et al., 2021). B starts at zero, so an untrained adapter changes
nothing. Layers keep their class and their names: the adapter is a submodule ``lora`` of the layer,
applied by a forward hook, whatever format the layer's weights have.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from instructblip.model.checkpoints.weights import read_json, read_weights, write_weights
from instructblip.model.config import LoraConfig

FOLDER = "language_adapter"
"""The folder of the adapter in a model directory."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

TARGETS = {
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "gpt_neox": ("query_key_value",),
}
"""Layers adapted by default, by the last part of their names: the projections to queries and
values, as in the paper. Other model types have ``DEFAULT_TARGETS``."""

DEFAULT_TARGETS = ("q_proj", "v_proj")

UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "lora_bias": False,
}
"""Settings of PEFT beyond plain LoRA, with the values that switch them off."""


class Lora(nn.Module):
    """x [..., in] -> alpha / rank * B A dropout(x) [..., out], with fp32 weights."""

    def __init__(self, inputs: int, outputs: int, config: LoraConfig) -> None:
        super().__init__()
        self.config = config
        self.A = nn.Parameter(torch.empty(config.rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, config.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.rank

    def forward(self, inputs: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        inputs = self.dropout(inputs).to(self.A.dtype)
        return F.linear(F.linear(inputs, self.A), self.B) * self.scale


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + layer.lora(inputs[0]).to(output.dtype)


def add_lora(model: Any, config: LoraConfig) -> None:
    """Add an untrained adapter to each target layer of a transformers language model.

    Raises ValueError if no layer has one of the target names.
    """
    targets = config.targets or TARGETS.get(model.config.model_type, DEFAULT_TARGETS)
    linear = {name: m for name, m in model.named_modules() if _sizes(m) is not None}
    if not _last_parts(linear) & set(targets):
        raise ValueError(
            f"model.lora.targets {list(targets)} are no layers of a {model.config.model_type}; "
            f"choose from {', '.join(sorted(_last_parts(linear)))}"
        )
    for name, layer in linear.items():
        if name.rpartition(".")[2] in targets:
            inputs, outputs = _sizes(layer) or (0, 0)
            layer.lora = Lora(inputs, outputs, config)
            layer.register_forward_hook(_add)


def lora_layers(model: nn.Module) -> dict[str, Lora]:
    """The adapters of a model by the name of their layer."""
    return {
        name.removesuffix(".lora"): m for name, m in model.named_modules() if isinstance(m, Lora)
    }


def save_lora(model: Any, directory: Path) -> None:
    """Write ``directory`` so that PeftModel.from_pretrained(language_model, directory) reads it."""
    layers = lora_layers(model)
    config = next(iter(layers.values())).config
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(_last_parts(layers)),
        "fan_in_fan_out": any(_is_transposed(model.get_submodule(name)) for name in layers),
        "inference_mode": True,
        **UNSUPPORTED,
    }
    directory.mkdir(parents=True)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    write_weights(_peft_weights(model), directory / WEIGHTS_FILE)


def load_lora(model: Any, directory: Path) -> None:
    """Add the adapter in ``directory``, ours or PEFT's, to a language model.

    Raises ValueError for another kind of adapter, and for an adapter of another model.
    """
    values = read_json(directory / CONFIG_FILE)
    odd = {k: values[k] for k, plain in UNSUPPORTED.items() if values.get(k) not in (plain, None)}
    if values.get("peft_type") != "LORA" or odd:
        raise ValueError(
            f"{directory / CONFIG_FILE}: expected a plain LORA adapter; got "
            f"{values.get('peft_type')} with {odd or 'nothing else'}. Merge it with PEFT first"
        )
    weights = read_weights(directory / WEIGHTS_FILE)
    layers = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in weights}
    add_lora(
        model,
        LoraConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            targets=tuple(sorted(_last_parts(layers))),
        ),
    )
    expected = _peft_weights(model)
    if set(expected) != set(weights):
        other = sorted(set(expected) ^ set(weights))[:3]
        raise ValueError(
            f"{directory / WEIGHTS_FILE} belongs to another language model: {', '.join(other)}"
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Add each adapter to the weights of its layer and remove it; the results do not change."""
    for name, lora in lora_layers(model).items():
        layer = model.get_submodule(name)
        if not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"{name} has quantized weights: load the model without model.quantize")
        product = (lora.B @ lora.A) * lora.scale  # [out, in]
        layer.weight += (product.T if _is_transposed(layer) else product).to(layer.weight.dtype)
        del layer.lora
        layer._forward_hooks.clear()


def _peft_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of all adapters by their names in PEFT's files."""
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": parameter
        for name, adapter in lora_layers(model).items()
        for letter, parameter in (("A", adapter.A), ("B", adapter.B))
    }


def _last_parts(names: Iterable[str]) -> set[str]:
    """The last parts of dotted names: "q_proj" of "layers.0.self_attn.q_proj"."""
    return {name.rpartition(".")[2] for name in names}


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Input and output widths of a linear layer or of GPT-2's transposed one; None for others."""
    if _is_transposed(layer):
        return int(layer.nx), int(layer.nf)  # type: ignore[arg-type]
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return None if inputs is None or outputs is None else (inputs, outputs)


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"
