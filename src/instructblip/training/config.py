"""The settings of a training run."""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from instructblip.training.trackers import TrackerName


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", name):
        raise ValueError("expected auto, cpu, cuda, mps or xpu, or one of several such as cuda:1")
    return name


def _parallel(value: object) -> object:
    # the earlier name: nothing here is torch's DistributedDataParallel
    return "replicate" if value == "ddp" else value


def _switch(value: object) -> object:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(BaseModel):
    """The optimiser, its schedule, and what happens how often. Defaults are the paper's."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    trainable: tuple[str, ...] = ("qformer",)
    """Parts of the model that are trained; all others stay bit-identical."""
    steps: PositiveInt = 60_000
    """Optimiser steps of the run."""
    batch_size: PositiveInt = 128
    """Samples of one optimiser step, over all ranks and all accumulated micro batches."""
    accumulate: PositiveInt = 1
    """Micro batches of equal size that each rank runs before one optimiser step; above 1 it takes
    the place of ``tokens_per_micro_batch``."""
    tokens_per_micro_batch: PositiveInt | Literal["auto"] | None = None
    """Most tokens of a micro batch, image tokens and padding included: each rank cuts its share of
    a step into as few parts as fit, and any number of ranks divides a step. Samples and loss of a
    step stay the same. auto takes what `instructblip memory` predicts to fit the GPU; on a CPU a
    step is then one micro batch."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw is the paper's; muon orthogonalises the updates of matrices inside networks, with which
    small models learn from scratch in fewer steps."""
    learning_rate: PositiveFloat = 1e-5
    """Highest learning rate, reached when the warm-up ends."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at which the cosine ends."""
    warmup_steps: NonNegativeInt = 1000
    """Steps over which the learning rate rises linearly; where the run has no more steps than that,
    a tenth of its steps instead."""
    warmup_start_learning_rate: NonNegativeFloat = 1e-8
    """Learning rate of the very first step."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay of the first and of the second moment."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay of matrices and query tokens; biases, norms and the embeddings of words
    that occur in no batch do not decay."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of all gradients together, above which they are scaled down; null for none."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of forward and backward pass; trainable parameters are fp32 either way."""
    parallel: Annotated[Literal["replicate", "fsdp2"], BeforeValidator(_parallel)] = "replicate"
    """What each of several ranks holds: replicate, the whole model; fsdp2, a part of each layer of
    the frozen language model, for one that does not fit a device. Either way the ranks sum the
    gradients of the trainable parameters; ddp is an earlier name of replicate."""
    checkpoint_activations: bool = False
    """Run the language model's layers again in the backward pass instead of keeping their
    activations: the same gradients with a fraction of the memory and a third more time."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """Whether torch.compile compiles the layers in the first step, for all lengths: fewer passes
    over memory and fewer launches, the same results up to rounding. auto does on CUDA."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Device: auto, cpu, cuda, mps or xpu, or one of several as cuda:1; auto takes a GPU if there
    is one."""
    workers: NonNegativeInt = 2
    """Processes that prepare batches ahead of the model; 0 uses the training process itself."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the dropout; the order and the templates of samples follow ``data.seed``."""
    validate_every: PositiveInt | None = 3000
    """Steps between validations on the held-in sets; null for the last step only."""
    validate_first: bool = False
    """Whether the start is validated too, before any step: it is then a candidate for the best
    weights."""
    save_every: PositiveInt = 1000
    """Steps between checkpoints; one is also written at every validation and at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept, besides the one of the best validation."""
    log_every: PositiveInt = 20
    """Steps between lines of metrics.jsonl."""
    watchdog_seconds: PositiveFloat | None = 1800.0
    """Seconds that a batch or a step may take before the rank reports what it is doing and ends
    with an error instead of waiting for ever; null for no limit."""
    report_to: tuple[TrackerName, ...] = ()
    """Experiment trackers that receive the lines of metrics.jsonl as well: trackio, tensorboard,
    wandb, mlflow or swanlab. Their files lie in the run directory, and nothing is sent anywhere."""
    profile: bool = False
    """Trace three steps into trace.json, and write the time of each part into profile.txt."""
    early_stopping_patience: PositiveInt | None = None
    """Validations in a row without a new best score after which the run stops; null for never."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainingConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above "
                f"learning_rate {self.learning_rate}"
            )
        if self.early_stopping_patience is not None and self.validate_every is None:
            raise ValueError(
                f"early_stopping_patience {self.early_stopping_patience} counts validations, and "
                "validate_every null makes one at the last step only: set validate_every"
            )
        return self

    @property
    def warmup(self) -> int:
        """Steps of the warm-up of this run: ``warmup_steps``, or what fits a shorter run."""
        return self.warmup_steps if self.warmup_steps < self.steps else self.steps // 10

    @property
    def token_budget(self) -> int | None:
        """Most tokens of a micro batch; None where steps are cut by ``accumulate``, and for auto,
        until it is decided."""
        tokens = self.tokens_per_micro_batch
        return None if tokens == "auto" or self.accumulate > 1 else tokens

    def micro_batch_size(self, world_size: int = 1) -> int:
        """Samples of one micro batch of one rank, the most where its tokens are limited. ValueError
        if they are no whole number and have to be one."""
        if self.token_budget is not None:
            if self.parallel == "fsdp2" and self.batch_size < world_size:
                raise ValueError(
                    f"batch_size {self.batch_size} has no sample for some of {world_size} ranks, "
                    "and parallel=fsdp2 needs one for each: raise it"
                )
            return -(-self.batch_size // world_size)
        parts = self.accumulate * world_size
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate} x "
                f"{world_size} ranks: choose a multiple of {parts}"
            )
        return self.batch_size // parts
