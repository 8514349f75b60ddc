"""Moves a loaded model to where its `Placement` says, part by part.

A layer of the language model runs on its device: what it reads is copied there, and the result of
the last one comes back. The weights of a layer on disk stay mapped from their files; they are
copied to the device that computes when the layer runs, and freed afterwards.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instructblip.core import distributed
from instructblip.model.decoding import PAPER, Decoding
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import stacks_of
from instructblip.model.language.fast.packing import Packing
from instructblip.model.language.quantize import quantize_linears, quantized_bytes
from instructblip.model.placement import RESERVED, Kind, Placement, spread_layers

PROMPT = 128
"""Tokens of a prompt that an answer is planned with."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model that answers, known before it is placed."""

    fixed: int
    """Weights of everything that is not a layer of the language model."""
    layers: list[int]
    """Weights of each layer."""
    cache: int
    """Keys and values of one layer for one answer of full length."""

    @classmethod
    def of(
        cls,
        model: InstructBlip,
        dtype: torch.dtype,
        kind: Kind | None = None,
        decoding: Decoding = PAPER,
    ) -> "Footprint":
        language = model.language_model
        spoken = {id(module) for module in language.modules()} - {
            id(language.get_output_embeddings())
        }
        big = {id(p) for part in model.big_parts for p in part.parameters()}
        layer_of = _layer_of(language)
        sizes: dict[str | None, int] = {None: 0} | dict.fromkeys(language_layers(language), 0)
        seen: set[int] = set()
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                size = parameter.numel() * (dtype.itemsize if id(parameter) in big else 4)
                if (
                    kind is not None
                    and isinstance(module, nn.Linear)
                    and parameter is module.weight
                    and id(module) in spoken
                ):
                    size = quantized_bytes(module, kind)
                sizes[layer_of.get(id(module))] += size
        fixed = sizes.pop(None)
        return cls(fixed, list(sizes.values()), cache_bytes(model, dtype, decoding))


def language_layers(language: Any) -> dict[str, nn.Module]:
    """The layers of a language model by name, in the order in which they run."""
    names = {id(module): name for name, module in language.named_modules()}
    return {names[id(layer)]: layer for _, stack in stacks_of(language) for layer in stack}


def _layer_of(language: Any) -> dict[int, str]:
    """The layer, by its name, in which a module of this id is."""
    layers = language_layers(language)
    return {id(module): name for name, layer in layers.items() for module in layer.modules()}


def cache_bytes(model: InstructBlip, dtype: torch.dtype, decoding: Decoding) -> int:
    """Keys and values of one layer for one answer of full length to a prompt of `PROMPT` tokens."""
    config, beams = model.language_model.config, decoding.num_beams
    shares = not config.is_encoder_decoder and model.language.reads_trees
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width = width or config.hidden_size // config.num_attention_heads
    tokens = (1 if shares else beams) * (model.config.num_query_tokens + PROMPT)
    tokens += beams * decoding.max_new_tokens
    return 2 * heads * width * tokens * dtype.itemsize


@torch.no_grad()
def place(
    model: InstructBlip,
    placement: Placement,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    decoding: Decoding = PAPER,
) -> InstructBlip:
    """Freeze a model that was loaded ``as_stored``, and move it to its devices.

    ``device`` computes everything but the layers of the language model; "auto" is the first of the
    placement. ``dtype`` is the type of image encoder and language model; None is fp32 on a CPU and
    bf16 elsewhere. The Q-Former is always fp32. With ``devices=auto`` the layers are on ``device``
    if they fit there, else on all GPUs here too, then on the CPU, then on disk.

    Raises ValueError for a device that is not here, and for layers that fit nowhere.
    """
    if device == "auto":
        device = placement.names[0] if placement.names else answering_device()
    home = distributed.resolve_device(device)
    if dtype is None:
        dtype = torch.float32 if home.type == "cpu" else torch.bfloat16
    model.requires_grad_(False).eval()
    language, layer_of = model.language_model, _layer_of(model.language_model)
    devices, on_disk = _plan(model, placement, home, dtype, decoding)
    if placement.quantize is not None:
        quantize_linears(
            language,
            placement.quantize,
            lambda name: devices.get(layer_of.get(id(language.get_submodule(name)), ""), home),
        )
        layer_of = _layer_of(language)
    big = {id(p) for part in model.big_parts for p in part.parameters()}
    for module in model.modules():
        layer = layer_of.get(id(module), "")
        at = devices.get(layer, home)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(at)
        if layer not in on_disk:
            for parameter in module.parameters(recurse=False):
                kept = dtype if id(parameter) in big else torch.float32
                _swap(parameter, parameter.to(at, kept, copy=True))
    if on_disk or set(devices.values()) - {home}:
        _connect(language, devices, on_disk, home, dtype)
    return model


def answering_device() -> str:
    """What ``auto`` is for a model that answers: also Apple's GPU, on which training has not been
    tried."""
    apple = not torch.cuda.is_available() and torch.backends.mps.is_available()
    return "mps" if apple else "auto"


def _plan(
    model: InstructBlip,
    placement: Placement,
    home: torch.device,
    dtype: torch.dtype,
    decoding: Decoding,
) -> tuple[dict[str, torch.device], set[str]]:
    """The device of each layer, by its name, and the layers that are on disk."""
    names = list(language_layers(model.language_model))
    named = [distributed.resolve_device(name) for name in placement.names]
    if len(named) == 1 and not placement.reads_disk:
        return dict.fromkeys(names, named[0]), set()
    automatic = placement.devices == "auto"
    choices = [named]
    if automatic:
        candidates = [home]
        if home.type == "cuda":
            gpus = range(torch.cuda.device_count() if distributed.world_size() == 1 else 0)
            candidates += [g for i in gpus if (g := torch.device("cuda", i)) != home]
            candidates.append(torch.device("cpu"))
        choices = [candidates[: n + 1] for n in range(len(candidates))]
    needed = Footprint.of(model, dtype, placement.quantize, decoding)
    sizes = [size + needed.cache for size in needed.layers]
    devices, places, rooms = [home], [], []
    for devices in choices:
        rooms = [free_bytes(device) for device in devices]
        fixed = needed.fixed if devices[:1] == [home] else 0
        places = spread_layers(fixed, sizes, rooms)
        if len(devices) not in places:
            break
    on_disk = {name for name, at in zip(names, places, strict=True) if at == len(devices)}
    if on_disk and not placement.reads_disk:
        total, free = (needed.fixed + sum(sizes)) / 2**30, sum(rooms) / 2**30
        shown = ", ".join(map(str, devices))
        what = f"the model needs {total:.1f} GiB, and {shown} have {free:.1f} GiB free"
        if placement.quantize is not None or not automatic:
            remedy = "more devices" if placement.quantize == "nf4" else "quantize=nf4, more devices"
            raise ValueError(f"{what}: take {remedy}, or disk at the end without quantize")
        warnings.warn(
            f"{what}: {len(on_disk)} of {len(names)} layers of the language model are read from "
            "disk at each use, which is slow; quantize=nf4 takes a quarter of the memory",
            stacklevel=4,
        )
    chosen = [*devices, home]  # what is on disk runs at home
    return {name: chosen[at] for name, at in zip(names, places, strict=True)}, on_disk


def free_bytes(device: torch.device) -> int:
    """Bytes that weights may still take on a device."""
    if device.type == "cpu":
        meminfo = Path("/proc/meminfo")
        if meminfo.is_file():  # Linux
            lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
            return int(int(lines["MemAvailable"].split()[0]) * 1024 * (1 - RESERVED))
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * (1 - RESERVED))
    if device.type == "mps":
        most = torch.mps.recommended_max_memory()
        return int(most * (1 - RESERVED)) - torch.mps.current_allocated_memory()
    free, total = torch.get_device_module(device).mem_get_info(device)
    return int(free - total * RESERVED)


def _swap(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a value of any type and device, in whatever modules it is."""
    torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=False))


def _connect(
    language: Any,
    devices: Mapping[str, torch.device],
    on_disk: set[str],
    home: torch.device,
    dtype: torch.dtype,
) -> None:
    """Let each layer of a language model run on its device."""
    names = {id(layer): name for name, layer in language_layers(language).items()}
    for _, stack in stacks_of(language):
        copies: dict[int, tuple[Any, Any]] = {}
        for layer in stack:
            name = names[id(layer)]
            layer.forward = functools.partial(
                _run,
                layer,
                layer.forward,
                devices[name],
                dtype if name in on_disk else None,
                home if layer is stack[-1] else None,
                copies,
            )


def _run(
    layer: nn.Module,
    forward: Callable[..., Any],
    device: torch.device,
    stored: torch.dtype | None,
    home: torch.device | None,
    copies: dict[int, tuple[Any, Any]],
    hidden: Tensor,
    *inputs: Any,
    **settings: Any,
) -> Any:
    """A layer on its ``device``; ``stored`` is the type in which it runs if its weights are on
    disk. The last layer of a stack returns its results ``home``. ``copies`` of what all layers
    read, such as masks and the states of an encoder, are made once in a pass."""
    hidden, inputs, settings = (
        _moved(hidden, device, {}),
        _moved(inputs, device, copies),
        _moved(settings, device, copies),
    )
    with contextlib.nullcontext() if stored is None else _in_memory(layer, device, stored):
        outputs = forward(hidden, *inputs, **settings)
    if home is None:
        return outputs
    copies.clear()
    return _moved(outputs, home, {})


@contextlib.contextmanager
def _in_memory(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Give a layer copies of its stored weights."""
    pairs = [(p, nn.Parameter(p.to(device, dtype, copy=True), False)) for p in layer.parameters()]
    for pair in pairs:
        torch.utils.swap_tensors(*pair)
    try:
        yield
    finally:
        for pair in pairs:
            torch.utils.swap_tensors(*pair)


def _moved(value: Any, device: torch.device, copies: dict[int, tuple[Any, Any]]) -> Any:
    """``value`` with all its tensors on ``device``. A copy is made once for each device; what has
    no tensors, such as a cache, stays the same object."""
    if isinstance(value, Tensor | Packing):
        if value.device == device:
            return value
        source, copy = copies.get(id(value), (None, value))
        if source is not value or copy.device != device:
            copy = value.to(device)
            copies[id(value)] = value, copy
        return copy
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, device, copies) for each in value)
    if isinstance(value, dict):
        return {name: _moved(each, device, copies) for name, each in value.items()}
    return value
