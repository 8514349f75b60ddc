"""What is trained, by which optimiser, at which learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from instructblip.training.adamw import AdamW, large_tables
from instructblip.training.config import TrainingConfig
from instructblip.training.muon import Muon


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of the update that follows ``step`` finished updates.

    Linear from ``warmup_start_learning_rate`` at step 0 to ``learning_rate`` after
    ``config.warmup`` steps, then half a cosine to ``min_learning_rate`` at ``steps``. It changes in
    every step, as the paper says; the official code changes it once per epoch.
    """
    warmup = config.warmup
    if step < warmup:
        start = config.warmup_start_learning_rate
        return start + (config.learning_rate - start) * step / warmup
    progress = (step - warmup) / (config.steps - warmup)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter.

    Matrices decay; biases and the scales of norms, which are vectors, do not. Query tokens
    [1, Q, D] and embedding tables count as matrices, as in the official code.
    """
    return parameter.ndim >= 2 and not name.endswith("bias")


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Build AdamW, fused where the device offers it, or Muon, for the trainable parameters.

    AdamW leaves the rows of large embedding tables alone that no batch has read; on a CPU these
    tables get sparse gradients. Raises ValueError if nothing is trainable.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError(
            f"nothing to train: `training.trainable` {list(config.trainable)} selects no "
            "parameter; the paper's choice is [qformer]"
        )
    if config.optimizer == "muon":
        return Muon(
            parameters, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
    matrices = [p for name, p in parameters.items() if decays(name, p)]
    vectors = [p for name, p in parameters.items() if not decays(name, p)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters.values()
    )
    tables = list(large_tables(model)) if fused else []
    for table in tables:
        table.sparse = table.weight.device.type == "cpu"
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=fused,
        tables=[table.weight for table in tables],
    )


def coalesce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the entries that sparse gradients have for one row.

    Called after each micro batch, since a sparse gradient otherwise grows with each of them.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()


def gradient_values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that are not None; of sparse ones, which must be coalesced, their rows."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [g.values() if g.is_sparse else g for g in gradients]
