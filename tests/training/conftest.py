"""Keep the many small files of these tests in memory, and draw curves only where they matter."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    base = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="instructblip-", dir=base) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "leaves_what" not in request.node.name:
        monkeypatch.setattr("instructblip.training.log.draw_curves", lambda lines, path: None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums depend on the number of threads, and a forked child cannot use its parent's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
