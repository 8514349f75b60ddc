"""BLIP-2's first stage: what each loss may read, hard negatives, and both stages end to end."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instructblip.experiment.pretrain import pretrain
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.transformers import READ_BY_RETRIEVAL, by_our_names
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.stage1 import (
    LABEL_SMOOTHING,
    RetrievalStage,
    Stage1,
    contrast,
    is_same_image,
)
from instructblip.recipe.load import load_recipe
from instructblip.scenes.official import write_scenes
from instructblip.training.log import read_metrics
from tests.parity.tiny import tiny_batch, tiny_config
from tests.testing import write_model


@pytest.fixture
def stage() -> Stage1:
    torch.manual_seed(0)
    config = InstructBlipConfig.from_transformers(
        {"model_type": "instructblip", **tiny_config(dropout=0.0)}
    )
    return Stage1(InstructBlip(config), embedding=8)


def test_captions_of_one_image_are_no_negatives() -> None:
    scores = torch.tensor([[1.0, 9.0, -5.0], [9.0, 1.0, -5.0], [-5.0, -5.0, 5.0]])
    shared = contrast(scores, is_same_image(torch.tensor([0, 0, 1])))
    apart = contrast(scores, is_same_image(torch.tensor([0, 1, 2])))
    assert shared < apart
    # where all show one image, every text is as good: the entropy of the uniform target
    assert contrast(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool)) == pytest.approx(
        1.0986, abs=1e-3
    )
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
    features = stage.model.vision_model.norm(stage.model.features_of(batch))
    changed = batch.qformer_ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 40
    other = replace(batch, qformer_ids=changed)
    queries = stage.model.query_tokens.expand(3, -1, -1)

    def text_states(b):
        index = b.image_index[:, 0]
        run = stage.model.qformer.hidden_states
        return run(queries, features, b.qformer_ids, b.qformer_mask, index, causal_text=True)[1]

    assert torch.equal(text_states(batch)[0, :5], text_states(other)[0, :5])
    assert not torch.equal(text_states(batch)[0, 5:], text_states(other)[0, 5:])
    before, after = stage.similarity(features, batch), stage.similarity(features, other)
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_negatives_are_of_another_image_and_hard(
    stage: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tiny_batch(stage.model.config)  # images 0, 1, 0
    features = stage.model.vision_model.norm(stage.model.features_of(batch))
    drawn: list[torch.Tensor] = []
    draw = torch.multinomial

    def watch(weights: torch.Tensor, number: int) -> torch.Tensor:
        drawn.append(weights)
        return draw(weights, number)

    monkeypatch.setattr(torch, "multinomial", watch)
    similarity = torch.tensor([[9.0, 1.0, 9.0], [2.0, 9.0, 5.0], [9.0, 3.0, 9.0]])
    stage.match(features, batch, similarity, is_same_image(batch.image_index[:, 0]))
    texts, _images = drawn
    assert texts[0].tolist() == [0, 1, 0]
    assert texts[1, 1] == 0
    assert texts[1, 2] > texts[1, 0]


def test_retrieval_trains_the_whole_qformer_and_takes_equal_captions_for_both_images(
    stage: Stage1, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = RetrievalStage(stage.model, embedding=8)
    batch = tiny_batch(stage.model.config)  # images 0, 1, 0
    ids, mask = batch.qformer_ids.clone(), batch.qformer_mask.clone()
    ids[1], mask[1] = ids[2], mask[2]
    given: list[list[list[bool]]] = []

    def watch(scores: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        given.append(same.tolist())
        return contrast(scores, same)

    monkeypatch.setattr("instructblip.model.stage1.contrast", watch)
    retrieval.loss(replace(batch, qformer_ids=ids, qformer_mask=mask))
    assert given == [[[True, False, True], [False, True, True], [True, True, True]]]
    output = retrieval.loss(batch)
    output.loss_sum.backward()
    moved = {name for name, p in stage.model.named_parameters() if p.grad is not None}
    read = {n for n, _ in stage.model.named_parameters() if READ_BY_RETRIEVAL.fullmatch(n)}
    assert moved == {name for name in read if not name.startswith("vision_model.")}


def test_one_image_has_no_negatives_and_trains_what_needs_none(stage: Stage1) -> None:
    batch = tiny_batch(stage.model.config)
    alone = replace(batch, image_index=torch.zeros(3, 1, dtype=torch.long))
    with pytest.warns(RuntimeWarning, match="one image.*batch_size"):
        output = stage.loss(alone)
    output.loss_sum.backward()
    assert stage.match_head.weight.grad is None
    assert stage.word_head.weight.grad is not None


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of two steps on a corner of Scenes, from a tiny BLIP-2."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stages")
    write_scenes(folder / "scenes", seed=0, scale=0.02)
    start = write_model(folder / "start", "blip2")
    short = [f"data.root={folder / 'scenes'}", "training.steps=2", "training.batch_size=6"]
    short += ["training.warmup_steps=1", "training.save_every=2", "data.max_instruction=40"]
    short += ["evaluation.validation=[scenes_vqav2]", "evaluation.benchmarks=[scenes_vqav2]"]
    return [*short, f"model.start={start}", "model.text_branch=random"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.trainable=[qformer, vision_norm]", r"training\.trainable .*vision_norm"),
        ("model.lora={rank: 2}", r"model\.lora.*leave them out"),
        ("model.qformer_lora={rank: 2}", r"model\.qformer_lora.*leave them out"),
        ("training.accumulate=6", r"micro batch holds one .*training\.batch_size"),
        ("training.tokens_per_micro_batch=99", "contrasts the images of a micro batch"),
        ("data.check=required", "instructblip check"),
    ],
)
def test_settings_that_a_stage_ignores_are_refused(
    short: list[str], setting: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain(load_recipe("pretrain_scenes", [*short, setting]), 1, tmp_path / "one")


def test_ranks_share_a_stage(short: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "instructblip", "pretrain", "pretrain_scenes"]
    command += [*short, "--stage", "1", "--out", str(tmp_path / "one")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished at step 2") == 1
    assert (tmp_path / "one" / "last" / "model.safetensors").is_file()


def test_all_stages_from_a_recipe(short: list[str], tmp_path: Path) -> None:
    first = load_recipe("pretrain_scenes", short)
    pretrain(first, 1, tmp_path / "one")
    line = read_metrics(tmp_path / "one" / "metrics.jsonl")[-1]
    assert [*line["terms"]] == ["contrast", "match", "caption"]
    assert sum(line["terms"].values()) == pytest.approx(line["loss"], rel=1e-4)
    again = [*short, f"model.start={tmp_path / 'one'}", "model.text_branch=null"]
    pretrain(load_recipe("pretrain_scenes", again), "align", tmp_path / "align")
    assert [*read_metrics(tmp_path / "align" / "metrics.jsonl")[-1]["terms"]] == [
        "spelling",
        "end",
        "contrast",
        "length",
    ]
    again[-2] = f"model.start={tmp_path / 'align'}"
    pretrain(load_recipe("pretrain_scenes", again), 2, tmp_path / "two")
    one, align, two = (
        by_our_names(load_file(tmp_path / n / "last" / "model.safetensors"))
        for n in ("one", "align", "two")
    )
    words = "qformer.embeddings.word_embeddings.weight"
    for before, after in ((one, align), (align, two)):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert "language_projection.weight" in moved
        assert not [n for n in moved if n.startswith(("language_model.", "vision_model.encoder"))]
        assert words not in moved, "the Q-Former reads no text there"


def test_stage_2_writes_a_blip2_that_is_tuned_into_an_instructblip(
    short: list[str], tmp_path: Path
) -> None:
    start = write_model(tmp_path / "start", "instructblip")
    recipe = load_recipe("pretrain_scenes", [*short, f"model.start={start}"])
    pretrain(recipe, 2, tmp_path / "two")
    engine = Engine.from_pretrained(tmp_path / "two", device="cpu")
    assert not engine.model.config.instruction_aware
    assert engine.tokens.qformer is None, "it would be given instructions"
    config = json.loads((tmp_path / "two" / "last" / "config.json").read_text())
    assert config["model_type"] == "blip-2"
    tuned = InstructBlip.from_pretrained(tmp_path / "two", instruction_aware=True).state_dict()
    words = "qformer.embeddings.word_embeddings.weight"
    assert torch.equal(tuned[words], load_file(start / "model.safetensors")[words])
