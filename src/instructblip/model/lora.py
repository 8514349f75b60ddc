"""LoRA on frozen layers, in PEFT's file format.

An adapter adds a product of two thin matrices to the result of a linear layer W:
W x + scale * B A x (Hu et al., 2021). B starts at zero, so an untrained adapter changes nothing.
Layers keep their class and their names: the adapter is a submodule ``lora`` of the layer, applied
by a forward hook, whatever format the layer's weights have.

A model has two places for adapters, ``InstructBlip.adapted``: the language model, and the Q-Former
with its projection, whose frozen layers are adapted as in "Towards Efficient Visual-Language
Alignment of the Q-Former for Visual Reasoning Tasks" (Kim et al., 2024).
"""

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from instructblip.core.files import read_json
from instructblip.model.checkpoints.weights import read_weights, write_weights
from instructblip.model.config import LoraConfig

FOLDERS = {"lora": "language_adapter", "qformer_lora": "qformer_adapter"}
"""The folder of each adapter in a model directory, by the part that trains it."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

QFORMER = "Q-Former"
TARGETS = {
    QFORMER: ("query", "value"),
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "gpt_neox": ("query_key_value",),
    "phi3": ("qkv_proj",),
}
"""Layers adapted by default, by the last part of their names: the projections to queries and
values, as in the paper. Other model types have ``DEFAULT_TARGETS``."""

DEFAULT_TARGETS = ("q_proj", "v_proj")

UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Settings of PEFT that add more to a layer than ``Lora`` does."""

OFF = (None, False, "none", [], {})
CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq")
"""Beginnings of ``init_lora_weights`` with which PEFT also changes the weights of the layers."""

Value = TypeVar("Value", int, float)


class Lora(nn.Module):
    """x [..., in] -> scale * B A dropout(x) [..., out], with fp32 weights.

    ``scale`` is alpha / rank, or with ``rslora`` alpha / sqrt(rank), which keeps the size of the
    product when the rank grows (Kalajdzievski, 2023).
    """

    def __init__(self, inputs: int, outputs: int, config: LoraConfig, name: str = "") -> None:
        super().__init__()
        self.config = config
        rank = _first(config.rank_pattern, name, config.rank)
        alpha = _first(config.alpha_pattern, name, config.alpha)
        self.scale = alpha / (math.sqrt(rank) if config.rslora else rank)
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inputs: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        inputs = self.dropout(inputs).to(self.A.dtype)
        return F.linear(F.linear(inputs, self.A), self.B) * self.scale


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + layer.lora(inputs[0]).to(output.dtype)


def _ends_with(name: str, pattern: str) -> bool:
    """Whether ``name`` is ``pattern``, or ends with a dot and ``pattern``, as PEFT reads patterns:
    regular expressions of whole parts of a dotted name."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _first(patterns: dict[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that matches ``name``."""
    return next((v for pattern, v in patterns.items() if _ends_with(name, pattern)), default)


def adapted_layers(model: Any, config: LoraConfig) -> dict[str, nn.Module]:
    """The layers of a model in ``InstructBlip.adapted`` that ``config`` adapts, by their names.

    Raises ValueError if no layer has one of the target names, and for a pattern without a layer.
    """
    kind = getattr(getattr(model, "config", None), "model_type", QFORMER)
    targets = config.targets or TARGETS.get(kind, DEFAULT_TARGETS)
    linear = _linear_layers(model)
    chosen = {n: m for n, m in linear.items() if any(_ends_with(n, t) for t in targets)}
    if not chosen:
        raise ValueError(
            f"the targets of a LoRA adapter, {list(targets)}, are no layers of a {kind}; choose "
            f"from {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
        )
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(_ends_with(name, pattern) for name in chosen):
            raise ValueError(
                f"{pattern!r} in rank_pattern or alpha_pattern matches no adapted layer of a "
                f"{kind}; give the ends of names such as {next(iter(chosen))}"
            )
    return chosen


def add_lora(model: Any, config: LoraConfig) -> None:
    """Add an untrained adapter to each layer in ``adapted_layers``."""
    for name, layer in adapted_layers(model, config).items():
        inputs, outputs = _sizes(layer) or (0, 0)
        layer.lora = Lora(inputs, outputs, config, name)
        layer.register_forward_hook(_add)


def lora_layers(model: nn.Module) -> dict[str, Lora]:
    """The adapters of a model by the name of their layer."""
    return {
        name.removesuffix(".lora"): m for name, m in model.named_modules() if isinstance(m, Lora)
    }


def save_lora(model: Any, directory: Path) -> None:
    """Write ``directory`` so that PeftModel.from_pretrained(base, directory) reads it.

    ``base`` is transformers' language model, or for the Q-Former its whole InstructBLIP.
    """
    layers = lora_layers(model)
    config = next(iter(layers.values())).config
    encodes: Any = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    values = {
        "peft_type": "LORA",
        "task_type": {True: "SEQ_2_SEQ_LM", False: "CAUSAL_LM"}.get(encodes),
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "target_modules": sorted(layers),
        "fan_in_fan_out": any(_is_transposed(model.get_submodule(name)) for name in layers),
        "bias": "none",
        "inference_mode": True,
    }
    directory.mkdir(parents=True)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    write_weights(_peft_weights(model), directory / WEIGHTS_FILE)


def load_lora(model: Any, directory: Path) -> None:
    """Add the adapter in ``directory``, ours or PEFT's, to a model in ``InstructBlip.adapted``.

    Raises ValueError for another kind of adapter, and for an adapter of another model.
    """
    values = read_json(directory / CONFIG_FILE)
    odd = {key: values[key] for key in UNSUPPORTED if values.get(key) not in OFF}
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_WEIGHTS):
        odd["init_lora_weights"] = start
    if values.get("peft_type") != "LORA" or odd:
        raise ValueError(
            f"{directory / CONFIG_FILE}: expected a plain LORA adapter; got "
            f"{values.get('peft_type')} with {odd or 'nothing else'}. Merge it with PEFT first"
        )
    weights = read_weights(directory / WEIGHTS_FILE)
    layers = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in weights}
    _check_names(directory, layers - _linear_layers(model).keys())

    def used(patterns: dict[str, Any] | None) -> dict[str, Any]:
        pairs = (patterns or {}).items()
        return {key: v for key, v in pairs if any(_ends_with(name, key) for name in layers)}

    add_lora(
        model,
        LoraConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            rslora=values.get("use_rslora", False),
            rank_pattern=used(values.get("rank_pattern")),
            alpha_pattern=used(values.get("alpha_pattern")),
            targets=tuple(re.escape(name) for name in sorted(layers)),
        ),
    )
    expected = _peft_weights(model)
    shapes = [{name: v.shape for name, v in tensors.items()} for tensors in (expected, weights)]
    _check_names(directory, {name for name, _ in shapes[0].items() ^ shapes[1].items()})
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])


def _check_names(directory: Path, other: Collection[str]) -> None:
    if other:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} belongs to another model: {', '.join(sorted(other)[:3])}"
        )


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


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if _sizes(m) is not None}


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Input and output widths of a linear layer or of GPT-2's transposed one; None for others."""
    if _is_transposed(layer):
        return int(layer.nx), int(layer.nf)  # type: ignore[arg-type]
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return None if inputs is None or outputs is None else (inputs, outputs)


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"
