"""Tiny generated Stable Diffusion and Sana directories behind the decoder interface."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instructblip.model.instructblip import InstructBlip
from instructblip.text_to_image.batches import DrawLoader
from instructblip.text_to_image.config import ConditionerConfig, DiffusersConfig, TextToImageConfig
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.pretrained import from_pretrained, save_addition, save_pretrained
from instructblip.text_to_image.sample import Painter
from instructblip.training.optim import trainable_parameters
from instructblip.training.train import train
from tests.text_to_image.test_model import settings

diffusers = pytest.importorskip("diffusers")
KINDS = ("stable-diffusion", "sana")


def write_decoder(folder: Path, kind: str) -> Path:
    """The parts that we read, under the names that the pipelines give them."""
    torch.manual_seed(0)
    if kind == "sana":
        name, class_name = "transformer", "SanaPipeline"
        backbone = diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
            num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=12, sample_size=8,
        )  # fmt: skip
        scheduler = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    else:
        name, class_name = "unet", "StableDiffusionPipeline"
        backbone = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
            block_out_channels=(16, 16), cross_attention_dim=12, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    parts = {name: backbone, "vae": vae, "scheduler": scheduler}
    folder.mkdir()
    entries = [f'"{n}": ["diffusers", "{type(p).__name__}"]' for n, p in parts.items()]
    index = ", ".join([f'"_class_name": "{class_name}"', *entries])
    (folder / "model_index.json").write_text(f"{{{index}}}")
    for part, module in parts.items():
        module.save_pretrained(folder / part)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def decoder_directory(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("decoder") / request.param, request.param)


def build(directory: Path, decoder: Path) -> TextToImage:
    config = TextToImageConfig(
        conditioner=ConditionerConfig(num_queries=2, num_layers=1, width=8, num_heads=2),
        decoder=DiffusersConfig(path=str(decoder)),
    )
    torch.manual_seed(0)
    return TextToImage(InstructBlip.from_pretrained(directory), config)


def test_it_trains_saves_and_draws(
    directory: Path, decoder_directory: Path, painter: Painter, loader: DrawLoader, tmp_path: Path
):
    model = build(directory, decoder_directory)
    assert (model.decoder.condition_width, model.decoder.image_size) == (12, 16)
    assert not any(n.startswith("decoder") for n in trainable_parameters(model))
    before = {n: p.clone() for n, p in model.decoder.state_dict().items()}
    bridge = model.conditioner.connector.output.weight.clone()
    train(model, loader, None, settings(steps=2, trainable=("bridge",)), tmp_path / "run")
    assert all(torch.equal(p, before[n]) for n, p in model.decoder.state_dict().items())
    assert not torch.equal(model.conditioner.connector.output.weight, bridge)
    save_pretrained(model, tmp_path / "saved")
    tools = (painter.tokens, painter.transform)
    drawn = Painter(model, *tools).draw("a red cat", seed=1, steps=3)[0]
    again = Painter(from_pretrained(tmp_path / "saved"), *tools).draw("a red cat", seed=1, steps=3)
    assert drawn.size == (16, 16)
    assert drawn.tobytes() == again[0].tobytes()


def test_keys_and_values_alone_can_train(directory: Path, tmp_path: Path):
    model = build(directory, write_decoder(tmp_path / "sd", KINDS[0]))
    model.set_trainable(("bridge", "decoder_keys_values"))
    names = [n for n in trainable_parameters(model) if n.startswith("decoder.")]
    assert names
    assert all(".attn2.to_" in n for n in names)
    model.set_trainable(("drawing",))
    assert not any("vae" in n for n in trainable_parameters(model))


def test_weights_are_written_once_they_differ(directory: Path, tmp_path: Path):
    model = build(directory, write_decoder(tmp_path / "sd", KINDS[0]))
    save_addition(model, tmp_path / "frozen")
    assert not any(
        n.startswith("decoder") for n in load_file(tmp_path / "frozen/model.safetensors")
    )
    model.set_trainable(("drawing",))
    save_addition(model, tmp_path / "trained")
    names = load_file(tmp_path / "trained" / "model.safetensors")
    assert {n for n in names if n.startswith("decoder")} == {
        f"decoder.{n}" for n in model.decoder.state_dict() if "vae" not in n
    }


def test_the_condition_reaches_the_decoder(directory: Path, decoder_directory: Path):
    decoder = build(directory, decoder_directory).eval().decoder
    noisy, mask = torch.randn(1, 4, 8, 8), torch.ones(1, 3, dtype=torch.bool)
    decoder.scheduler.set_timesteps(2)
    with torch.no_grad():
        results = [
            decoder.predict(noisy, 500.0, torch.full((1, 3, 12), v), mask) for v in (0.0, 3.0)
        ]
    assert (results[0] - results[1]).abs().max() > 1e-5


def test_missing_parts_are_named(directory: Path, decoder_directory: Path, tmp_path: Path):
    broken = shutil.copytree(decoder_directory, tmp_path / "broken")
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete: vae/config\.json missing"):
        build(directory, broken)
    (broken / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a diffusers directory.*model_index\.json"):
        build(directory, broken)
    (broken / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ValueError, match="holds a DiTPipeline; expected a pipeline with one of"):
        build(directory, broken)


def test_a_decoder_of_another_width_is_refused(directory: Path, tmp_path: Path):
    model = build(directory, write_decoder(tmp_path / "sana", "sana"))
    save_pretrained(model, tmp_path / "saved")
    other = tmp_path / "sana" / "transformer" / "config.json"
    shutil.rmtree(other.parent)
    diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=20, sample_size=8,
    ).save_pretrained(other.parent)  # fmt: skip
    with pytest.raises(ValueError, match=r"width 12, the decoder reads 20.*not trained together"):
        from_pretrained(tmp_path / "saved")
