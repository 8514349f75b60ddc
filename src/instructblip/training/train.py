"""THE training loop.

It trains any module that has ``loss(batch)`` and reads from top to bottom. `train` is the loop; the
functions below it are its parts, in the order in which they are called.

A run resumes bit for bit on a CPU: the batches are a function of (seed, step, rank), dropout is
seeded anew in each step, and a checkpoint holds everything else. On a GPU some sums have no fixed
order, in a resumed run as in the same run twice.
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
from instructblip.core.batch import Batch, sent_ahead
from instructblip.core.regions import part
from instructblip.training.adamw import AdamW
from instructblip.training.checkpoint import checkpoint_path
from instructblip.training.config import TrainingConfig
from instructblip.training.log import RunLog
from instructblip.training.optim import (
    coalesce_gradients,
    gradient_values,
    learning_rate,
    make_optimizer,
    trainable_parameters,
)
from instructblip.training.profile import profiling
from instructblip.training.run_directory import Export, Progress, RunFiles, merge_windows
from instructblip.training.signals import Interrupted, Termination
from instructblip.training.watchdog import Watchdog

Evaluate = Callable[[Any], Mapping[str, float]]
"""Takes the model and returns its scores on the held-in sets; ``score`` is to be maximised."""
Stopped = Literal["finished", "early", "terminated"]


@runtime_checkable
class Batches(Protocol):
    """The micro batches of this rank: a list for each step, from ``step`` on."""

    def iterate(self, step: int) -> Iterator[list[Batch]]: ...


class NonFiniteLossError(ValueError):
    """The loss or its gradient is infinite or not a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended.

    ``best_score`` is None without validation; ``seconds`` is wall time; ``waited_for_data`` is
    `RunLog.waited_for_data` of this rank.
    """

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
        batches: the micro batches of this rank.
        evaluate: called with the model in eval mode; ``score`` decides which weights are the best.
        folder: the run directory: checkpoints/, metrics.jsonl, curves.png, best/ and last/.
        resume: continue from the newest complete checkpoint in ``folder``, if there is one.
        export: writes best/ and last/; without it there are checkpoints only.
        notes: text files stored in the run directory, each checkpoint and each export, by name.

    Raises:
        NonFiniteLossError: naming step and samples; neither it nor a later step changed a weight.
        ValueError: if ``folder`` already holds a run and ``resume`` is off.
        OSError: if a checkpoint cannot be written; older ones are intact.
        KeyboardInterrupt: after Ctrl-C, once the step is saved. (SIGTERM returns "terminated".)
    """
    began = time.monotonic()
    device = distributed.resolve_device(config.device)
    if device.type == "cuda":  # in bf16 what is left in fp32 may round its factors to 10 bits
        tf32 = "tf32" if config.precision == "bf16" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = tf32
    model.to(device).train()
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(model, config)
    files = RunFiles(folder, config.keep_last, export, notes or {})
    progress = files.restore(parameters, optimizer, resume)
    files.write_notes()
    stream = sent_ahead(batches.iterate(progress.step), device)
    is_main = distributed.is_main()
    validated_step = -1 if progress.best_step is None else progress.validated_step
    log = RunLog(folder, config, progress.step, validated_step, active=is_main)
    watchdog = Watchdog(config.watchdog_seconds)
    profiled = profiling(folder, active=config.profile and is_main)
    unread: list[Outcome] = []  # of steps whose losses may still be on the device

    def read(but: int = 0) -> None:
        while len(unread) > but:
            unread.pop(0).add_to(progress, files)

    def save() -> None:
        read()
        log.flush()  # a checkpoint relies on the lines before it
        files.save(parameters, optimizer, progress)

    with Termination() as termination, log, watchdog, profiled as end_step:
        while True:
            step = progress.step  # updates made so far; the model is the one after them

            # Validate. The step is saved first, so that an error in the validation does not lose
            # it, and again afterwards, with the score.
            watchdog.rest()
            validated = False
            due = step > progress.validated_step and is_due(step, config.validate_every, config)
            due |= config.validate_first and step == 0 and progress.best_step is None
            if evaluate is not None and due:
                read()
                if step > files.saved_step:
                    save()
                validated = validate(model, evaluate, progress, termination, log, files)

            # Save: every so often, at the end, and when the process is asked to stop. All ranks
            # stop together, since a rank that is alone would wait for the others for ever.
            terminated = distributed.any_rank(termination.requested)
            due = terminated or is_due(step, config.save_every, config)
            if validated or (due and step > files.saved_step):
                save()

            # Stop.
            stopped = reason_to_stop(progress, config, terminated)
            if stopped:
                break

            # Fetch the micro batches of one step.
            tick = time.monotonic()
            watchdog.watch(step, "waiting for data")
            with part("input"):
                micro_batches = next(stream)
            waited = time.monotonic() - tick

            # Make one update: forward and backward over the micro batches, then the optimiser.
            watchdog.watch(step, "in the step", micro_batches)
            rate = learning_rate(step, config)
            torch.manual_seed(seed_of(config.seed, step, distributed.rank()))  # of the dropout
            outcome = update(model, parameters, optimizer, micro_batches, rate, step, files, config)
            unread.append(outcome)
            progress.step += 1

            # Read the losses: on a GPU those of the step before, while it computes this one.
            read(but=0 if outcome.arrived is None else 1)

            # Log the losses since the last line, summed over the ranks.
            log.tick(progress.step, time.monotonic() - tick, waited)
            if progress.step % config.log_every == 0 or progress.step == config.steps:
                read()
                merge_windows(progress)
                metrics = {**losses(progress), "lr": rate, "grad_norm": outcome.norm}
                log.train(progress.step, metrics)
                progress.window, progress.terms = {}, {}
            if table := end_step():
                log.print(table)
        finish(stopped, progress, files, log)
    if termination.by_hand:
        raise KeyboardInterrupt
    return TrainResult(
        step=progress.step,
        stopped=stopped,
        best_score=progress.best_score,
        best_step=progress.best_step,
        seconds=time.monotonic() - began,
        waited_for_data=log.waited_for_data,
    )


def is_due(step: int, every: int | None, config: TrainingConfig) -> bool:
    """Whether what happens ``every`` so many steps, and at the end, happens at ``step``."""
    return step > 0 and (step >= config.steps or (every is not None and step % every == 0))


def validate(
    model: nn.Module,
    evaluate: Evaluate,
    progress: Progress,
    termination: Termination,
    log: RunLog,
    files: RunFiles,
) -> bool:
    """Score the model, export it as best/ if its score is the highest, and update ``progress``.

    Returns False if a signal interrupted it; the resumed run then validates again.
    """
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
    """Why the run ends here, or None to continue."""
    patience = config.early_stopping_patience
    if terminated:
        return "terminated"
    if progress.step >= config.steps:
        return "finished"
    if patience is not None and progress.validations_without_best >= patience:
        return "early"
    return None


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for the dropout of each step and rank: the finaliser of splitmix64."""
    value = (seed * 1_000_003 + step * 65_537 + rank + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step computed; on a GPU a copy that may still be on its way.

    ``values`` are the losses of all samples of this rank and those of their terms, the gradient
    norm, and the number of ranks that have a value that is not finite.
    """

    step: int
    batches: list[Batch]
    terms: list[list[str]]
    values: Tensor
    arrived: Any  # an event of the GPU, or None

    def check(self, files: RunFiles) -> list[float]:
        """The values, once they are there; raises NonFiniteLossError if any rank has a bad one."""
        if self.arrived is not None:
            self.arrived.synchronize()
        *values, num_bad = self.values.tolist()
        if num_bad:
            raise NonFiniteLossError(_describe_non_finite(self.step, self.batches, values, files))
        return values

    def add_to(self, progress: Progress, files: RunFiles) -> None:
        """Add the losses to those since the last line of the log."""
        values = iter(self.check(files))
        _add_to_window(progress.window, self.batches, values)
        for batch, names in zip(self.batches, self.terms, strict=True):
            for name in names:
                total = progress.terms.setdefault(name, [0.0, 0])
                total[0] += next(values) * batch.num_response_tokens
                total[1] += batch.num_response_tokens

    @property
    def norm(self) -> float:
        return self.values[-2].item()


def update(
    model: Any,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    rate: float,
    step: int,
    files: RunFiles,
    config: TrainingConfig,
) -> Outcome:
    """Make one optimiser step over the micro batches of all ranks.

    The loss is the mean over the response tokens of the whole global step, so that neither
    accumulation nor the number of ranks changes it: 1 x 8 samples give the gradient of 8 x 1.

    A step with a value that is not finite changes no weight. On a GPU AdamW itself leaves out this
    step and all later ones, and the outcome is checked while the GPU computes the next step;
    elsewhere NonFiniteLossError is raised here, before the optimiser runs.
    """
    # The tokens of all micro batches of all ranks are counted first; each loss is a sum over
    # tokens, divided by this count. Gradients then simply add up, here and over the ranks.
    num_tokens = float(sum(batch.num_response_tokens for batch in micro_batches))
    tokens = distributed.all_reduce_sum(torch.tensor(num_tokens))
    # Ranks gather a sharded layer together: one with fewer micro batches repeats its last, which
    # adds zero.
    sharded, passes = config.parallel == "fsdp2", len(micro_batches)
    passes = max(distributed.gather_objects(passes)) if sharded else passes
    sample_losses: list[Tensor] = []
    terms: list[Mapping[str, Tensor]] = []
    for batch in micro_batches:
        output = model.loss(batch)
        (output.loss_sum / tokens).backward()
        coalesce_gradients(parameters.values())
        sample_losses.append(output.sample_losses.detach().float())  # [B]
        terms.append(output.terms)
    for _ in range(len(micro_batches), passes):
        (model.loss(micro_batches[-1]).loss_sum * 0).backward()
    distributed.sum_gradients(parameters.values())

    with part("optimiser"):
        norm = nn.utils.get_total_norm(gradient_values(parameters.values()))
    singles = [*(value for each in terms for value in each.values()), norm]
    singles = [value.detach().float().reshape(1) for value in singles]
    values = torch.cat([*sample_losses, *singles])
    num_bad = distributed.all_reduce_sum((~values.isfinite()).any().float())
    values = torch.cat([values, num_bad.reshape(1)])
    arrived = None
    if values.device.type == "cuda" and isinstance(optimizer, AdamW):
        optimizer.skip(num_bad)
        values, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
    hosts, names = [batch.host for batch in micro_batches], [list(each) for each in terms]
    outcome = Outcome(step, hosts, names, values, arrived)
    if arrived is None:
        outcome.check(files)

    with part("optimiser"):
        if config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters.values(), config.clip_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return outcome


def losses(progress: Progress) -> dict[str, Any]:
    """Mean loss per response token in the window, over all data sets, for each of them, and for
    each of the terms where the loss has several."""
    window = progress.window
    total = [sum(column) for column in zip(*window.values(), strict=True)] or [0.0, 0.0]
    by_set, by_term = (
        {name: loss / max(1, tokens) for name, (loss, tokens) in each}
        for each in (sorted(window.items()), progress.terms.items())
    )
    terms = {"terms": by_term} if by_term else {}
    mean = total[0] / max(1, total[1])
    return {"loss": mean, "losses": by_set, **terms, "tokens": int(total[1])}


def finish(stopped: Stopped, progress: Progress, files: RunFiles, log: RunLog) -> None:
    """Export last/ and draw the curves, unless the run will be resumed; print why it ended."""
    if stopped == "terminated":
        log.print(f"interrupted: saved step {progress.step}; continue with --resume")
    else:
        files.export_to("last")
        log.draw_curves()
        why = "stopped early" if stopped == "early" else "finished"
        best = "" if progress.best_step is None else f"; best at step {progress.best_step}"
        log.print(f"{why} at step {progress.step}{best}")
    if log.waited_for_data is not None:
        log.print(f"waited for data {log.waited_for_data:.1%} of the time of the steps")


def _add_to_window(
    window: dict[str, list[float | int]], batches: list[Batch], values: Iterator[float]
) -> None:
    names = [name for batch in batches for name in (batch.datasets or ("data",) * len(batch))]
    tokens = [n for batch in batches for n in batch.sample_counts.tolist()]
    for name, count in zip(names, tokens, strict=True):
        total = window.setdefault(name, [0.0, 0])
        total[0] += next(values)
        total[1] += count


def _describe_non_finite(
    step: int, batches: list[Batch], values: list[float], files: RunFiles
) -> str:
    names, norm = [name for batch in batches for name in batch.sample_names], values[-1]
    bad = [f"{n} ({v})" for n, v in zip(names, values, strict=False) if not math.isfinite(v)]
    what = f"the loss of {len(bad)} samples is not finite: {', '.join(bad[:8])}"
    if not bad:
        what = f"the gradient norm is {norm}, each loss here is finite; samples: "
        what += ", ".join(names[:32])
    sets = sorted({name for batch in batches for name in batch.datasets})
    kept = "no checkpoint was written yet"
    if files.saved_step:
        kept = f"the last good checkpoint is {checkpoint_path(files.checkpoints, files.saved_step)}"
    return (
        f"step {step} (data sets {', '.join(sets)}): {what}. No weight was changed; {kept}. "
        "Look at these samples, lower training.learning_rate, or set training.precision=fp32"
    )
