"""Muon: orthogonal updates for matrices, AdamW for everything else."""

import pytest
import torch
from torch import nn

from instructblip.training.muon import Muon, orthogonalise
from tests.model.test_language import TEXT_CONFIGS, tiny_model


def test_updates_are_near_orthogonal():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


@pytest.mark.parametrize("language", list(TEXT_CONFIGS))
def test_tables_and_output_heads_of_language_models_are_no_matrices(language: str):
    model = tiny_model(language)
    named = {n: p for n, p in model.named_parameters() if n.startswith("language_model.")}
    muon = next(g["params"] for g in Muon(named, lr=0.01).param_groups if g["muon"])
    chosen = {name for name, p in named.items() if any(p is other for other in muon)}
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    tables.append(model.language_model.get_output_embeddings().weight)
    inside = {n for n, p in named.items() if p.ndim == 2 and not any(p is t for t in tables)}
    assert chosen == inside


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
