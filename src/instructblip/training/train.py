"""THE loop. It drives anything with ``.loss(batch)`` and reads from top to bottom.

Each turn keeps one order: evaluate, save, stop, step, log. The turn at ``step`` looks at the model
after ``step`` finished updates. What is evaluated is saved first, so that an error in there costs
no step. Batches and dropout are functions of (seed, step, rank), so a run that resumes from a
checkpoint goes on bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from instructblip.core import distributed
from instructblip.core.batch import Batch
from instructblip.core.regions import part
from instructblip.training.config import TrainingConfig
from instructblip.training.log import RunLog
from instructblip.training.optim import (
    coalesce_gradients,
    learning_rate,
    make_optimizer,
    numbers_of_gradients,
    trainable_parameters,
)
from instructblip.training.profile import Profile
from instructblip.training.run_directory import (
    Export,
    Progress,
    RunFiles,
    merge_windows,
)
from instructblip.training.signals import Interrupted, Termination
from instructblip.training.watchdog import Watchdog

Evaluate = Callable[[Any], Mapping[str, float]]
"""Scores of the model on the held-in sets; ``score`` is the one to maximise."""
Stopped = Literal["finished", "early", "terminated"]


@runtime_checkable
class Batches(Protocol):
    """This rank's micro batches in order, from the first one of ``step`` on."""

    def iterate(self, step: int) -> Iterator[Batch]: ...


class NonFiniteLossError(ValueError):
    """The loss or its gradient is infinite or not a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. ``best_score`` is None without validation; ``seconds`` is wall time;
    ``waited_for_data`` is `RunLog.waited_for_data` of this rank."""

    step: int
    stopped: Stopped
    best_score: float | None
    best_step: int | None
    seconds: float
    waited_for_data: float | None


def train(
    model: nn.Module,
    batches: Batches,
    evaluate: Evaluate | None,
    config: TrainingConfig,
    folder: Path,
    *,
    resume: bool = False,
    export: Export | None = None,
    notes: Mapping[str, str] | None = None,
) -> TrainResult:
    """Train the parameters of ``model`` that require a gradient.

    Args:
        model: ``loss(batch)`` returns ``loss_sum`` and ``sample_losses`` [B], sums in nats.
        batches: this rank's micro batches, ``config.accumulate`` of them for every step.
        evaluate: called with the model in eval mode; ``score`` decides which weights are the best.
        folder: the run directory: checkpoints/, metrics.jsonl, curves.png, best/ and last/.
        resume: go on from the newest complete checkpoint in ``folder``, if there is one.
        export: writes best/ and last/; without it there are checkpoints only.
        notes: text files stored in the run directory, each checkpoint and each export, by name.

    Raises:
        NonFiniteLossError: naming step and samples, before any weight is touched.
        ValueError: if ``folder`` already holds a run and ``resume`` is off.
        OSError: if a checkpoint cannot be written; older ones are intact.
    """
    began = time.monotonic()
    device = distributed.resolve_device(config.device)
    model.to(device).train()
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(model, config)
    files = RunFiles(folder, config.keep_last, export, notes)
    progress = files.restore(parameters, optimizer, resume)
    files.write_notes()
    stream = batches.iterate(progress.step)
    main = distributed.is_main()
    log = RunLog(folder, config, progress.step, progress.validated_step, active=main)
    profile = Profile(folder, active=config.profile and main)
    watchdog = Watchdog(config.watchdog_seconds)
    with Termination() as termination, log, profile, watchdog:
        while True:
            step = progress.step
            # evaluate ------------------------------------------------------------------------
            watchdog.rest()
            due = step > progress.validated_step and is_due(step, config.validate_every, config)
            if due and evaluate is not None and step > files.saved_step:
                log.flush()
                files.save(parameters, optimizer, progress)
            validated = due and validate(model, evaluate, progress, termination, log, files)
            # save ----------------------------------------------------------------------------
            terminated = distributed.any_rank(termination.requested, device)
            due = terminated or is_due(step, config.save_every, config)
            if validated or (due and step > files.saved_step):
                log.flush()
                files.save(parameters, optimizer, progress)
            # stop ----------------------------------------------------------------------------
            stopped = reason_to_stop(progress, config, terminated)
            if stopped:
                break
            # step ----------------------------------------------------------------------------
            tick = time.monotonic()
            micro_batches = next_batches(stream, step, config, watchdog)
            waited = time.monotonic() - tick
            rate = learning_rate(step, config)
            torch.manual_seed(seed_of(config.seed, step, distributed.rank()))
            norm = update(
                model, parameters, optimizer, micro_batches, rate, progress, config, files
            )
            progress.step += 1
            # log -----------------------------------------------------------------------------
            log.tick(progress.step, time.monotonic() - tick, waited)
            log_step(log, progress, config, lr=rate, grad_norm=norm)
            if said := profile.step():
                log.say(said)
        finish(stopped, progress, files, log)
    return TrainResult(
        step=progress.step,
        stopped=stopped,
        best_score=progress.best_score,
        best_step=progress.best_step,
        seconds=time.monotonic() - began,
        waited_for_data=log.waited_for_data,
    )


def next_batches(
    stream: Iterator[Batch], step: int, config: TrainingConfig, watchdog: Watchdog
) -> list[Batch]:
    """The micro batches of ``step``. The watchdog knows what is waited for, then what they hold."""
    watchdog.watch(step, "waiting for data")
    with part("input"):
        micro_batches = [next(stream) for _ in range(config.accumulate)]
    watchdog.watch(step, "in the step", micro_batches)
    return micro_batches


def log_step(log: RunLog, progress: Progress, config: TrainingConfig, **figures: float) -> None:
    """Log ``figures`` and the losses since the last time, where that is due; begin a new window."""
    step = progress.step
    if step % config.log_every and step != config.steps:
        return
    merge_windows(progress)
    log.train(step, {**losses(progress), **figures})
    progress.window = {}


def update(
    model: Any,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    rate: float,
    progress: Progress,
    config: TrainingConfig,
    files: RunFiles,
) -> float:
    """One optimiser step over the micro batches of all ranks; returns the gradient norm.

    The loss is the mean over the response tokens of the whole global step: the tokens are counted
    first, and each micro batch's sum is divided by that count, so that accumulation and ranks
    change nothing. Adds to ``progress.window``.

    Raises:
        NonFiniteLossError: before the weights change.
    """
    device = next(iter(parameters.values())).device
    own_tokens = sum(batch.num_response_tokens for batch in micro_batches)
    tokens = distributed.all_reduce_sum(torch.tensor(float(own_tokens), device=device))
    sample_losses: list[Tensor] = []
    for batch in micro_batches:
        output = model.loss(batch.to(device))
        (output.loss_sum / tokens).backward()
        coalesce_gradients(parameters.values())
        sample_losses.append(output.sample_losses.detach().float())
    distributed.sum_gradients(parameters.values())
    with part("optimiser"):
        norm = nn.utils.get_total_norm(numbers_of_gradients(parameters.values()))
    *values, norm_value = torch.cat([*sample_losses, norm.float().reshape(1)]).tolist()  # one sync
    bad = not (math.isfinite(norm_value) and all(map(math.isfinite, values)))
    if distributed.any_rank(bad, device):
        raise NonFiniteLossError(
            _blame(progress.step, micro_batches, values, norm_value, files.last_good)
        )
    with part("optimiser"):
        if config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters.values(), config.clip_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _add_to_window(progress.window, micro_batches, values)
    return norm_value


def validate(
    model: nn.Module,
    evaluate: Evaluate | None,
    progress: Progress,
    termination: Termination,
    log: RunLog,
    files: RunFiles,
) -> bool:
    """Score the model, keep it as best/ if it is, and write that down in ``progress``.

    Returns whether it did: SIGTERM gives a validation up, and the run that resumes does it again.
    """
    if evaluate is None:
        return False
    model.eval()
    try:
        with torch.no_grad(), termination.interruptible(distributed.world_size() == 1):
            scores = distributed.broadcast_object(dict(evaluate(model)))
    except Interrupted:
        return False
    finally:
        model.train()
    assert "score" in scores, f"evaluate must return a `score`, got {sorted(scores)}"
    best = progress.best_score is None or scores["score"] > progress.best_score
    if best:
        progress.best_score, progress.best_step = scores["score"], progress.step
        files.export_to("best")
    progress.validations_without_best = 0 if best else progress.validations_without_best + 1
    progress.validated_step = progress.step
    log.validation(progress.step, scores, best)
    return True


def reason_to_stop(progress: Progress, config: TrainingConfig, terminated: bool) -> Stopped | None:
    """Why the run ends here, or None to go on."""
    patience = config.early_stopping_patience
    if terminated:
        return "terminated"
    if progress.step >= config.steps:
        return "finished"
    if patience is not None and progress.validations_without_best >= patience:
        return "early"
    return None


def finish(stopped: Stopped, progress: Progress, files: RunFiles, log: RunLog) -> None:
    """Leave the last weights and the curves, unless the run will be resumed; say why it ended."""
    if stopped != "terminated":
        files.export_to("last")
        log.curves()
    log.say(describe_end(stopped, progress))
    if log.waited_for_data is not None:
        log.say(f"waited for data {log.waited_for_data:.1%} of the time of the steps")


def describe_end(stopped: Stopped, progress: Progress) -> str:
    """One line about why the run ended and what to do with it."""
    if stopped == "terminated":
        return f"SIGTERM: saved step {progress.step}; continue with --resume"
    why = "stopped early" if stopped == "early" else "finished"
    best = f"; best at step {progress.best_step}" if progress.best_step else ""
    return f"{why} at step {progress.step}{best}"


def is_due(step: int, every: int | None, config: TrainingConfig) -> bool:
    """Whether something done ``every`` so many steps, and at the end, is due at ``step``."""
    return step > 0 and (step >= config.steps or (every is not None and step % every == 0))


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed of its own for the dropout of each step and rank: splitmix64's finaliser."""
    value = (seed * 1_000_003 + step * 65_537 + rank + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def losses(progress: Progress) -> dict[str, Any]:
    """Mean loss per response token over the window, and for each data set."""
    window = progress.window
    total = [sum(part) for part in zip(*window.values(), strict=True)] or [0.0, 0.0]
    own = {name: loss / max(1, tokens) for name, (loss, tokens) in sorted(window.items())}
    return {"loss": total[0] / max(1, total[1]), "losses": own, "tokens": int(total[1])}


def _add_to_window(
    window: dict[str, list[float]], batches: list[Batch], values: list[float]
) -> None:
    names = [name for batch in batches for name in (batch.datasets or ("data",) * len(batch))]
    tokens = [n for batch in batches for n in batch.response_mask.sum(1).tolist()]
    for name, value, count in zip(names, values, tokens, strict=True):
        total = window.setdefault(name, [0.0, 0])
        total[0] += value
        total[1] += count


def _blame(
    step: int, batches: list[Batch], values: list[float], norm: float, last_good: Path | None
) -> str:
    names = [
        f"{batch.datasets[i] if batch.datasets else '?'}/{batch.ids[i] if batch.ids else i}"
        for batch in batches
        for i in range(len(batch))
    ]
    culprits = [f"{n} ({v})" for n, v in zip(names, values, strict=True) if not math.isfinite(v)]
    what = f"the loss of {len(culprits)} samples is not finite: {', '.join(culprits[:8])}"
    if not culprits:
        what = f"the gradient norm is {norm}, each loss here is finite; samples: "
        what += ", ".join(names[:32])
    sets = sorted({name for batch in batches for name in batch.datasets})
    kept = (
        f"the last good checkpoint is {last_good}" if last_good else "no checkpoint was written yet"
    )
    return (
        f"step {step} (data sets {', '.join(sets)}): {what}. No weight was changed; {kept}. "
        "Look at these samples, lower training.learning_rate, or set training.precision=fp32"
    )
