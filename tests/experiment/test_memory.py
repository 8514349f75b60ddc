"""Predicted memory compared with a real step, and the advice that follows from it."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peak import tensor_peak
from instructblip.cli import main as cli
from instructblip.experiment import model as model_module
from instructblip.experiment.datasets import prepare_training
from instructblip.experiment.memory import (
    AnswerMemory,
    Memory,
    advise,
    encoder_bytes,
    fit_micro_batches,
    predict_answer,
    predict_memory,
    saved_bytes,
)
from instructblip.experiment.model import load_model, shape_language
from instructblip.model.config import VisionConfig
from instructblip.model.decoding import GREEDY
from instructblip.model.inference import generate_responses
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.quantize import QuantizedLinear
from instructblip.model.placement import Placement
from instructblip.model.spread import place
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from instructblip.training.optim import make_optimizer
from tests.model.test_activations import full_batch
from tests.model.test_language import tiny_model
from tests.model.test_lora import adapted
from tests.testing import write_model, write_picture


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "instructblip")


def recipe_of(start: Path, *more: str) -> Recipe:
    lengths = ["data.max_instruction=10", "data.max_prompt=12", "data.max_response=8"]
    fixed = ["training.precision=fp32", "training.device=cpu", "training.batch_size=6"]
    return load_recipe("quickstart", [f"model.start={start}", *lengths, *fixed, *more])


def test_prediction_is_what_a_real_step_saves(start: Path):
    predicted = predict_memory(recipe_of(start))
    model = InstructBlip.from_pretrained(start).train()
    trainable = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert predicted.trained == predicted.gradients == predicted.optimizer // 2 == trainable
    assert predicted.frozen == sum(p.numel() * 4 for p in model.parameters()) - trainable
    batch = full_batch(model, 6, (10, 12, 8))
    measured = saved_bytes(lambda: model.loss(batch).loss_sum, model)
    assert predicted.activations == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("training.trainable=[qformer, vision_tower]",),
        ("training.accumulate=3",),
        ("training.checkpoint_activations=true",),
        ("model.quantize=nf4",),
    ],
)
def test_prediction_is_the_peak_of_a_real_step(start: Path, more: tuple[str, ...]):
    recipe = recipe_of(start, "training.batch_size=24", *more)
    predicted = predict_memory(recipe)
    model = InstructBlip.from_pretrained(start)
    shape_language(model, recipe)
    model.train()
    accumulate = recipe.training.accumulate
    batch = full_batch(model, 24 // accumulate, (10, 12, 8))
    optimizer = make_optimizer(model, recipe.training)

    def step() -> None:
        for _ in range(accumulate):
            model.loss(batch).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments
    moving = predicted.peak - predicted.frozen - predicted.trained - predicted.optimizer
    assert moving == pytest.approx(tensor_peak(step), rel=0.1)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu"])
def test_image_encoder_alone(activation: str):
    vision = VisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        hidden_act=activation,
    )
    config = tiny_model("llama").config.model_copy(update={"vision": vision})
    model = InstructBlip(config)
    images = torch.randn(16, 3, 56, 56)
    peak = tensor_peak(lambda: model.encode_image(images))
    assert encoder_bytes(model, 16) == pytest.approx(peak, rel=0.02)


def test_checkpoints_and_micro_batches_need_less(start: Path):
    whole = predict_memory(recipe_of(start))
    less = predict_memory(recipe_of(start, "training.checkpoint_activations=true"))
    assert less.activations < whole.activations
    assert less.frozen == whole.frozen
    for parts in ("training.accumulate=3", None):
        part = predict_memory(recipe_of(start, *([parts] if parts else [])), 1 if parts else 3)
        assert part.activations == pytest.approx(whole.activations / 3, rel=0.1)


def test_frames_of_videos_count(start: Path):
    more = ["data.sets={msvdqa: {}}", "data.num_frames=3"]
    predicted = predict_memory(recipe_of(start, *more))
    model = InstructBlip.from_pretrained(start).train()
    stills = full_batch(model, 18, (10, 12, 8))
    assert stills.image_features is not None
    texts = full_batch(model, 6, (10, 12, 8))
    batch = replace(
        texts, image_features=stills.image_features, image_index=torch.arange(18).view(6, 3)
    )
    measured = saved_bytes(lambda: model.loss(batch).loss_sum, model)
    assert predicted.activations == pytest.approx(measured, rel=0.1)


def test_images_of_prepared_custom_data_count(start: Path, tmp_path: Path):
    names = [f"{i}.png" for i in range(3)]
    for name in names:
        write_picture(tmp_path / "custom" / name)
    row = {"image": names, "question": "Which?", "answer": "red"}
    (tmp_path / "custom" / "rows.jsonl").write_text(json.dumps(row))
    custom = recipe_of(start, f"data.root={tmp_path}", "data.sets={custom: {format: table}}")
    assert predict_memory(custom) == predict_memory(recipe_of(start))
    prepare_training(custom)
    more = ["data.sets={msvdqa: {}}", "data.num_frames=3"]
    assert predict_memory(custom) == predict_memory(recipe_of(start, *more))


def test_training_continues_the_adapter_of_the_start_and_warns_of_other_settings(start: Path):
    model = adapted(InstructBlip.from_pretrained(start), rank=3)
    recipe = recipe_of(start, "model.lora={rank: 3}", "training.trainable=[qformer, lora]")
    with pytest.warns(UserWarning, match=r"an adapter, which training continues: rank 3, not as"):
        shape_language(model, recipe_of(start, "model.lora={rank: 5}", "training.trainable=[lora]"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shape_language(model, recipe)


def test_advice(start: Path):
    gib = 2**30
    needs = Memory(
        frozen=10 * gib,
        trained=gib,
        optimizer=2 * gib,
        gradients=gib,
        activations=20 * gib,
        passing=0,
        encoder=2 * gib,
    )
    # each in its turn: the encoder's pass, activations, and gradients as these go
    assert needs.peak == 33 * gib
    assert replace(needs, encoder=22 * gib).peak == 35 * gib
    assert replace(needs, gradients=21 * gib).peak == 34 * gib
    assert replace(needs, accumulates=True).peak == 34 * gib
    recipe = recipe_of(start)
    assert advise(needs, 40 * gib, recipe) == "fits: 33.0 of 40.0 GiB"
    advice = advise(needs, 24 * gib, recipe)
    assert "does not fit: 33.0 GiB of 24.0" in advice
    assert "checkpoint_activations=true" in advice
    assert "training.accumulate=2" in advice
    advice = advise(needs, 12 * gib, recipe)
    assert "accumulate" not in advice
    assert "model.quantize=nf4" in advice


def test_auto_micro_batches_fill_the_memory(start: Path):
    auto = recipe_of(start, "training.tokens_per_micro_batch=auto", "training.batch_size=12")
    row = InstructBlip.from_pretrained(start).config.num_query_tokens + 12 + 8

    def of_rows(rows: int) -> Recipe:
        return auto.model_copy(
            update={
                "training": auto.training.model_copy(update={"tokens_per_micro_batch": rows * row})
            }
        )

    assert fit_micro_batches(auto) == of_rows(12)  # on a CPU
    assert fit_micro_batches(auto, world_size=5) == of_rows(3)
    assert fit_micro_batches(of_rows(2), available=1) == of_rows(2)
    peaks = {rows: predict_memory(of_rows(rows)).peak for rows in (1, 5, 6, 12)}
    assert fit_micro_batches(auto, available=peaks[12]) == of_rows(12)
    assert fit_micro_batches(auto, available=peaks[6] - 1) == of_rows(5)
    with pytest.raises(ValueError, match=r"does not fit: .* set training\.checkpoint_activations"):
        fit_micro_batches(auto, available=peaks[1] - 1)


def test_short_rows_are_predicted_too(start: Path):
    """A budget holds a few of the longest rows, or all samples in short ones with their images."""
    few = predict_memory(recipe_of(start, "training.batch_size=2"))
    tokens = "training.tokens_per_micro_batch=80"  # of two of the longest rows
    many = predict_memory(recipe_of(start, "training.batch_size=12", tokens))
    assert many.encoder > few.encoder
    assert many.activations > few.activations


def test_a_gpu_gets_each_weight_in_its_type(start: Path, monkeypatch: pytest.MonkeyPatch):
    half = torch.bfloat16
    monkeypatch.setattr(model_module, "training_dtypes", lambda training: (half, half))
    model, stored = load_model(recipe_of(start)), InstructBlip.from_pretrained(start)
    for (name, got), expected in zip(model.named_parameters(), stored.parameters(), strict=True):
        frozen = name.startswith(("language_model", "vision_model.e"))
        assert got.dtype == (half if frozen else torch.float32), name
        assert torch.equal(got, expected.to(got.dtype)), name


def test_fewer_bits_and_adapters(start: Path):
    plain = predict_memory(recipe_of(start))
    codes = predict_memory(recipe_of(start, "model.quantize=int8"))
    assert codes.frozen < plain.frozen
    halves = predict_memory(recipe_of(start, "training.parallel=fsdp2"), 2)
    assert halves.frozen < plain.frozen
    for more in ("model.quantize=nf4", "training.trainable=[language_model]"):
        with pytest.raises(ValueError, match="shards frozen weights of full precision"):
            predict_memory(recipe_of(start, "training.parallel=fsdp2", more), 2)
    with pytest.raises(ValueError, match="image_size must hold one patch"):
        predict_memory(recipe_of(start, "model.image_size=1"))
    adapter = ("model.lora={rank: 2}", "training.trainable=[qformer, lora]")
    adapted = predict_memory(recipe_of(start, *adapter))
    assert adapted.trained > plain.trained
    assert adapted.frozen == plain.frozen
    with pytest.raises(ValueError, match="add lora to it"):
        predict_memory(recipe_of(start, "model.lora={rank: 2}"))


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_prediction_is_what_an_answer_needs(start: Path, kind: Any):
    recipe = recipe_of(start, *([f"evaluation.quantize={kind}"] if kind else []))
    predicted = predict_answer(recipe, str(start), samples=6)
    model = InstructBlip.from_pretrained(start, as_stored=True)
    place(model, Placement(devices="cpu", quantize=kind))
    codes = [b for m in model.modules() if isinstance(m, QuantizedLinear) for b in m.buffers()]
    held = sum(t.nbytes for t in (*model.parameters(), *codes))
    tables = sum(m.pairs.nbytes for m in model.modules() if getattr(m, "pairs", None) is not None)
    assert predicted.fixed + sum(predicted.layers) == held - tables
    batch = full_batch(model, 6, (10, 12, 1))
    first = GREEDY.override(max_new_tokens=1)
    peak = tensor_peak(lambda: generate_responses(model, batch, decoding=first))
    assert predicted.passing == pytest.approx(peak, rel=0.25)


def test_advice_for_answers(start: Path, capsys: pytest.CaptureFixture[str]):
    needed = AnswerMemory(fixed=2 << 30, layers=[1 << 30] * 4, cache=1 << 29, passing=1 << 30)
    assert needed.peak == 9 << 30
    assert needed.advise(10 << 30, 1, None) == "fits: 9.0 of 10.0 GiB"
    assert needed.advise(6 << 30, 2, None) == "fits: 4.5, 4.5 of 6.0 GiB"
    message = "does not fit: 9.0 GiB of 1 x 6.0; set evaluation.quantize=nf4 or more devices, "
    assert needed.advise(6 << 30, 1, None) == (
        message + "or 2 of 4 layers are read from disk at each use"
    )
    with pytest.raises(SystemExit):
        cli.main(["memory", str(start), "--answer", "--gigabytes", "1", "training.device=cpu"])
    out = capsys.readouterr().out
    assert "layers " in out
    assert "fits: 0.0 of 1.0 GiB" in out
