"""Muon: orthogonal updates for matrices, AdamW for everything else."""

import torch
from torch import nn

from instructblip.training.muon import Muon, orthogonalise


def test_updates_are_near_orthogonal():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_matrices_move_alike_in_every_direction_and_the_rest_as_in_adamw():
    torch.manual_seed(0)
    names = ("hidden.weight", "hidden.bias", "word_embeddings.weight")
    shapes = ((12, 12), (12,), (12, 4))
    parameters = {n: nn.Parameter(torch.randn(s)) for n, s in zip(names, shapes, strict=True)}
    twins = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
    before = parameters["hidden.weight"].detach().clone()
    ours = Muon(parameters, lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(
        [
            {"params": [twins["word_embeddings.weight"]], "weight_decay": 0.1},
            {"params": [twins["hidden.bias"]], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    for _ in range(3):
        for name, p in parameters.items():
            p.grad = torch.randn_like(p)
            twins[name].grad = p.grad.clone()
        ours.step()
        theirs.step()
    for name in names[1:]:
        torch.testing.assert_close(parameters[name], twins[name])
    moved = torch.linalg.svdvals(parameters["hidden.weight"].detach() - before)
    assert moved.max() / moved.median() < 4
    root_mean_square = (parameters["hidden.weight"] - before).square().mean().sqrt()
    assert 0.1 < root_mean_square / (3 * 0.01 * 0.2) < 2
