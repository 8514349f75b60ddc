"""Aligning queries with word embeddings: what is contrasted, what trains, and that it works."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from instructblip.core.batch import Batch
from instructblip.model.align import Align, contrast, is_same_text
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import ALIASES
from tests.parity.tiny import tiny_batch, tiny_config


@pytest.fixture
def stage() -> Align:
    torch.manual_seed(0)
    config = {"model_type": "instructblip", **tiny_config(dropout=0.0)}
    model = InstructBlip(InstructBlipConfig.from_transformers(config))
    parts = tuple(part for part in ALIASES["qformer"] if part != "qformer_text_embeddings")
    return Align(model.set_trainable(parts))


def texts(batch: Batch, rows: list[list[int]]) -> Batch:
    """The batch with other responses, 0 where there is padding."""
    ids = torch.tensor(rows)
    return replace(batch, response_ids=ids, response_mask=(ids > 0).long())


def test_no_layer_of_the_language_model_runs(stage: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(stage.model.language_model), "forward", pytest.fail)
    stage.loss(tiny_batch(stage.model.config)).loss_sum.backward()
    gradients: dict[str, Any] = {n: p.grad for n, p in stage.model.named_parameters()}
    moved = {name for name, grad in gradients.items() if grad is not None and grad.abs().sum() > 0}
    assert {"query_tokens", "language_projection.weight"} <= moved
    assert "qformer.encoder.layer.0.crossattention.attention.key.weight" in moved
    assert "vision_model.post_layernorm.weight" in moved
    assert not [n for n in moved if n.startswith(("language_model.", "vision_model.encoder."))]
    assert not [n for n in moved if "word_embeddings" in n]


def test_instructions_train_the_text_branch(stage: Align) -> None:
    """Without them its parameters get no gradient."""
    name = "qformer.encoder.layer.0.intermediate.dense.weight"  # of text alone
    parameter = dict(stage.model.named_parameters())[name]
    batch = tiny_batch(stage.model.config)
    none = batch.qformer_ids[:, :0]
    stage.loss(replace(batch, qformer_ids=none, qformer_mask=none)).loss_sum.backward()
    assert parameter.grad is None
    stage.loss(batch).loss_sum.backward()
    assert parameter.grad is not None
    assert parameter.grad.abs().sum() > 0


def test_query_i_stands_for_token_i_and_the_rest_for_the_end(stage: Align) -> None:
    batch = texts(tiny_batch(stage.model.config), [[5, 6, 2, 0], [6, 5, 9, 2], [7, 2, 0, 0]])
    words, targets = stage.spelling(batch, 3, 2)
    assert words[targets].tolist() == [[5, 6, 2], [6, 5, 9], [7, 2, 2]], "a long text is cut"
    words, targets = stage.spelling(batch, 5, 2)
    assert words[targets].tolist() == [[5, 6, 2, 2, 2], [6, 5, 9, 2, 2], [7, 2, 2, 2, 2]]


def test_same_images_and_same_texts_are_no_negatives(
    stage: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = texts(tiny_batch(stage.model.config), [[5, 2, 0], [5, 6, 2], [5, 2, 0]])
    assert is_same_text(batch).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]
    scores = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 0.0], [9.0, 0.0, 1.0]])
    right = F.cross_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    both = F.cross_entropy(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]))
    torch.testing.assert_close(contrast(scores, is_same_text(batch)), (2 * right + both) / 3)
    seen: list[torch.Tensor] = []

    def watch(scores: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        seen.append(same)
        return scores.sum()

    monkeypatch.setattr("instructblip.model.align.contrast", watch)
    stage.loss(replace(batch, response_ids=torch.tensor([[5, 2, 0], [5, 6, 2], [7, 2, 0]])))
    assert seen[0].tolist() == is_same_text(batch).tolist(), "tiny_batch shows images 0, 1, 0"


def test_queries_become_the_words_of_their_text_in_order(stage: Align) -> None:
    """A few steps, after which the nearest words of the queries are the text."""
    batch = texts(tiny_batch(stage.model.config), [[5, 2, 0], [6, 7, 2], [5, 2, 0]])
    none = batch.qformer_ids[:, :0]
    batch = replace(batch, qformer_ids=none, qformer_mask=none)
    trained = [p for p in stage.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(150):
        output = stage.loss(batch)
        optimizer.zero_grad()
        (output.loss_sum / output.num_tokens).backward()
        optimizer.step()
    assert output.terms["spelling"] < 0.1
    assert output.terms["contrast"] < 0.1
    queries = stage.model.encode_queries(batch)
    words = F.normalize(words_of(stage)[:8] - stage.mean, dim=-1)  # of the tokens in use
    near = (F.normalize(queries - stage.mean, dim=-1) @ words.t()).argmax(2)  # [B, Q]
    ends = [2] * (near.shape[1] - 2)
    assert near.tolist() == [[5, 2, *ends], [6, 7, *ends], [5, 2, *ends]]
    lengths = (queries - stage.mean).norm(dim=-1) / stage.length
    assert 0.5 < lengths.mean() < 2


def words_of(stage: Align) -> torch.Tensor:
    """The table of words of the language model."""
    return stage.model.language_model.get_input_embeddings().weight
