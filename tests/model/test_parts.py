"""Any image encoder with any language model: features of transformers, and one model of both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from instructblip.cli import main as cli
from instructblip.data.images import ImageTransform
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.combine import combine, read_vision
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.vision import VisionModel
from tests.parity.tiny import LANGUAGES, tiny_batch, tiny_transformers
from tests.testing import byte_level, wordpiece, write_picture

ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QFORMER = {
    "vocab_size": 40,
    "hidden_size": 20,
    "intermediate_size": 26,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
SMALL = {k: v for k, v in LANGUAGES["llama"].items() if k != "model_type"}
LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": LANGUAGES["llama"],
    "qwen2": {**SMALL, "model_type": "qwen2"},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 6},
    "gemma": {**SMALL, "model_type": "gemma", "head_dim": 6},
    "opt": LANGUAGES["opt"],
    "t5": LANGUAGES["t5"],
}


def write_encoder(folder: Path, family: str) -> Any:
    torch.manual_seed(0)
    if family == "clip":
        model: Any = CLIPVisionModel(CLIPVisionConfig(**ENCODER))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**ENCODER))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def write_language(folder: Path, name: str) -> Path:
    values = dict(LANGUAGE[name])
    config = AutoConfig.for_model(values.pop("model_type"), vocab_size=60, **values)
    torch.manual_seed(1)
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_features_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    theirs = write_encoder(tmp_path, family)
    config, weights = read_vision(tmp_path)
    ours = VisionModel(config).eval()
    ours.load_state_dict(weights)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state  # SigLIP's is behind the last norm, CLIP's not
        given = ours.body(pixels) if family == "clip" else ours(pixels)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert given.shape[1] == config.num_tokens == (5 if family == "clip" else 4)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("name", list(LANGUAGE))
def test_every_pair_learns_answers_and_is_saved(tmp_path: Path, family: str, name: str) -> None:
    write_encoder(tmp_path / "encoder", family)
    language = write_language(tmp_path / "language", name)
    model = combine(tmp_path / "encoder", language, QFORMER, num_query_tokens=3)
    batch = tiny_batch(model.config)
    loss = model.train().loss(batch)
    (loss.loss_sum / loss.num_tokens).backward()
    assert model.query_tokens.grad is not None
    assert model.query_tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.vision_model.encoder.parameters())
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    again = InstructBlip.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.loss(batch).loss_sum, model.loss(batch).loss_sum)
    kind = json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"]
    assert kind == "instructblip-other-tower", "transformers would load it wrong"


def test_the_tower_of_a_blip2(tmp_path: Path) -> None:
    theirs = tiny_transformers()
    theirs.save_pretrained(tmp_path / "ib")
    config, weights = read_vision(tmp_path / "ib")
    assert config == InstructBlipConfig.from_transformers(theirs.config.to_dict()).vision
    ours = VisionModel(config).eval()
    ours.load_state_dict(weights)
    pixels = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(ours(pixels), theirs.vision_model(pixels).last_hidden_state)
    (tmp_path / "ib" / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match="expected CLIP, SigLIP"):
        read_vision(tmp_path / "ib")


def test_language_models_that_are_none_are_named(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", "clip")
    for kind in ("blip-2", "instructblip", "no_such_model", None):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=rf"{kind}.*; expected .* Llama, Qwen, Gemma") as error:
            combine(tmp_path / "encoder", tmp_path)
        assert str(tmp_path) in str(error.value)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("option", ["--queries", "--layers"])
def test_numbers_of_nothing_are_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    names = ("vision", "language", "qformer-tokenizer", "out")
    arguments = [word for name in names for word in (f"--{name}", "absent")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["combine", *arguments, option, "0"])
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_command_combines_parts_and_the_result_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_encoder(tmp_path / "encoder", "siglip")
    half = (0.5, 0.5, 0.5)
    ImageTransform(image_size=16, mean=half, std=half).save_pretrained(tmp_path / "encoder")
    tokenizer = byte_level()
    values = {**SMALL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("qwen2", **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    wordpiece().save_pretrained(tmp_path / "bert")
    options = [f"--{o}" for o in ("vision", "language", "qformer-tokenizer", "out")]
    paths = [str(tmp_path / name) for name in ("encoder", "language", "bert", "model")]
    arguments = [word for pair in zip(options, paths, strict=True) for word in pair]
    with pytest.raises(SystemExit) as stop:
        cli.main(["combine", *arguments, "--queries", "4", "--layers", "1", "--debug"])
    assert not stop.value.code
    assert "4 tokens" in capsys.readouterr().out
    engine = Engine.from_pretrained(tmp_path / "model", device="cpu")
    assert engine.images.transform.mean == (0.5, 0.5, 0.5)
    image = write_picture(tmp_path / "a.png")
    assert isinstance(engine.answer(image, "what?", num_beams=1, max_new_tokens=3), str)
