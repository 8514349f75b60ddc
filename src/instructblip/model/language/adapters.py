"""transformers' language models, and the adapter that drives each of them.

A decoder-only model reads [queries; prompt; response] as one row (`causal`); an encoder-decoder
reads [queries; prompt] in its encoder and the response in its decoder (`seq2seq`). Only this folder
knows transformers' models.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from instructblip.core.files import read_json
from instructblip.core.gguf import find_gguf, gguf_config
from instructblip.model.language.causal import CausalLanguage
from instructblip.model.language.fast import probe, t5
from instructblip.model.language.seq2seq import SEQ2SEQ_TYPES, Seq2SeqLanguage

LANGUAGE_TYPES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SEQ2SEQ_TYPES)

Language = CausalLanguage | Seq2SeqLanguage


def language_of(model: Any) -> Language:
    """The adapter of a transformers language model; it keeps no state besides the model."""
    return (Seq2SeqLanguage if model.config.is_encoder_decoder else CausalLanguage)(model)


def read_language_config(directory: Path) -> dict[str, Any]:
    """The config.json of a language model, or that of its GGUF file. FileNotFoundError where there
    is neither, ValueError for any other kind of model."""
    if (file := find_gguf(directory)) is not None:
        return gguf_config(file)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} holds no language model, there is no {directory / 'config.json'}; "
            "expected a directory of transformers, a GGUF file, or a directory with one"
        )
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if kind not in LANGUAGE_TYPES:
        raise ValueError(
            f"{directory} holds no language model but model_type {kind!r}; expected the directory "
            "of a Llama, Qwen, Gemma, OPT or T5"
        )
    return config


@contextmanager
def _of_config(kind: str) -> Iterator[None]:
    """ValueError for any error that transformers raises on the values of a config."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"the language config of type {kind!r} makes no model: {reason}"
        ) from error


def text_config(config: dict[str, Any]) -> Any:
    """transformers' config of a language model from its values, with transformers' defaults."""
    values = dict(config)
    kind = values.pop("model_type", None)
    if not kind:
        raise ValueError(f"the language config has no model_type; its keys are {sorted(config)}")
    with _of_config(kind):
        made = AutoConfig.for_model(kind, **values)
    if "dense_act_fn" in values:  # T5's config derives it from another field and ignores this one
        made.dense_act_fn = values["dense_act_fn"]
    return made


def context_length(config: dict[str, Any]) -> int | None:
    """Positions that a language model has for queries, prompt and response together, by its config
    as a dict; None without a limit (T5's relative positions, BLOOM's)."""
    made = text_config(config)
    return None if made.is_encoder_decoder else getattr(made, "max_position_embeddings", None)


def num_words(config: dict[str, Any]) -> int:
    """Rows of the word table of a language model, by its config as a dict."""
    return text_config(config).vocab_size


def build_language_model(config: dict[str, Any]) -> Any:
    """A transformers language model with random weights, from its config as a dict.

    Raises ValueError for a model type that neither adapter can drive.
    """
    made, kind = text_config(config), config["model_type"]
    if kind in SEQ2SEQ_TYPES:
        with _of_config(kind):
            model = AutoModelForSeq2SeqLM.from_config(made)
        t5.allow_packing(model)
    elif getattr(made, "is_encoder_decoder", False):
        raise ValueError(
            f"encoder-decoder language models must be one of {SEQ2SEQ_TYPES}; got {kind!r}"
        )
    else:
        with _of_config(kind):
            model = AutoModelForCausalLM.from_config(made)
        probe.read_fast(model)
    t5.fuse_gelu(model)
    return model


def untie_head(model: Any) -> None:
    """Give the output head a weight separate from the input embedding's.

    transformers 5 ties T5's head to its input embedding whatever the config says. Flan-T5 has two
    different matrices, and loading both into one tensor would keep only the last one.
    """
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)


def stacks_of(model: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Each module that contains transformer layers, with these layers: one stack, or T5's two."""
    return [
        (stack, list(child))
        for stack in model.modules()
        for child in stack.children()
        if isinstance(child, nn.ModuleList)
        and isinstance(next(iter(child), None), GradientCheckpointingLayer)
    ]


def checkpoint_layers(model: Any) -> None:
    """Keep only the input of each layer for the backward pass, which runs the layer again.

    transformers' own switch works only in training mode, and a frozen model stays in eval mode.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = functools.partial(_checkpointed, layer, layer.forward)


def _checkpointed(
    layer: nn.Module, forward: Callable[..., Any], *inputs: Any, **settings: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **settings)
    # the state of a random generator is read from its device: not where nothing drops out
    drops = any(module.training for module in layer.modules())
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=drops, **settings)
