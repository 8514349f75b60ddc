"""What a training run can be told."""

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", name):
        raise ValueError("expected auto, cpu, cuda, mps or xpu, or one of several such as cuda:1")
    return name


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(BaseModel):
    """The optimiser, its schedule, and how often the run looks up. Defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trainable: tuple[str, ...] = ("qformer",)
    """Which parts of the model move; all the rest stays bit-identical."""
    steps: PositiveInt = 60_000
    """Optimiser steps of the whole run."""
    batch_size: PositiveInt = 128
    """Samples of one optimiser step, over all ranks and all accumulated micro batches."""
    accumulate: PositiveInt = 1
    """Micro batches that each rank runs before one optimiser step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw is the paper's; muon orthogonalises the updates of matrices inside networks, which
    learns small models from scratch in fewer steps."""
    learning_rate: PositiveFloat = 1e-5
    """Highest learning rate, reached when the warm-up ends."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at which the cosine ends."""
    warmup_steps: NonNegativeInt = 1000
    """Steps over which the learning rate rises linearly."""
    warmup_start_learning_rate: NonNegativeFloat = 1e-8
    """Learning rate of the very first step."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay of the first and of the second moment."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay; on matrices and query tokens, never on biases, norms and the vectors of
    words that no batch had."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm, above which gradients are scaled down; null for none."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of forward and backward; what is trained keeps fp32 weights either way."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """What several ranks hold: all of the model each, or the layers of the frozen language model in
    parts (fsdp2), for one that does not fit a device."""
    checkpoint_activations: bool = False
    """Run the language model's layers again in the backward pass instead of keeping their
    activations: a third more time in it, a fraction of the memory, the same gradients."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Where to train: auto, cpu, cuda, mps or xpu, or cuda:1; auto takes a GPU if there is one."""
    workers: NonNegativeInt = 2
    """Processes that prepare batches ahead of the model; 0 for the training process itself."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Decides dropout; order and templates of the samples have the data's own seed."""
    validate_every: PositiveInt | None = 3000
    """Steps between validations on the held-in sets; null for the last step only."""
    save_every: PositiveInt = 1000
    """Steps between checkpoints; one is also written at every validation and at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept; the one of the best validation is kept besides them."""
    log_every: PositiveInt = 20
    """Steps between lines of metrics.jsonl."""
    watchdog_seconds: PositiveFloat | None = 1800.0
    """Seconds that a batch or a step may take before the rank says what it was at and ends with an
    error, in place of waiting for ever; null for no limit."""
    profile: bool = False
    """Trace three steps: trace.json and profile.txt, what each part of a step costs."""
    early_stopping_patience: PositiveInt | None = None
    """Validations in a row without a new best after which the run stops; null for never."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be below steps {self.steps}: lower it"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above "
                f"learning_rate {self.learning_rate}"
            )
        return self

    def micro_batch_size(self, world_size: int = 1) -> int:
        """Samples of one micro batch of one rank.

        Raises:
            ValueError: if the global batch does not divide evenly.
        """
        parts = self.accumulate * world_size
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate} x "
                f"{world_size} ranks: choose a multiple of {parts}"
            )
        return self.batch_size // parts
