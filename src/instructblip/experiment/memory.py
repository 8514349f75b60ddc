"""Predicts the memory that a run needs on each device, before anything is loaded.

The model is built of fake tensors, which have shapes and no values, and one micro batch of the
longest lengths that the recipe allows passes through it. A model of 7 billion parameters takes
seconds on a laptop, and every tensor that autograd would save is counted.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instructblip.core import distributed
from instructblip.data.prepared.dataset import MANIFEST_FILE, PreparedDataset
from instructblip.data.sources import VIDEO_SETS
from instructblip.experiment.model import model_config, shape_language
from instructblip.model.checkpoints.directory import read_config
from instructblip.model.checkpoints.weights import NoRandomWeights
from instructblip.model.config import EncoderConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import stacks_of
from instructblip.model.language.fast.attention import packs
from instructblip.model.language.fast.head import LOSS_CHUNK, is_frozen_linear
from instructblip.model.language.fast.packing import Packing
from instructblip.model.language.fast.probe import abilities_of
from instructblip.model.language.inputs import Joined
from instructblip.model.language.quantize import QuantizedLinear, quantize_linears
from instructblip.model.placement import RESERVED, Kind, spread_layers
from instructblip.model.spread import Footprint
from instructblip.recipe.schema import DataConfig, Recipe
from instructblip.training.adamw import large_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    frozen: int
    """Frozen weights."""
    trained: int
    """Trainable weights, in fp32."""
    optimizer: int
    """The two moments of AdamW."""
    gradients: int
    """All except those of large embedding tables, of which a step computes a few rows."""
    activations: int
    """What the forward pass saves for the backward pass."""
    passing: int
    """What exists for a moment beside the activations: a chunk of logits, the gathered weights of a
    layer, or what a checkpointed layer saves while it runs again."""
    encoder: int
    """A pass of the image encoder, freed before there are activations."""
    accumulates: bool = False
    """Whether the gradients of earlier micro batches exist during the whole step. Otherwise they
    grow while the activations shrink."""

    @property
    def peak(self) -> int:
        fixed = self.frozen + self.trained + self.optimizer
        moment = max(self.encoder, self.activations + self.passing)
        if self.accumulates:
            return fixed + self.gradients + moment
        return fixed + max(self.gradients, moment)


def predict_memory(recipe: Recipe, world_size: int = 1) -> Memory:
    """Memory that ``recipe`` needs on each of ``world_size`` devices.

    Raises ValueError where the batch does not divide, FileNotFoundError without a config.json.
    """
    with FakeTensorMode():
        return _predict(recipe, world_size)


def _predict(recipe: Recipe, world_size: int) -> Memory:
    training, data = recipe.training, recipe.data
    with NoRandomWeights():
        model = InstructBlip(model_config(recipe))
    shape_language(model, recipe)
    model.train()
    half = training.precision == "bf16"
    on_gpu = _on_gpu(recipe)
    compute = torch.bfloat16 if half else None
    model.to_training_dtypes(frozen_dtype=compute if on_gpu else None, compute_dtype=compute)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    codes = sum(b.nbytes for m in quantized for b in m.buffers(recurse=False))
    frozen = sum(p.nbytes for p in model.parameters()) + codes - trained
    # the values of the layer that runs, in fp32, and its codes or its result beside them
    passing = max((8 * m.in_features * m.out_features for m in quantized), default=0)
    if training.parallel == "fsdp2":
        layers = [layer for _, stack in stacks_of(model.language_model) for layer in stack]
        sizes = [sum(p.nbytes for p in each.parameters() if not p.requires_grad) for each in layers]
        frozen -= sum(sizes) - sum(sizes) // world_size
        passing = 2 * max(sizes)  # the layer that runs, and the next one in transfer
    samples = training.micro_batch_size(world_size)
    lengths = (
        min(data.max_instruction, model.config.qformer.max_position_embeddings),
        data.max_prompt,
        data.max_response,
    )
    frames = most_frames(data)
    forward = functools.partial(walk, model, samples, lengths, frames)
    if training.token_budget is not None:  # of the longest rows, or all samples in shorter ones
        queries, share = frames * model.config.num_query_tokens, samples
        row = queries + data.max_prompt + data.max_response
        samples = min(share, max(1, training.token_budget // row))
        text = max(2, min(row, training.token_budget // share) - queries)
        response = min(data.max_response, text // 2)
        short = (min(lengths[0], text), text - response, response)
        forwards = [
            functools.partial(walk, model, samples, lengths, frames),
            functools.partial(walk, model, share, short, frames),
        ]
        forward = max(forwards, key=lambda each: saved_bytes(each, model))
    activations = saved_bytes(forward, model)
    sparse = large_tables(model) if training.optimizer == "adamw" else ()
    if training.checkpoint_activations:
        passing += rerun_bytes(forward, model) - activations
    return Memory(
        frozen=frozen,
        trained=trained,
        optimizer=2 * trained,
        gradients=trained - sum(table.weight.nbytes for table in sparse),
        activations=activations,
        passing=max(passing, logits_bytes(model, samples * data.max_response)),
        encoder=encoder_bytes(model, training.micro_batch_size(world_size) * frames, on_gpu),
        accumulates=training.accumulate > 1 or training.token_budget is not None,
    )


def fit_micro_batches(recipe: Recipe, world_size: int = 1, available: int | None = None) -> Recipe:
    """The recipe with ``training.tokens_per_micro_batch: auto`` decided: the most tokens, in whole
    rows of the longest lengths, with which a step fits into ``available`` bytes of each device.

    Without ``available`` it is what tensors can take of the GPU that the recipe uses, and where it
    uses none, a step is one micro batch. Raises ValueError if a single row does not fit.
    """
    training, data = recipe.training, recipe.data
    if training.tokens_per_micro_batch != "auto" or training.accumulate > 1:
        return recipe

    def of_rows(rows: int) -> Recipe:
        cut = training.model_copy(update={"tokens_per_micro_batch": rows * row})
        return recipe.model_copy(update={"training": cut})

    queries = most_frames(data) * model_config(recipe).num_query_tokens
    row = queries + data.max_prompt + data.max_response
    rows = -(-training.batch_size // world_size)
    if available is None:
        device = distributed.resolve_device(training.device)
        if device.type != "cuda":
            return of_rows(rows)
        available = usable_bytes(device)
    while True:
        fitted = of_rows(rows)
        memory = predict_memory(fitted, world_size)
        if memory.peak <= available:
            return fitted
        if rows == 1:
            raise ValueError(advise(memory, available, fitted, world_size))
        fixed = memory.frozen + memory.trained + memory.optimizer + memory.gradients
        fraction = (available - fixed) / (memory.peak - fixed)
        rows = max(1, min(rows - 1, int(rows * fraction)))


def usable_bytes(device: torch.device | None = None) -> int:
    """Bytes of a GPU that tensors can take."""
    return int(torch.cuda.mem_get_info(device)[1] * (1 - RESERVED))


def most_frames(data: DataConfig) -> int:
    """The most images or frames of a sample that the model reads."""
    return max(min(_most_images(data, name), data.num_frames) for name in data.sets)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMemory:
    """Bytes of a model that answers several samples at a time, on all devices together."""

    fixed: int
    """Weights of everything but the layers of the language model."""
    layers: list[int]
    """Weights of each of these layers."""
    cache: int
    """Keys and values of one layer, for answers of full length, without copies while they grow."""
    passing: int
    """What exists for a moment while images, instruction and prompt are read."""

    @property
    def peak(self) -> int:
        return self.fixed + sum(self.layers) + self.cache * len(self.layers) + self.passing

    def advise(self, available: int, devices: int, kind: Kind | None) -> str:
        """Whether it fits ``devices`` with ``available`` bytes each, as `spread.place` fills them,
        or what to change."""
        sizes = [size + self.cache for size in self.layers]
        places: list[int] = []
        for count in range(1, devices + 1):
            places = spread_layers(self.fixed + self.passing, sizes, [available] * count)
            if count not in places:
                each = [sum(s for s, at in zip(sizes, places, strict=True) if at == i)
                        for i in range(count)]  # fmt: skip
                each[0] += self.fixed + self.passing
                shown = ", ".join(f"{size / 2**30:.1f}" for size in each)
                return f"fits: {shown} of {available / 2**30:.1f} GiB"
        remedy = "" if kind == "nf4" else "evaluation.quantize=nf4 or "
        return (
            f"does not fit: {self.peak / 2**30:.1f} GiB of {devices} x {available / 2**30:.1f}; "
            f"set {remedy}more devices, or {places.count(devices)} of {len(sizes)} layers are "
            "read from disk at each use"
        )


def predict_answer(recipe: Recipe, model: str, samples: int = 1) -> AnswerMemory:
    """Memory of ``model`` while it answers ``samples`` at a time, on ``training.device`` and with
    the lengths and ``evaluation.quantize`` of the recipe.

    Raises FileNotFoundError without a config.json.
    """
    kind, data = recipe.evaluation.quantize, recipe.data
    on_gpu = _on_gpu(recipe)
    with FakeTensorMode():
        with NoRandomWeights():
            built = InstructBlip(read_config(model)).requires_grad_(False).eval()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        footprint = Footprint.of(built, dtype, kind)
        if kind is not None:
            quantize_linears(built.language_model, kind)
        built.to_training_dtypes(frozen_dtype=dtype)
        instruction = min(data.max_instruction, built.config.qformer.max_position_embeddings)
        living = _Living(*built.parameters(), *built.buffers(), copies=not on_gpu)
        with living, torch.no_grad():
            walk(built, samples, (instruction, data.max_prompt, 1))
    return AnswerMemory(
        fixed=footprint.fixed,
        layers=footprint.layers,
        cache=samples * footprint.cache,
        passing=living.peak,
    )


def _on_gpu(recipe: Recipe) -> bool:
    """Whether the device is a GPU, also one that is not here."""
    device = recipe.training.device
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _most_images(data: DataConfig, name: str) -> int:
    """The most images of an example of an entry. For custom data this is known once they are
    prepared; until then it assumes one."""
    entry = data.sets[name]
    if entry.format is None:
        return data.num_frames if data.source_of(name) in VIDEO_SETS else 1
    folder = data.prepared_root / name / entry.split
    if not (folder / MANIFEST_FILE).is_file():
        return 1
    return max(map(len, PreparedDataset(folder).images()), default=1)


def walk(
    model: InstructBlip, samples: int, lengths: tuple[int, int, int], frames: int = 1
) -> Tensor:
    """The loss of a batch of ``samples`` full rows with ``frames`` images each; ``lengths`` are
    those of instruction, prompt and response."""
    instruction, prompt, response = lengths
    size, images = model.config.vision.image_size, samples * frames
    features = model.encode_image(torch.empty(images, 3, size, size))
    # no mask: fake tensors have no values that could tell which slots are padding
    queries = model.query_image(features, ones(images, instruction), None)
    queries = model.project_queries(queries)
    queries = queries.flatten(0, 1).unflatten(0, (samples, -1))
    seq2seq = model.language_model.config.is_encoder_decoder
    text = model.language_model.get_input_embeddings()(
        ones(samples, prompt if seq2seq else prompt + response - 1)
    )
    embeds = torch.cat([queries.to(text.dtype), text], dim=1)
    packing = decoder_packing = None
    decoder_ids = ones(samples, response) if seq2seq else None
    if packs(model.language_model):
        packing = _full(samples, embeds.shape[1], seq2seq)
        embeds = packing.pack(embeds)
        if decoder_ids is not None:
            decoder_packing = _full(samples, response, seq2seq)
            decoder_ids = decoder_packing.pack(decoder_ids)
    places = ones(samples * response)
    if packing is not None and abilities_of(model.language_model).fused:
        packing = replace(packing, read=places)
    joined = Joined(
        inputs_embeds=embeds,
        attention_mask=None,
        rows=ones(samples * response),
        places=places,
        targets=ones(samples * response),
        decoder_ids=decoder_ids,
        packing=packing,
        decoder_packing=decoder_packing,
    )
    with model.language_precision():
        return model.language.loss(joined).sum()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _full(samples: int, width: int, apart: bool) -> Packing:
    """Packed rows without padding. With ``apart`` each row has its own attention, as T5's bias
    needs; otherwise they form one long row, which saves the same tensors in fewer calls."""
    slots = ones(samples * width)
    lengths = [width] * samples if apart else [len(slots)]
    return Packing(ones(samples, width), slots, slots[None], lengths)


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd saves between ``forward`` and its backward pass, without weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor  # a reference, so that no other tensor reuses its storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def rerun_bytes(forward: Callable[[], Tensor], model: InstructBlip) -> int:
    """As `saved_bytes`, while one of the checkpointed layers runs again."""
    sizes = []
    for _, layers in stacks_of(model.language_model):
        checkpointed = layers[0].forward
        _, layers[0].forward = checkpointed.args
        sizes.append(saved_bytes(forward, model))
        layers[0].forward = checkpointed
    return max(sizes)


def encoder_bytes(model: InstructBlip, images: int, on_gpu: bool = False) -> int:
    """Bytes of the widest layer of the image encoder: a feed-forward network at its activation,
    which needs one or more copies of the inner states, or at its output. Of another encoder than
    the ViT, which may be built in any way, a pass is followed."""
    vision = model.config.vision
    images = min(images, model.image_chunk)
    if isinstance(vision, EncoderConfig):
        pixels = torch.empty(images, 3, vision.image_size, vision.image_size)
        living = _Living(pixels, *model.parameters(), *model.buffers(), copies=not on_gpu)
        with living, torch.no_grad():
            model.encode_image(pixels)
        return living.peak
    size = model.vision_model.dtype.itemsize
    tokens = images * vision.num_tokens
    inner, hidden = vision.intermediate_size, vision.hidden_size
    copies = {"gelu": 1, "quick_gelu": 3}.get(vision.hidden_act, 2)
    return tokens * size * max(copies * inner + 2 * hidden, inner + 3 * hidden)


class _Living(TorchDispatchMode):
    """``peak`` is the most bytes that other tensors than the ``given`` ones occupy together.

    With ``copies`` it includes the input and the weights of a grouped convolution in the layout of
    oneDNN, which computes it on a CPU and makes these copies inside the call.
    """

    def __init__(self, *given: Tensor, copies: bool) -> None:
        super().__init__()
        self.peak = 0
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.living: dict[StorageWeakRef, int] = {}
        self.copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.living[StorageWeakRef(storage)] = storage.nbytes()
        self.living = {ref: size for ref, size in self.living.items() if not ref.expired()}
        copied = 0
        if self.copies and func is torch.ops.aten.convolution.default and args[8] > 1:
            copied = args[0].nbytes + args[1].nbytes
        self.peak = max(self.peak, sum(self.living.values()) + copied)
        return result


def logits_bytes(model: InstructBlip, tokens: int) -> int:
    """Bytes of one chunk of logits: in fp32, and in the head's data type where that differs."""
    head = model.language_model.get_output_embeddings()
    size = head.weight.element_size()
    width = 4 if size == 4 else 4 + size
    if not is_frozen_linear(head):
        width = size + 8  # and the gradient
    return min(tokens, LOSS_CHUNK) * head.weight.shape[0] * width


def advise(memory: Memory, available: int, recipe: Recipe, world_size: int = 1) -> str:
    """Whether it fits into ``available`` bytes, or what to change, the cheapest change first."""
    if memory.peak <= available:
        return f"fits: {memory.peak / 2**30:.1f} of {available / 2**30:.1f} GiB"
    changes = []
    training = recipe.training
    if not training.checkpoint_activations:
        changes.append("training.checkpoint_activations=true")
    fixed = memory.frozen + memory.trained + memory.optimizer + memory.gradients
    if fixed < available and training.micro_batch_size(world_size) > 1:
        parts = (memory.activations + memory.passing) / (available - fixed)
        divisors = [n for n in range(1, training.batch_size + 1) if not training.batch_size % n]
        wanted = training.accumulate * parts
        accumulate = next((n for n in divisors if n >= wanted), training.batch_size)
        if training.token_budget is None:
            changes.append(f"training.accumulate={accumulate}")
        else:
            tokens = int(training.token_budget / parts)
            changes.append(f"training.tokens_per_micro_batch={tokens}")
    if training.precision == "fp32":
        changes.append("training.precision=bf16")
    if fixed >= available and recipe.model.quantize is None:
        changes.append("model.quantize=nf4")
    remedy = " or ".join(changes) or "a larger device, or a smaller language model"
    return f"does not fit: {memory.peak / 2**30:.1f} GiB of {available / 2**30:.1f}; set {remedy}"
