"""A step asks a GPU nothing: it waits once, for the losses of the step before."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.fast import attention, head
from instructblip.training.config import TrainingConfig
from instructblip.training.train import NonFiniteLossError, train
from tests.gpu import Gpu, Pretender, install
from tests.parity.tiny import tiny_batch, tiny_config

NAMES = {"datasets": ("set",) * 3, "ids": ("a", "b", "c")}


class Steps:
    """Two micro batches a step; ``waits`` are those from one step to the next."""

    def __init__(self, config: Any, change: Callable[[Batch, int], Batch]) -> None:
        self.config, self.change = config, change
        self.waits, self.beside, self.sent = [], [], []

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        while True:
            batches = [tiny_batch(self.config, 2 * step + micro) for micro in range(2)]
            self.waits.append(Gpu.waits)
            self.beside.append(Gpu.beside)
            Gpu.restart()
            batches = [self.change(replace(batch, **NAMES), step) for batch in batches]
            self.sent.append(sum(t.nbytes for batch in batches for t in batch.tensors.values()))
            yield batches
            step += 1


def cached(batch: Batch, step: int) -> Batch:
    """The batch with stored features."""
    generator = torch.Generator().manual_seed(step)
    features = torch.randn(2, 5, 16, generator=generator)
    return replace(batch, image_features=features, pixel_values=None)


def a_frame_less(batch: Batch, step: int) -> Batch:
    """Videos of two frames, of which one sample has one."""
    return replace(batch, image_index=torch.tensor([[0, 1], [1, -1], [0, 0]]))


def between_words(batch: Batch, step: int) -> Batch:
    return replace(batch, image_places=torch.tensor([[1], [0], [2]]))


def as_it_is(batch: Batch, step: int) -> Batch:
    return batch


def config_of(language: str) -> InstructBlipConfig:
    settings = {"model_type": "instructblip", **tiny_config(language, dropout=0.0)}
    return InstructBlipConfig.from_transformers(settings)


def run(
    folder: Path, model: InstructBlip, batches: Steps, device: str = "cuda:0", steps: int = 3
) -> dict[str, Any]:
    """The last line of the log."""
    config = TrainingConfig(
        steps=steps,
        learning_rate=1e-2,
        warmup_steps=0,
        device=device,
        precision="fp32",
        validate_every=None,
        log_every=steps,
        batch_size=3,
    )
    train(model, batches, None, config, folder)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def kernel(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Any:
    """What the GPU's attention for packed rows computes."""
    ends = offsets.inner.tolist() if isinstance(offsets, Pretender) else offsets.tolist()
    rows = []
    for begin, end in itertools.pairwise(ends):
        states = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
        rows.append(F.scaled_dot_product_attention(*states, is_causal=True)[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(monkeypatch)
    with Gpu():
        yield


@pytest.mark.parametrize(
    ("language", "change", "flash"),
    [
        ("llama", as_it_is, True),
        ("llama", a_frame_less, True),
        ("opt", between_words, False),
        ("t5", cached, False),
    ],
)
def test_a_step_waits_for_the_losses_of_the_one_before(
    language: str,
    change: Callable[[Batch, int], Batch],
    flash: bool,
    gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if flash:
        monkeypatch.setattr(attention, "kernel_works_on", lambda query: query.is_cuda)
        monkeypatch.setattr(attention, "varlen_attn", kernel)
    lines = []
    for device in ("cuda:0", "cpu"):
        torch.manual_seed(0)
        model = InstructBlip(config_of(language))
        batches = Steps(model.config, change)
        lines.append(run(tmp_path / device, model, batches, device))
        if device == "cuda:0":  # the first step has none before it
            assert [what for what, _ in batches.waits[-1].elements()] == ["event"], batches.waits
            assert batches.beside[1:] == batches.sent[:-1], "batches travel on their own stream"
    for name in ("loss", "grad_norm"):
        assert math.isclose(lines[0][name], lines[1][name], rel_tol=1e-4), name


@pytest.mark.parametrize(
    ("question", "what"),
    [
        (lambda targets: targets.sum().item(), "_local_scalar_dense"),
        (lambda targets: targets[targets > 3], "index by a mask"),
        (lambda targets: torch.ones(3).to(targets.device), "copy of pageable memory"),
        (lambda targets: torch.tensor([1], device=targets.device), "copy of a Python value"),
    ],
)
def test_a_question_is_noticed(
    question: Callable[[Tensor], Any],
    what: str,
    gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = head._plain_losses
    monkeypatch.setattr(head, "is_frozen_linear", lambda layer: False)
    monkeypatch.setattr(
        head, "_plain_losses", lambda *given: (question(given[2]), plain(*given))[1]
    )
    model = InstructBlip(config_of("llama"))
    batches = Steps(model.config, cached)
    run(tmp_path, model, batches)
    assert [name for name, _ in batches.waits[-1].elements()].count(what) == 2  # micro batches


@pytest.mark.parametrize(("precision", "expected"), [("bf16", "tf32"), ("fp32", "ieee")])
def test_products_in_fp32_are_exact_where_the_recipe_says_so(
    precision: str, expected: str, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def enough(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr("instructblip.training.train.make_optimizer", enough)
    model = InstructBlip(config_of("llama"))
    config = TrainingConfig(device="cuda:0", precision=precision)  # type: ignore[arg-type]
    try:
        with pytest.raises(InterruptedError):
            train(model, Steps(model.config, as_it_is), None, config, tmp_path)
        assert matmul.fp32_precision == expected
    finally:
        matmul.fp32_precision = before


def test_a_bad_step_is_noticed_one_step_later_and_changes_nothing(
    gpu: None, tmp_path: Path
) -> None:
    before: list[Tensor] = []

    def spoil(batch: Batch, step: int) -> Batch:
        if step != 2 or before:
            return batch
        before.extend(p.detach().clone() for p in model.parameters())
        assert batch.pixel_values is not None
        return replace(batch, pixel_values=batch.pixel_values * torch.nan)

    model = InstructBlip(config_of("llama"))
    batches = Steps(model.config, spoil)
    with pytest.raises(
        NonFiniteLossError, match=r"^step 2 \(data sets set\): .*set/a \(nan\)"
    ) as error:
        run(tmp_path, model, batches, steps=9)
    assert "No weight was changed" in str(error.value)
    assert len(batches.waits) == 4, "step 3 was computed before step 2 was read"
    for one, (name, other) in zip(before, model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
