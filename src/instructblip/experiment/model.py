"""The model of a recipe: its start, what trains in it, and its data types."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from instructblip.core import distributed
from instructblip.model.checkpoints.directory import read_config
from instructblip.model.compiled import why_not_compiled
from instructblip.model.config import InstructBlipConfig, LoraConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import checkpoint_layers, stacks_of
from instructblip.model.language.quantize import quantize_linears
from instructblip.model.lora import Lora, adapted_layers, add_lora, lora_layers
from instructblip.recipe.schema import Recipe
from instructblip.training.config import TrainingConfig


def model_config(recipe: Recipe) -> InstructBlipConfig:
    """The configuration that the recipe's model will have, read without its weights."""
    settings = recipe.model
    config = read_config(settings.start)
    size = settings.image_size or config.vision.image_size
    vision = type(config.vision)(**{**config.vision.model_dump(), "image_size": size})
    return config.model_copy(
        update={"vision": vision, "instruction_aware": settings.instruction_aware}
    )


def load_model(recipe: Recipe, trainable: Sequence[str] | None = None) -> InstructBlip:
    """The start of the run, with its trainable set (the recipe's by default) and data types.

    For a GPU each weight goes from its file straight to its type and device; with fsdp2, where the
    model may be larger than a device, it stays on the CPU until it is sharded.
    """
    torch.manual_seed(recipe.training.seed)  # a fresh text branch is random, and equal on resume
    training = recipe.training
    device = distributed.resolve_device(training.device)
    frozen, compute = training_dtypes(training)
    model = InstructBlip.from_pretrained(
        recipe.model.start,
        instruction_aware=recipe.model.instruction_aware,
        text_branch=recipe.model.text_branch,
        image_size=recipe.model.image_size,
        as_stored=frozen is not None,
    )
    if compiles(training):
        model.compile_layers()
    shape_language(model, recipe, trainable, device)
    sharded = training.parallel == "fsdp2"
    model.to_training_dtypes(frozen, compute, device if frozen and not sharded else None)
    if sharded:
        shard_language(model, device)
    return model


def compiles(training: TrainingConfig) -> bool:
    """Whether layers are compiled. Where ``auto`` would and torch.compile does not work, it prints
    why; ``on`` raises ValueError then."""
    device = distributed.resolve_device(training.device)
    if training.compile == "off" or (training.compile == "auto" and device.type != "cuda"):
        return False
    reason = why_not_compiled(device)
    if reason is not None and training.compile == "on":
        raise ValueError(
            f"training.compile=on: torch.compile does not work on {device} ({reason}): install "
            "a C++ compiler such as g++, for a GPU Triton as well, or set training.compile=auto"
        )
    if reason is not None and distributed.is_main():
        print(f"layers are not compiled, torch.compile does not work on {device}: {reason}")
    if training.compile == "auto":
        torch._dynamo.config.suppress_errors = True  # a layer that does not compile runs plain
    return reason is None


def training_dtypes(training: TrainingConfig) -> tuple[torch.dtype | None, torch.dtype | None]:
    """(type of frozen weights, type of the arithmetic); None keeps fp32.

    On a CPU memory is plenty, and fp32 keeps frozen weights bit-identical when they are saved.
    """
    half = torch.bfloat16 if training.precision == "bf16" else None
    return half if distributed.resolve_device(training.device).type == "cuda" else None, half


def shape_language(
    model: InstructBlip,
    recipe: Recipe,
    trainable: Sequence[str] | None = None,
    device: torch.device | None = None,
) -> None:
    """Apply the recipe to a loaded model: adapter, trainable set, quantization, checkpointing.
    Codes are computed on ``device`` and stay there.

    Raises ValueError for settings that do not go together.
    """
    language = model.language_model
    parts = tuple(recipe.training.trainable if trainable is None else trainable)
    changed = recipe.model.quantize is not None or "language_model" in recipe.training.trainable
    if recipe.training.parallel == "fsdp2" and changed:
        raise ValueError(
            "training.parallel=fsdp2 shards frozen weights of full precision: set "
            "model.quantize=null and take language_model out of training.trainable, or train "
            "with parallel=replicate"
        )
    for part, root in model.adapted.items():
        adapter = getattr(recipe.model, part)
        if adapter is not None:
            if part not in parts:
                raise ValueError(
                    f"model.{part} trains as a part of its own, and training.trainable is "
                    f"{list(parts)}: add {part} to it"
                )
            if present := lora_layers(root):
                _warn_of_other_adapter(part, root, adapter, present)
            else:
                add_lora(root, adapter)
    model.set_trainable(parts)
    if recipe.model.quantize is not None:
        on_device = None if device is None else lambda name: device
        quantize_linears(language, recipe.model.quantize, on_device)
    if recipe.training.checkpoint_activations:
        checkpoint_layers(language)


def _warn_of_other_adapter(
    part: str, root: nn.Module, asked: LoraConfig, present: dict[str, Lora]
) -> None:
    """Warn where the start's adapter, which is kept, differs from what the recipe asks for."""
    config = next(iter(present.values())).config
    names = [name for name in type(asked).model_fields if name != "targets"]
    other = {n: getattr(config, n) for n in names if getattr(asked, n) != getattr(config, n)}
    if asked.targets and adapted_layers(root, asked).keys() != present.keys():
        other["targets"] = sorted({name.rpartition(".")[2] for name in present})
    if other:
        settings = ", ".join(f"{name} {value!r}" for name, value in other.items())
        warnings.warn(
            f"model.start has an adapter, which training continues: {settings}, not as "
            f"model.{part} asks",
            stacklevel=2,
        )


def shard_language(model: InstructBlip, device: torch.device) -> None:
    """Shard the frozen layers of the language model over the ranks."""
    for stack, layers in stacks_of(model.language_model):
        distributed.shard(stack, layers, device)
