"""BLIP-2's first stage: what each loss may see, hard negatives, and both stages end to end."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instructblip import stages
from instructblip.data.scenes.official import write_scenes
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.stage1 import LABEL_SMOOTHING, Stage1, contrast
from instructblip.recipe import load_recipe
from tests.parity.tiny import tiny_batch, tiny_config
from tests.serving.test_engine import write_model


@pytest.fixture
def stage() -> Stage1:
    torch.manual_seed(0)
    config = InstructBlipConfig.from_transformers(
        {"model_type": "instructblip", **tiny_config(dropout=0.0)}
    )
    return Stage1(InstructBlip(config), embedding=8)


def test_captions_of_one_picture_are_no_negatives() -> None:
    scores = torch.tensor([[1.0, 9.0, -5.0], [9.0, 1.0, -5.0], [-5.0, -5.0, 5.0]])
    shared = contrast(scores, torch.tensor([0, 0, 1]))
    apart = contrast(scores, torch.tensor([0, 1, 2]))
    assert shared < apart
    # where all are one picture, every text is as good: the entropy of the uniform target
    assert contrast(torch.zeros(3, 3), torch.tensor([0, 0, 0])) == pytest.approx(1.0986, abs=1e-3)
    assert LABEL_SMOOTHING == 0.1


def test_the_three_losses_reach_what_they_should(stage: Stage1) -> None:
    batch = tiny_batch(stage.model.config)
    output = stage.loss(batch)
    (output.loss_sum / output.num_tokens).backward()
    heads = (stage.image_head, stage.text_head, stage.match_head, stage.word_head)
    for part in (*heads, stage.model.vision_model.post_layernorm):
        assert part.weight.grad is not None
        assert part.weight.grad.abs().sum() > 0
    assert stage.model.query_tokens.grad is not None
    last = stage.model.qformer.encoder.layer[-1].output.dense.weight
    assert last.grad is not None
    assert all(p.grad is None for p in stage.model.language_model.parameters())
    assert all(p.grad is None for p in stage.model.vision_model.encoder.parameters())


def test_a_caption_cannot_look_ahead_and_contrast_cannot_peek(stage: Stage1) -> None:
    batch = tiny_batch(stage.model.config)
    features = stage.model.encode_image(batch.pixel_values)  # type: ignore[arg-type]
    changed = batch.qformer_ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 40
    other = replace(batch, qformer_ids=changed)
    queries = stage.model.query_tokens.expand(3, -1, -1)

    def told(b):
        index = b.image_index[:, 0]
        run = stage.model.qformer.hidden_states
        return run(queries, features, b.qformer_ids, b.qformer_mask, index, causal_text=True)[1]

    assert torch.equal(told(batch)[0, :5], told(other)[0, :5])
    assert not torch.equal(told(batch)[0, 5:], told(other)[0, 5:])
    before, after = stage.similarity(features, batch), stage.similarity(features, other)
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_negatives_are_of_another_picture_and_hard(
    stage: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tiny_batch(stage.model.config)  # pictures 0, 1, 0
    features = stage.model.encode_image(batch.pixel_values)  # type: ignore[arg-type]
    drawn: list[torch.Tensor] = []
    draw = torch.multinomial

    def watch(weights: torch.Tensor, number: int) -> torch.Tensor:
        drawn.append(weights)
        return draw(weights, number)

    monkeypatch.setattr(torch, "multinomial", watch)
    similarity = torch.tensor([[9.0, 1.0, 9.0], [2.0, 9.0, 5.0], [9.0, 3.0, 9.0]])
    stage.match(features, batch, similarity)
    texts, _pictures = drawn
    assert texts[0].tolist() == [0, 1, 0]
    assert texts[1, 1] == 0
    assert texts[1, 2] > texts[1, 0]
    alone = replace(batch, image_index=torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="two pictures in every batch"):
        stage.match(features, alone, similarity)


def test_both_stages_from_a_recipe(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_scenes(tmp_path / "scenes", seed=0, scale=0.02)
    start = write_model(tmp_path / "start", "blip2")
    short = [f"data.root={tmp_path / 'scenes'}", "training.steps=2", "training.batch_size=6"]
    short += ["training.warmup_steps=1", "training.save_every=2", "data.max_instruction=40"]
    first = load_recipe(
        "pretrain_scenes", [*short, f"model.start={start}", "model.text_branch=random"]
    )
    stages.pretrain(first, 1, tmp_path / "one")
    second = load_recipe("pretrain_scenes", [*short, f"model.start={tmp_path / 'one'}"])
    stages.pretrain(second, 2, tmp_path / "two")
    one, two = (load_file(tmp_path / n / "last" / "model.safetensors") for n in ("one", "two"))
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert "language_projection.weight" in moved
    assert not [n for n in moved if n.startswith(("language_model.", "vision_model.encoder"))]
    words = "qformer.embeddings.word_embeddings.weight"
    assert words not in moved, "the Q-Former reads no text in stage 2"
