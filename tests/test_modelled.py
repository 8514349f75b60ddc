"""The model of samples/s on GPUs: what it is built of, and the script at toy width."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import modelled
from benchmarks.modelled import BANDWIDTH, Meter, Texts, fuse, product_seconds
from benchmarks.side_by_side import SIZES
from instructblip.model.config import InstructBlipConfig, QFormerConfig, VisionConfig
from instructblip.model.instructblip import InstructBlip

LAUNCH = {"vision": 0.01, "q-former": 0.02, "language": 0.03, "optimiser": 0.01}


def test_a_product_takes_twice_as_long_for_twice_the_tokens_where_the_gpu_is_full():
    full = product_seconds(9_000, 11_008, 4096)
    assert product_seconds(18_000, 11_008, 4096) == pytest.approx(2 * full, rel=0.1)
    assert full == pytest.approx(2 * 9_000 * 11_008 * 4096 / modelled.RATE, rel=0.1)
    # one tile more than the multiprocessors is one more wave
    rows = 128 * modelled.SMS
    assert product_seconds(rows + 1, 256, 4096) > 1.4 * product_seconds(rows, 256, 4096)
    assert product_seconds(1, 4096, 4096) == pytest.approx(2 * 4096**2 / BANDWIDTH, rel=0.01)


def test_compiled_element_wise_work_reads_and_writes_once():
    a, b = (torch.empty(8192, 8192, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with Meter() as meter:
        torch.mm((a + b).relu_().view(-1, 8192) * b, a)
    sizes = [kernel.seconds * BANDWIDTH / a.nbytes for kernel in meter.kernels]
    assert sizes[:3] == pytest.approx([3, 2, 3])
    joined, product = fuse(meter.kernels)
    assert joined.seconds * BANDWIDTH / a.nbytes == pytest.approx(3)  # a and b, and the result
    assert product.seconds == product_seconds(8192, 8192, 8192)


@pytest.fixture(scope="module")
def model() -> InstructBlip:
    """Vicuna-7B's widths with two layers in each part."""
    config = InstructBlipConfig(
        vision=VisionConfig(num_hidden_layers=2),
        qformer=QFormerConfig(num_hidden_layers=2),
        language=SIZES["vicuna7b"]["language"] | {"num_hidden_layers": 2},
    )
    return modelled.build(config, "meta")


def test_more_gpus_are_slower_by_no_more_than_the_sum_of_gradients(model: InstructBlip):
    texts = Texts.draw(64)
    gpus = {}
    for ranks in (1, 2, 8):
        parts = modelled.micro_batches(model, texts, ranks, 10_000)
        step = modelled.step_of(model, parts, ranks, LAUNCH)
        stored = modelled.step_of(model, parts, ranks, LAUNCH, stored=True)
        assert stored.gpu < step.gpu
        assert stored.slow_cpu < step.slow_cpu
        assert (step.reduce > 0) == (ranks > 1)
        gpus[ranks] = step.gpu
    assert gpus[1] / 8 < gpus[8] < gpus[2] < 0.7 * gpus[1]


def test_a_step_over_the_budget_is_cut_and_starts_its_kernels_again(model: InstructBlip):
    texts = Texts.draw(64)
    whole, cut = (modelled.micro_batches(model, texts, 1, budget) for budget in (10_000, 2_000))
    assert len(whole) == 1 < len(cut)
    assert sum(part.samples for part in cut) == 64
    cpu = [modelled.step_of(model, parts, 1, LAUNCH).slow_cpu for parts in (whole, cut)]
    assert cpu[1] > (len(cut) - 1) * cpu[0]


def test_the_script_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ["--toy", "--plain", "--sizes", "flant5xl", "--ranks", "1", "8", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["modelled", *options, "--out", str(tmp_path)])
    monkeypatch.setattr(modelled, "ROUNDS", 1)
    threads = torch.get_num_threads()
    modelled.main()
    torch.set_num_threads(threads)
    (path,) = tmp_path.glob("modelled_h200_*.md")
    lines = path.read_text("utf-8").splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| flant5xl | ")]
    rows = [row for row in rows if len(row) == 9]
    assert [row[1].strip() for row in rows] == ["1", "1", "8", "8"]
    for row in rows:
        slow = max(float(row[5]) + float(row[6]), float(row[7].split()[-1])) / 1000
        assert float(row[8].split("-")[0].replace(",", "")) == pytest.approx(192 / slow, rel=0.02)
