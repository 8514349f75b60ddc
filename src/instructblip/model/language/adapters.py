"""Language models behind one small interface; the only file that imports transformers' models.

Both kinds read projected queries in front of the prompt. A decoder-only model goes on with the
response in the same row; an encoder-decoder reads [queries; prompt] in its encoder and the
response in its decoder. Rows are compact: real tokens without a hole, so that positions are the
same whatever the padding; most decoders read a batch as one row without any. The head runs at
labelled positions only.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from instructblip.model.checkpoints.weights import read_json
from instructblip.model.language.causal import CausalLanguage
from instructblip.model.language.fast import relative
from instructblip.model.language.fast.packing import allow_packing
from instructblip.model.language.seq2seq import SEQ2SEQ_TYPES, Seq2SeqLanguage

LANGUAGE_TYPES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SEQ2SEQ_TYPES)


def read_language_config(directory: Path) -> dict[str, Any]:
    """The config.json of a language model; ValueError for a model of another kind."""
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if kind not in LANGUAGE_TYPES:
        raise ValueError(
            f"{directory} holds no language model but model_type {kind!r}; expected the directory "
            "of a Llama, Qwen, Gemma, OPT or T5"
        )
    return config


def build_language_model(config: dict[str, Any]) -> Any:
    """A transformers language model with fresh weights from a text config as a dict.

    Raises ValueError for a model type that neither adapter can drive.
    """
    values = dict(config)
    kind = values.pop("model_type", None)
    if not kind:
        raise ValueError(f"the language config has no model_type; its keys are {sorted(config)}")
    text_config = AutoConfig.for_model(kind, **values)
    if "dense_act_fn" in values:  # T5's config derives it from another field and forgets this one
        text_config.dense_act_fn = values["dense_act_fn"]
    if kind in SEQ2SEQ_TYPES:
        model = AutoModelForSeq2SeqLM.from_config(text_config)
        _fuse_activations(model)
        relative.allow_packing(model)
        return model
    if getattr(text_config, "is_encoder_decoder", False):
        raise ValueError(
            f"encoder-decoder language models must be one of {SEQ2SEQ_TYPES}; got {kind!r}"
        )
    model = AutoModelForCausalLM.from_config(text_config)
    _fuse_activations(model)
    allow_packing(model)
    return model


def _fuse_activations(model: nn.Module) -> None:
    """The GELU of T5 and GPT-2 as one operation. transformers writes its tanh approximation as
    eight, and the backward pass keeps what most of them return."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def untie_head(model: Any) -> None:
    """Give the output head a weight of its own.

    transformers 5 ties T5's head to its input embedding whatever the config says; Flan-T5 has two
    different matrices, and loading both into one tensor would keep whichever came last.
    """
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)


def stacks_of(model: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Each module that owns transformer layers, with these layers: one stack, or T5's two."""
    found = []
    for stack in model.modules():
        for child in stack.children():
            if isinstance(child, nn.ModuleList) and isinstance(
                next(iter(child), None), GradientCheckpointingLayer
            ):
                found.append((stack, list(child)))
    return found


def checkpoint_layers(model: Any) -> None:
    """Keep of each layer its input alone for the backward pass, and run the layer again there.

    transformers' own switch works in training mode only, and a frozen model stays in eval mode.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = functools.partial(_rerun, layer.forward)


def _rerun(forward: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **settings)
    return checkpoint(forward, *inputs, use_reentrant=False, **settings)


Language = CausalLanguage | Seq2SeqLanguage


def language_of(model: Any) -> Language:
    """The adapter for a transformers language model; it holds no state of its own."""
    return (Seq2SeqLanguage if model.config.is_encoder_decoder else CausalLanguage)(model)
