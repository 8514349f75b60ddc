"""Rows that were read move as torch's AdamW moves them; others stay."""

import copy

import pytest
import torch
from torch import Tensor, nn

from instructblip.training import adamw
from instructblip.training.adamw import AdamW, large_tables
from instructblip.training.config import TrainingConfig
from instructblip.training.optim import make_optimizer
from tests.gpu import Gpu, Pretender, install

ROWS, WIDTH = 40, 3
READ = [[1, 4, 4, 30], [4, 7], [1, 1, 39], [0, 12], [4, 2]]
"""Rows that each step reads; 1 and 4 again later, 30 once, most never."""
EVER = sorted({row for step in READ for row in step})


def table() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH)


def move(embedding: nn.Embedding, optimizer: torch.optim.Optimizer, steps: list[list[int]]) -> None:
    for step, ids in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        embedding(torch.tensor(ids)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def moved(optimizer: type[torch.optim.Optimizer], decay: float, sparse: bool) -> Tensor:
    embedding = table()
    embedding.sparse = sparse
    other = nn.Parameter(torch.ones(2))
    made = optimizer([embedding.weight, other], weight_decay=decay, fused=True)  # type: ignore[call-arg]
    move(embedding, made, READ)
    return embedding.weight.detach()


@pytest.mark.parametrize("together", [1024, 2])
def test_as_torch_without_decay(monkeypatch: pytest.MonkeyPatch, together: int):
    monkeypatch.setattr(adamw, "TOGETHER", together)
    assert torch.equal(moved(AdamW, 0.0, True), moved(torch.optim.AdamW, 0.0, False))


def test_decay_is_for_rows_that_were_read():
    ours, theirs = moved(AdamW, 0.3, True), moved(torch.optim.AdamW, 0.3, False)
    always = sorted(set(READ[0]))  # torch's has shrunk the others before they were read
    assert torch.equal(ours[always], theirs[always])
    never = sorted(set(range(ROWS)) - set(EVER))
    assert torch.equal(ours[never], table().weight[never])
    assert not torch.equal(theirs[never], table().weight[never])


def test_dense_gradients_move_as_before():
    assert torch.equal(moved(AdamW, 0.3, False), moved(torch.optim.AdamW, 0.3, False))


def test_a_gpu_updates_all_rows_and_moves_those_that_were_read():
    """A GPU is not asked which rows there are; the table becomes that of sparse gradients."""
    embedding = table()
    move(
        embedding, AdamW([embedding.weight], [embedding.weight], weight_decay=0.3, fused=True), READ
    )
    sparse = moved(AdamW, 0.3, True)
    torch.testing.assert_close(embedding.weight.detach(), sparse, rtol=1e-6, atol=1e-7)
    never = sorted(set(range(ROWS)) - set(EVER))
    assert torch.equal(embedding.weight[never], table().weight[never])


def test_skipped_steps_change_nothing():
    """From a bad step on, and neither weights nor moments."""
    embedding, other = table(), nn.Parameter(torch.ones(2))
    optimizer = AdamW([embedding.weight, other], [embedding.weight], weight_decay=0.3, fused=True)
    move(embedding, optimizer, READ[:1])
    optimizer.skip(torch.tensor(0.0))
    move(embedding, optimizer, READ[1:2])
    before = copy.deepcopy((embedding.weight, optimizer.state[embedding.weight]))
    for count in (2.0, 0.0):  # ranks with a value that is not finite
        optimizer.skip(torch.tensor(count))
        embedding.weight.grad = torch.full_like(embedding.weight, torch.nan)
        other.grad = torch.ones_like(other)
        optimizer.step()
    assert torch.equal(embedding.weight, before[0])
    assert torch.equal(other, torch.ones(2))
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[embedding.weight][name], before[1][name])


@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW])
def test_resumes_from_a_saved_state(first: type[torch.optim.AdamW]):
    """One of this AdamW, or one that torch's AdamW saved before gradients were sparse."""
    embedding = table()
    embedding.sparse = first is AdamW
    begun = first([embedding.weight], weight_decay=0.3, fused=True)
    move(embedding, begun, READ[:3])
    copied = copy.deepcopy(embedding)
    copied.sparse = embedding.sparse = True
    resumed = AdamW([copied.weight], weight_decay=0.3, fused=True)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    move(copied, resumed, READ[3:])
    if first is AdamW:
        move(embedding, begun, READ[3:])
        assert torch.equal(copied.weight, embedding.weight)
    read = resumed.state[copied.weight]["read"].nonzero()[:, 0].tolist()
    assert read == EVER


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2**17, 8)
        self.head = nn.Linear(8, 2**17)
        self.head.weight = self.embedding.weight


def test_which_tables_are_large():
    large, small = nn.Embedding(2**17, 8), nn.Embedding(2**17, 7)
    frozen = nn.Embedding(2**17, 8).requires_grad_(False)
    model = nn.ModuleList([large, small, frozen, Tied(), nn.Linear(2**17, 8)])
    assert list(large_tables(model)) == [large]


@pytest.mark.parametrize(("optimizer", "sparse"), [("adamw", True), ("muon", False)])
def test_their_gradients_are_sparse_on_a_cpu(optimizer: str, sparse: bool):
    model = nn.ModuleList([nn.Embedding(2**17, 8), nn.Linear(8, 8)])
    made = make_optimizer(model, TrainingConfig.model_validate({"optimizer": optimizer}))
    model[1](model[0](torch.tensor([5, 7]))).sum().backward()
    gradient = model[0].weight.grad
    assert isinstance(gradient, Tensor)
    assert gradient.is_sparse == sparse
    before = model[0].weight.detach().clone()
    made.step()
    changed = (before != model[0].weight).any(1).nonzero()[:, 0].tolist()
    assert changed == [5, 7] if sparse else len(changed) > 2


def test_no_gradient_is_sparse_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch)
    with Gpu():
        model = nn.Embedding(2**17, 8).to("cuda")
        made = make_optimizer(model, TrainingConfig())
        model(Pretender(torch.tensor([5, 7]))).sum().backward()
        made.step()
    assert not model.sparse
    assert not Gpu.waits
    changed = (made.state[model.weight]["exp_avg"].cpu() != 0).any(1).nonzero()[:, 0].tolist()
    assert changed == [5, 7]
