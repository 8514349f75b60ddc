"""What a decoder can read besides plain padded rows, found out on a small copy of it.

Whether packed rows, prefix trees and fused layers give a decoder's results depends on its
positions, masks, windows and norms, which differ between types and between versions of
transformers. So there is no list of types: a copy of the decoder with two heads, a narrow
feed-forward and one layer of each kind runs three rows of different lengths as transformers does,
and then in each of the other ways. What differs by more than `APART` is not used.
"""

import copy
import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM

from instructblip.model.language.fast.attention import ATTENTION
from instructblip.model.language.fast.llama import fuse_layers
from instructblip.model.language.fast.packing import Packing

APART = 1e-5
"""Greatest difference of hidden states and gradients, as a share of the greatest value."""

WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
WINDOWS = ("sliding_window", "attention_chunk_size")
WINDOW = 4
"""Shorter than the rows of the probe, so that a window that is not respected shows."""

LENGTHS = (9, 5, 7)
SHARED = 4
"""Tokens that the last row shares with the first one, the trunk of the tree."""

MAX_PARAMETERS = 10_000_000
"""A copy that is larger than this (a mixture of many experts) is not probed."""


class Abilities(NamedTuple):
    """Which ways to read give the results of padded rows."""

    packed: bool = False
    fused: bool = False  # packed, through the layers in `fast.llama`
    trees: bool = False  # any positions and any mask


def read_fast(model: Any) -> None:
    """Let a decoder read in every way that gives the results of padded rows.

    Warns where rows stay padded.
    """
    able, reason = _probe(json.dumps(model.config.to_dict(), sort_keys=True, default=str))
    if reason:
        warnings.warn(
            f"a language model of type {model.config.model_type!r} reads padded rows, which is "
            f"slower: packed ones {reason} on a probe",
            stacklevel=2,
        )
    if able.packed:
        model.set_attn_implementation(ATTENTION)
    model.abilities = able._replace(fused=able.fused and fuse_layers(model))


def abilities_of(model: Any) -> Abilities:
    """What `read_fast` found out; nothing for a model that it has not seen."""
    return getattr(model, "abilities", Abilities())


@functools.cache
def _probe(values: str) -> tuple[Abilities, str]:
    # the model around may be built of fake tensors, on another device, or without random numbers
    with (
        unset_fake_temporarily(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            config = _small(AutoConfig.for_model(**json.loads(values)))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            if (count := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
                return Abilities(), f"were not tried, with {count:,} parameters"
            with torch.device("cpu"):
                return _compare(AutoModelForCausalLM.from_config(config).float().eval())
        except Exception as error:  # whatever a type raises that the probe does not fit
            return Abilities(), _failure(error)


def _small(config: Any) -> Any:
    """``config`` with two heads of the same width and one layer of each kind."""
    config = copy.deepcopy(config)
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if (keys := getattr(config, "num_key_value_heads", None)) is not None:
        config.num_key_value_heads = 2 if keys == heads else 1
    if (projected := getattr(config, "word_embed_proj_dim", None)) is not None:
        config.word_embed_proj_dim = 2 * width if projected == config.hidden_size else 16
    config.num_attention_heads, config.hidden_size = 2, 2 * width
    config.vocab_size, config.pad_token_id = 16, 0
    for name in (*WIDTHS, *WINDOWS):
        if getattr(config, name, None) is not None:
            setattr(config, name, 16 if name in WIDTHS else WINDOW)
    lists = {n: v for n, v in vars(config).items() if isinstance(v, list) and len(v) == depth}
    kinds = {repr([v[i] for v in lists.values()]): i for i in reversed(range(depth))}
    kept = sorted({0, depth - 1, *kinds.values()})
    for name, value in lists.items():
        setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    return config


def _compare(model: Any) -> tuple[Abilities, str]:
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(draw(parameter.shape) * parameter.shape[-1] ** -0.5)
            else:  # around the first value of a norm or a bias, 1 or 0
                parameter.add_(draw(parameter.shape), alpha=0.2)
    rows, longest = len(LENGTHS), max(LENGTHS)
    embeds = draw(rows, longest, model.get_input_embeddings().embedding_dim)
    embeds[-1, :SHARED] = embeds[0, :SHARED]
    embeds.requires_grad_(True)
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    packing = Packing.of(mask)

    def padded() -> Tensor:
        return _run(model, embeds, attention_mask=mask.long())[mask]

    def packed(read: Tensor | None = None) -> Tensor:
        given = replace(packing, read=read)
        return _run(model, packing.pack(embeds), **given.arguments())[0]

    def as_tree() -> Tensor:
        """The first row, behind it what the last one does not share, and two rows by themselves."""
        tokens, branch = LENGTHS[0], LENGTHS[-1] - SHARED
        tree = torch.cat([embeds[:1], embeds[-1:, SHARED : LENGTHS[-1]]], 1)
        visible = torch.ones(tokens + branch, tokens + branch, dtype=torch.bool).tril()
        visible[tokens:, SHARED:tokens] = False
        depth = torch.cat([torch.arange(tokens), torch.arange(branch) + SHARED])[None]
        hidden = _run(model, tree, attention_mask=visible[None, None], position_ids=depth)
        return hidden[0]

    with torch.no_grad():
        outer = draw(padded().shape)
    expected = _with_gradient(padded, embeds, outer)
    model.set_attn_implementation(ATTENTION)
    if reason := _differs(packed, embeds, outer, expected):
        return Abilities(), reason
    in_tree = torch.cat([torch.arange(LENGTHS[0]), torch.arange(-LENGTHS[-1] + SHARED, 0)])
    with torch.no_grad():
        trees = _apart(as_tree(), expected[0][in_tree]) < APART
    fused = fuse_layers(model) and not _differs(packed, embeds, outer, expected)
    if fused:  # and the last layer computes what is read alone
        read = torch.tensor([3, 8, 12, 20])
        with torch.no_grad():
            fused = _apart(packed(read), expected[0][read]) < APART
    return Abilities(True, fused, trees), ""


def _run(model: Any, embeds: Tensor, **settings: Any) -> Tensor:
    return model.base_model(inputs_embeds=embeds, use_cache=False, **settings).last_hidden_state


def _with_gradient(run: Callable[[], Tensor], inputs: Tensor, outer: Tensor) -> list[Tensor]:
    """The hidden states, and the gradient of the inputs."""
    hidden = run()
    return [hidden.detach(), *torch.autograd.grad(hidden, inputs, outer)]


def _differs(
    run: Callable[[], Tensor], inputs: Tensor, outer: Tensor, expected: list[Tensor]
) -> str:
    """Why results are not those expected; empty where they are."""
    try:
        got = _with_gradient(run, inputs, outer)
    except Exception as error:  # whatever a layer raises that does not know the arguments
        return _failure(error)
    apart = max(_apart(a, b) for a, b in zip(got, expected, strict=True))
    return "" if apart < APART else f"differ by {apart:.1g}"


def _failure(error: Exception) -> str:
    return f"fail ({type(error).__name__}: {error})"


def _apart(got: Tensor, expected: Tensor) -> float:
    """The greatest difference as a share of the greatest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
