"""Two ranks of four samples, and four of two, are one rank of eight."""

import os
import re
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException

from instructblip.core import distributed
from instructblip.core.batch import Batch
from instructblip.training.checkpoint import load_latest
from instructblip.training.log import read_metrics, without_timings
from instructblip.training.train import train
from tests.training.test_train import stop_at
from tests.training.toy import Toy, ToyBatches, toy_config, toy_score

CHANGES = {"steps": 9, "warmup_steps": 2, "validate_every": 4, "save_every": 2, "log_every": 3}


def run(folder: Path, stop: int | None = None, resume: bool = False) -> Toy:
    config = toy_config(**CHANGES)
    model = Toy(dropout=0.0)
    batches = ToyBatches(config, distributed.rank(), distributed.world_size())
    if stop is not None:
        batches = stop_at(stop, batches)
    export = model.save_pretrained
    train(model, batches, toy_score, config, folder, resume=resume, export=export)
    return model


def worker(rank: int, ranks: int, port: int, folder: str, stop: int | None, resume: bool) -> None:
    with joined(rank, ranks, port):
        assert (distributed.rank(), distributed.world_size()) == (rank, ranks)
        assert distributed.gather_objects(rank) == list(range(ranks))
        assert distributed.any_rank(rank == 1)
        model = run(Path(folder), stop, resume)
        torch.save(model.state_dict(), Path(folder) / f"rank{rank}.pt")


@contextmanager
def joined(rank: int, ranks: int, port: int) -> Iterator[None]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.process_group("gloo"):
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(ranks: int, folder: Path, stop: int | None = None, resume: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    # forked, for a spawned rank would import torch again
    multiprocessing.start_processes(
        worker,
        args=(ranks, free_port(), str(folder), stop, resume),
        nprocs=ranks,
        start_method="fork",
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one(tmp_path: Path, ranks: int):
    whole = run(tmp_path / "whole")
    folder = tmp_path / "many"
    run_ranks(ranks, folder)
    states = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
    for name, value in whole.state_dict().items():
        assert all(torch.equal(states[0][name], state[name]) for state in states), name
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-6)
    assert_equal_records(tmp_path / "whole", folder)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_of_two_ranks_resumes_with_another_number(tmp_path: Path, ranks: int):
    whole = run(tmp_path / "whole")
    folder = tmp_path / "cut"
    run_ranks(2, folder, stop=4)
    last = load_latest(folder / "checkpoints")
    assert last is not None
    assert last.step == 5
    if ranks == 1:
        weights = run(folder, resume=True).state_dict()
    else:
        run_ranks(ranks, folder, resume=True)
        weights = torch.load(folder / "rank3.pt", weights_only=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
    assert_equal_records(tmp_path / "whole", folder)


def assert_equal_records(whole: Path, many: Path) -> None:
    one, two = (
        [without_timings(line) for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, many)
    )
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for left, right in zip(one, two, strict=True):
        assert left.get("loss", 0) == pytest.approx(right.get("loss", 0), abs=1e-6)
        assert left.get("losses", {}) == pytest.approx(right.get("losses", {}), abs=1e-5)
        assert left.get("tokens") == right.get("tokens")


ROWS_READ = [[2, 0, 2], [5], None]
"""By each rank; the last one has no gradient at all, which must not leave the others waiting."""


def reader(rank: int, port: int) -> None:
    with joined(rank, len(ROWS_READ), port):
        table = torch.nn.Embedding(6, 2, sparse=True)
        other, unread = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
        if (ids := ROWS_READ[rank]) is not None:
            (table(torch.tensor(ids)).sum() + other.sum()).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            distributed.sum_gradients([table.weight, other, unread])
        assert unread.grad is None  # as with one rank: the optimiser skips it
        gradient = table.weight.grad
        assert gradient is not None
        assert gradient.is_sparse
        assert gradient.indices().tolist() == [[0, 2, 5]]
        assert gradient.values().tolist() == [[1, 1], [2, 2], [1, 1]]
        assert other.grad is not None
        assert other.grad.tolist() == [2, 2, 2]


def test_rows_of_sparse_gradients_are_summed():
    ranks = len(ROWS_READ)
    multiprocessing.start_processes(reader, args=(free_port(),), nprocs=ranks, start_method="fork")


class Faulty:
    """Batches during which a rank is killed or hangs, at a given step."""

    def __init__(self, batches: ToyBatches, step: int, fault: Callable[[], object]) -> None:
        self.batches, self.step, self.fault = batches, step, fault

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        for number, batches in enumerate(self.batches.iterate(step), step):
            if number == self.step:
                self.fault()
            yield batches


def faulty(rank: int, ranks: int, port: int, folder: str, victim: int, step: int, kill: bool):
    def fault() -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL) if kill else time.sleep(60)

    with joined(rank, ranks, port):
        config = toy_config(**CHANGES, watchdog_seconds=None if kill else 1.0)
        model = Toy(dropout=0.0)
        batches = Faulty(ToyBatches(config, rank, ranks), step, fault)
        export = model.save_pretrained
        train(model, batches, toy_score, config, Path(folder), resume=True, export=export)


def start_faulty(ranks: int, *what: Any) -> None:
    arguments = (ranks, free_port(), *what)
    multiprocessing.start_processes(faulty, args=arguments, nprocs=ranks, start_method="fork")


def test_a_run_survives_kills_of_its_ranks_and_other_numbers_of_them(tmp_path: Path):
    whole, folder = run(tmp_path / "whole"), tmp_path / "killed"
    for ranks, victim, step in ((4, 2, 3), (2, 1, 3), (2, 0, 6), (4, 0, 8)):
        with pytest.raises(ProcessExitedException):
            start_faulty(ranks, str(folder), victim, step, True)
    weights = run(folder, resume=True).state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
    assert_equal_records(tmp_path / "whole", folder)


def test_the_watchdog_names_the_rank_that_is_slow(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(ProcessExitedException):
        start_faulty(2, str(tmp_path), 1, 4, False)
    slow = re.findall(r"rank (\d) of 2: step 4, waiting for data", capfd.readouterr().err)
    assert slow == ["1"]


def test_without_a_process_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.gather_objects(5) == [5]
    assert distributed.any_rank(True)
    assert distributed.all_reduce_sum(torch.ones(2)).tolist() == [1.0, 1.0]
    distributed.barrier()
    with distributed.process_group():
        assert not distributed.is_initialised()


def test_buckets_hold_every_parameter_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 64)
    tensors = [torch.zeros(n) for n in (3, 20, 1, 1, 40)] + [torch.zeros(2, dtype=torch.bfloat16)]
    buckets = list(distributed._buckets(tensors))
    assert [id(t) for bucket in buckets for t in bucket] == [id(t) for t in tensors]
    assert [len(bucket) for bucket in buckets] == [2, 3, 1]
    assert all(len({t.dtype for t in bucket}) == 1 for bucket in buckets)
