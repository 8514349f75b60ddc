"""Image encoders of other libraries: features, training, storage, memory and the attention map."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from benchmarks.peak import tensor_peak
from instructblip.cli import main as cli
from instructblip.data.features import FeatureStore
from instructblip.data.images import ImageTransform
from instructblip.data.reading.images import load_image
from instructblip.experiment.memory import encoder_bytes, predict_memory
from instructblip.inference import engine as engine_module
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.combine import combine, read_vision
from instructblip.model.checkpoints.inspection import inspect_checkpoint
from instructblip.model.checkpoints.lavis import export_lavis
from instructblip.model.config import EncoderConfig, InstructBlipConfig, VisionConfig
from instructblip.model.encoders import FAMILIES, build_vision, encoder_tokens
from instructblip.model.instructblip import InstructBlip
from instructblip.model.vision import interpolate_positions
from instructblip.recipe.load import load_recipe
from tests.model.test_parts import ENCODER, QFORMER, SMALL, write_language
from tests.parity.tiny import tiny_batch
from tests.testing import byte_level, wordpiece, write_picture

MAPS = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": 64}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": ENCODER,
    "dinov2": ENCODER,
    "dinov2_with_registers": {**ENCODER, "num_register_tokens": 3},
    "dinov3_vit": {**ENCODER, "num_register_tokens": 4},
    "dinov3_convnext": MAPS,
    "convnext": MAPS,
    "convnextv2": MAPS,
}


def write_encoder(folder: Path, kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**ENCODERS[kind], **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@dataclass
class Made:
    """A model with an encoder of transformers, and the directory ``folder / "saved"`` of it."""

    kind: str
    folder: Path
    theirs: Any
    model: InstructBlip


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_encoder(folder / "encoder", request.param)
    language = write_language(folder / "language", "llama")
    model = combine(folder / "encoder", language, QFORMER, num_query_tokens=3)
    model.save_pretrained(folder / "saved")
    return Made(request.param, folder, theirs, model)


@torch.no_grad()
def test_features_are_those_of_transformers(made: Made) -> None:
    kind, ours = made.kind, made.model.vision_model
    config, side = ours.config, ours.config.image_size
    pixels = torch.randn(2, 3, side, side)
    expected = made.theirs(pixels).last_hidden_state
    if kind.startswith("convnext"):  # a map, without the norm of its mean
        given, expected = encoder_tokens(ours.encoder, pixels), expected.flatten(2).mT
    else:  # behind the last norm
        given = ours.norm(encoder_tokens(ours.encoder, pixels))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert ours.body(pixels).shape == (2, config.num_tokens, config.hidden_size)
    before = {"dinov2_with_registers": 4, "dinov3_vit": 5, "convnext": 0, "convnextv2": 0}
    assert config.num_prefix_tokens == before.get(kind, 1)
    assert config.grid == 2
    again = torch.cat([ours.body(one[None]) for one in pixels])
    torch.testing.assert_close(ours.body(pixels), again, rtol=1e-5, atol=1e-5)


def test_it_learns_is_saved_and_its_features_are_stored(made: Made, tmp_path: Path) -> None:
    model = made.model.set_trainable(("qformer",))
    batch = tiny_batch(model.config)
    model.train().loss(batch).loss_sum.backward()
    assert all(p.grad is None for p in model.vision_model.encoder.parameters())
    assert model.vision_model.post_layernorm.weight.grad is not None
    assert model.query_tokens.grad is not None
    model.eval()

    store = FeatureStore(tmp_path / "features", "fp32")
    assert batch.pixel_values is not None
    store.write(["a", "b"], model.encode_image(batch.pixel_values))
    store.refresh()
    features = torch.stack([store.read("a"), store.read("b")])
    stored = replace(batch, pixel_values=None, image_features=features)
    assert torch.equal(model.loss(stored).loss_sum, model.loss(batch).loss_sum)

    again = InstructBlip.from_pretrained(made.folder / "saved")
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert torch.equal(again.loss(batch).loss_sum, model.loss(batch).loss_sum)
    assert again.encoder_fingerprint() == model.encoder_fingerprint()
    stored = json.loads((made.folder / "saved" / "config.json").read_text())
    assert stored["model_type"] == "instructblip-other-tower", "transformers would load it wrong"
    assert InstructBlipConfig.from_transformers(stored) == model.config
    assert made.kind in inspect_checkpoint(made.folder / "saved").facts["image encoder"]


def test_all_of_it_trains_where_it_is_asked_to(made: Made) -> None:
    model = made.model.set_trainable(("qformer", "vision_tower")).train()
    model.loss(tiny_batch(model.config)).loss_sum.backward()
    model.eval()
    unmoved = [n for n, p in model.vision_model.named_parameters() if p.grad is None]
    assert not unmoved


def test_memory_is_that_of_a_pass(made: Made) -> None:
    model = made.model.set_trainable(("qformer",))
    side = model.config.vision.image_size
    pixels = torch.randn(16, 3, side, side)
    with FakeTensorMode():
        predicted = encoder_bytes(InstructBlip(model.config), 16)
    assert predicted == pytest.approx(tensor_peak(lambda: model.encode_image(pixels)), rel=0.1)


def test_images_of_another_size(made: Made) -> None:
    saved, side = made.folder / "saved", 2 * ENCODERS[made.kind]["image_size"]
    model = InstructBlip.from_pretrained(saved, image_size=side)
    assert model.config.vision.grid == 4
    features = model.encode_image(torch.randn(1, 3, side, side))
    assert features.shape[1] == model.config.vision.num_tokens
    with pytest.raises(ValueError, match=f"images must be {side} x {side}"):
        model.vision_model(torch.randn(1, 3, side + 1, side + 1))
    with pytest.raises(ValueError, match="must be a multiple of"):
        InstructBlip.from_pretrained(saved, image_size=side + 1)


@torch.no_grad()
def test_convolutions_tell_places(tmp_path: Path) -> None:
    write_encoder(tmp_path, "convnext", image_size=128)
    config, weights = read_vision(tmp_path)
    assert isinstance(config, EncoderConfig)
    pixels = torch.ones(1, 3, 128, 128)
    plain = build_vision(config.model_copy(update={"add_positions": False})).eval()
    placed = build_vision(config).eval()
    for model in (plain, placed):
        model.load_state_dict(weights)
    added = (placed.body(pixels) - plain.body(pixels))[0]  # [16, V]
    added /= plain.body(pixels)[0].std(1, keepdim=True)
    distances = torch.cdist(added, added) + 9 * torch.eye(16)
    assert distances.min() > 0.5, "every place has its own sign"
    assert added.abs().max() < 1.01


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_siglip2_of_any_shape_is_read_for_squares(tmp_path: Path, whole: bool) -> None:
    given = {n: v for n, v in ENCODER.items() if n != "image_size"}
    torch.manual_seed(0)
    theirs = Siglip2VisionModel(Siglip2VisionConfig(**given, num_patches=9)).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    if whole:  # image and text model in one directory
        values = json.loads((tmp_path / "config.json").read_text())
        stored = {"model_type": "siglip2", "vision_config": values}
        (tmp_path / "config.json").write_text(json.dumps(stored))
    config, weights = read_vision(tmp_path)
    assert isinstance(config, VisionConfig)
    assert (config.image_size, config.num_tokens) == (24, 9)
    ours = build_vision(config).eval()
    ours.load_state_dict(weights)
    pixels = torch.randn(2, 3, 24, 24)
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)  # [N, 3, 3, 8, 8, 3]
    expected = theirs(
        pixel_values=patches.flatten(3).flatten(1, 2),
        pixel_attention_mask=torch.ones(2, 9, dtype=torch.long),
        spatial_shapes=torch.tensor([[3, 3]] * 2),
    ).last_hidden_state
    torch.testing.assert_close(ours(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_positions_of_a_grid_are_resized_with_or_without_a_class_token(class_tokens: int) -> None:
    positions = torch.full((1, class_tokens + 9, 2), 3.0)
    positions[:, :class_tokens] = 7.0
    resized = interpolate_positions(positions, class_tokens + 16)
    assert resized.shape == (1, class_tokens + 16, 2)
    torch.testing.assert_close(resized[:, class_tokens:], torch.full((1, 16, 2), 3.0))
    assert (resized[:, :class_tokens] == 7).all()


@pytest.mark.parametrize("stored", ["clap", "videomae", "resnet", None])
def test_an_encoder_without_a_grid_is_refused_before_its_weights(
    tmp_path: Path, stored: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": stored}))
    with pytest.raises(ValueError, match=f"{stored!r}, without a grid.*CLIP.*dinov2") as error:
        read_vision(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", "dinov2")
    file = tmp_path / "encoder" / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.norm1.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    language = write_language(tmp_path / "language", "llama")
    with pytest.raises(ValueError, match=r"missing: vision_model\.encoder.*\.1\.norm1\.weight"):
        combine(tmp_path / "encoder", language, QFORMER)


def test_lavis_has_no_place_for_it(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", "dinov2")
    language = write_language(tmp_path / "language", "llama")
    model = combine(tmp_path / "encoder", language, QFORMER)
    export_lavis(model, tmp_path / "without.pth")
    with pytest.raises(ValueError, match="no image encoder 'dinov2'"):
        export_lavis(model, tmp_path / "with.pth", image_encoder=True)
    assert not (tmp_path / "with.pth").exists()


def test_the_command_reads_the_encoders_own_images_and_shows_where_queries_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DINOv2 learned positions for 16 pixels; its file crops 24 of 32."""
    write_encoder(tmp_path / "encoder", "dinov2_with_registers")
    settings = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": {"height": 24, "width": 24},
        "resample": 2,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps(settings))
    tokenizer = byte_level()
    values = {**SMALL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("llama", **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    wordpiece().save_pretrained(tmp_path / "bert")
    options = [f"--{o}" for o in ("vision", "language", "qformer-tokenizer", "out")]
    paths = [str(tmp_path / name) for name in ("encoder", "language", "bert", "model")]
    arguments = [word for pair in zip(options, paths, strict=True) for word in pair]
    with pytest.raises(SystemExit) as stop:
        cli.main(["combine", *arguments, "--queries", "4", "--layers", "1", "--debug"])
    assert not stop.value.code
    assert "13 tokens" in capsys.readouterr().out
    stored = inspect_checkpoint(tmp_path / "model").facts["image encoder"]
    assert stored == "dinov2_with_registers, 13 tokens, 3 x 3 of them a grid"
    engine = Engine.from_pretrained(tmp_path / "model", device="cpu")
    assert engine.images.transform == ImageTransform(
        24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resample="bilinear", crop_pct=0.75
    )
    image = write_picture(tmp_path / "a.png")
    assert isinstance(engine.answer(image, "what?", num_beams=1, max_new_tokens=3), str)
    pixels = engine.images.transform(load_image(image))
    sample = engine.sample(("a",), (pixels,), "what?")
    assert engine.look([sample]).shape == (1, 1, 4, 3, 3)
    places = torch.arange(13.0).expand(1, 1, 4, 13)
    monkeypatch.setattr(engine_module, "cross_attention", lambda *_: places)
    assert engine.look([sample])[0, 0, 0].tolist() == [[4, 5, 6], [7, 8, 9], [10, 11, 12]]
    lengths = [f"data.max_{name}=8" for name in ("instruction", "prompt", "response")]
    recipe = load_recipe(
        "quickstart",
        [f"model.start={tmp_path / 'model'}", *lengths, "training.device=cpu"],
    )
    assert predict_memory(recipe).encoder > 0
