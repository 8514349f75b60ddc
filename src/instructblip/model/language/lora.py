"""LoRA on the frozen language model, in the files of PEFT.

Beside a chosen linear layer W runs a product of two thin matrices: W x + (alpha / rank) B A x
(Hu et al., 2021). B begins at zero, so an untrained adapter changes nothing. Layers keep their
class and names: the adapter is a module ``lora`` of the layer and is added by a forward hook,
whatever the layer's weights are stored as.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instructblip.model.checkpoints.weights import (
    read_json,
    read_weights,
    write_weights,
)
from instructblip.model.config import LoraConfig

FOLDER = "language_adapter"
"""Where a model directory keeps its adapter."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

TARGETS = {
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "gpt_neox": ("query_key_value",),
}
"""Last names of the layers adapted by default: what makes queries and values, as in the paper."""

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
"""What PEFT can do besides plain LoRA, with the value that asks for none of it."""


class Lora(nn.Module):
    """x [..., in] -> alpha / rank * B A dropout(x) [..., out], in its own fp32 weights."""

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

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self.dropout(inputs).to(self.A.dtype)
        return F.linear(F.linear(inputs, self.A), self.B) * self.scale


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + layer.lora(inputs[0]).to(output.dtype)


def add_lora(model: Any, config: LoraConfig) -> None:
    """Put an untrained adapter beside each target of a transformers language model.

    Raises ValueError where no layer has one of the target names.
    """
    own = config.targets or TARGETS.get(model.config.model_type, DEFAULT_TARGETS)
    linear = {name: m for name, m in model.named_modules() if _sizes(m) is not None}
    chosen = [m for name, m in linear.items() if name.rpartition(".")[2] in own]
    if not chosen:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"model.lora.targets {list(own)} are no layers of a {model.config.model_type}; "
            f"choose from {', '.join(known)}"
        )
    for layer in chosen:
        inputs, outputs = _sizes(layer) or (0, 0)
        layer.lora = Lora(inputs, outputs, config)
        layer.register_forward_hook(_add)


def adapters(model: nn.Module) -> dict[str, Lora]:
    """Adapters by the name of the layer they stand beside."""
    return {
        name.removesuffix(".lora"): m for name, m in model.named_modules() if isinstance(m, Lora)
    }


def save_lora(model: Any, directory: Path) -> None:
    """Write ``directory`` as PEFT would: PeftModel.from_pretrained(language_model, directory)."""
    found = adapters(model)
    config = next(iter(found.values())).config
    weights = {}
    for name, lora in found.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = lora.A
        weights[f"{PREFIX}{name}.lora_B.weight"] = lora.B
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in found}),
        "fan_in_fan_out": any(_is_transposed(model.get_submodule(name)) for name in found),
        "inference_mode": True,
        **UNSUPPORTED,
    }
    directory.mkdir(parents=True)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    write_weights(weights, directory / WEIGHTS_FILE)


def load_lora(model: Any, directory: Path) -> None:
    """Add the adapter in ``directory``, ours or PEFT's, to a language model.

    Raises ValueError for another kind of adapter, or one whose layers this model does not have.
    """
    values = read_json(directory / CONFIG_FILE)
    odd = {k: values[k] for k, plain in UNSUPPORTED.items() if values.get(k) not in (plain, None)}
    if values.get("peft_type") != "LORA" or odd:
        raise ValueError(
            f"{directory / CONFIG_FILE}: expected a plain LORA adapter; got "
            f"{values.get('peft_type')} with {odd or 'nothing else'}. Merge it with PEFT first"
        )
    weights = read_weights(directory / WEIGHTS_FILE)
    layers = {n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in weights}
    targets = tuple(sorted({name.rpartition(".")[2] for name in layers}))
    add_lora(
        model,
        LoraConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            targets=targets,
        ),
    )
    found = adapters(model)
    if set(found) != layers or len(weights) != 2 * len(layers):
        other = sorted(set(found) ^ layers)[:3] or sorted(weights)[:3]
        raise ValueError(
            f"{directory / WEIGHTS_FILE} was made for another language model: {', '.join(other)}"
        )
    with torch.no_grad():
        for name, lora in found.items():
            lora.A.copy_(weights[f"{PREFIX}{name}.lora_A.weight"])
            lora.B.copy_(weights[f"{PREFIX}{name}.lora_B.weight"])


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Add each adapter to the weights beside it and remove it: the same answers, plain files."""
    for name, lora in adapters(model).items():
        layer = model.get_submodule(name)
        if not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"{name} has quantized weights: load the model without model.quantize")
        product = (lora.B @ lora.A) * lora.scale  # [out, in]
        layer.weight += (product.T if _is_transposed(layer) else product).to(layer.weight.dtype)
        del layer.lora
        layer._forward_hooks.clear()


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, of GPT-2's transposed kind too; else None."""
    if _is_transposed(layer):
        return int(layer.nx), int(layer.nf)  # type: ignore[arg-type]
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return None if inputs is None or outputs is None else (inputs, outputs)


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"
