"""Conditioner, decoder and loss: what they depend on, and what trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from instructblip.model.instructblip import InstructBlip
from instructblip.text_to_image.batches import DrawLoader
from instructblip.text_to_image.config import ConditionerConfig, NativeConfig
from instructblip.text_to_image.decoder import EVEN_WEIGHT, Details, NativeDecoder
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.sample import Painter
from instructblip.training.config import TrainingConfig
from instructblip.training.optim import trainable_parameters
from instructblip.training.train import train
from tests.text_to_image.conftest import CONFIG


def conditions(model: TextToImage, batch, index=None, mask=None) -> torch.Tensor:
    index = batch.image_index[:, 0] if index is None else index
    mask = batch.qformer_mask if mask is None else mask
    with torch.no_grad():
        return model.condition(model.encode(batch), index, batch.qformer_ids, mask)[0]


def test_the_condition_depends_on_instruction_and_image(model: TextToImage, loader: DrawLoader):
    batch = loader.batch(0)
    index = batch.image_index[:, 0]
    assert (index >= 0).any()
    assert (index < 0).any()
    normal = conditions(model.eval(), batch)
    blind = conditions(model, batch, index=torch.full_like(index, -1))
    silent = conditions(model, batch, mask=torch.zeros_like(batch.qformer_mask))
    changed = (normal - blind).abs().amax((1, 2)) > 1e-4
    assert changed.tolist() == (index >= 0).tolist()
    queries = CONFIG.conditioner.num_queries
    assert ((normal - silent)[:, :queries].abs().amax((1, 2)) > 1e-4).all()


def test_the_null_image_is_the_same_in_a_batch_with_and_without_images(model: TextToImage, loader):
    batch = loader.batch(0)
    none = torch.full_like(batch.image_index[:, 0], -1)
    with_images = conditions(model.eval(), batch, index=none)
    without = conditions(model, replace(batch, pixel_values=None), index=none)
    torch.testing.assert_close(with_images, without, atol=1e-5, rtol=1e-4)


def test_padding_and_neighbours_change_nothing(model: TextToImage, loader: DrawLoader):
    batch = loader.batch(0)
    index = int((batch.image_index[:, 0] < 0).nonzero()[0])
    length = int(batch.qformer_mask[index].sum())
    alone = replace(
        batch,
        pixel_values=None,
        image_index=batch.image_index[index : index + 1],
        qformer_ids=batch.qformer_ids[index : index + 1, :length],
        qformer_mask=batch.qformer_mask[index : index + 1, :length],
    )
    kept = CONFIG.conditioner.num_queries + length
    together = conditions(model.eval(), batch)[index, :kept]
    torch.testing.assert_close(conditions(model, alone)[0], together, atol=1e-5, rtol=1e-4)


def test_the_condition_has_the_scale_of_the_config(directory: Path, loader: DrawLoader):
    config = CONFIG.model_copy(
        update={"conditioner": ConditionerConfig(width=16, num_heads=2, gain=2.5)}
    )
    model = TextToImage(InstructBlip.from_pretrained(directory), config).eval()
    scale = conditions(model, loader.batch(0)).square().mean().sqrt()
    assert scale.item() == pytest.approx(2.5, rel=1e-2)


def test_loss_of_a_batch_is_the_sum_over_its_images(model: TextToImage, loader: DrawLoader):
    torch.manual_seed(3)
    output = model.eval().loss(loader.batch(0))
    assert output.num_tokens.item() == 6
    torch.testing.assert_close(output.loss_sum, output.sample_losses.sum())


@pytest.mark.parametrize("predict", ["picture", "velocity"])
def test_a_perfect_prediction_has_no_loss_and_euler_steps_reach_it(predict: str, monkeypatch):
    config = NativeConfig(
        image_size=8, patch_size=4, width=8, num_heads=2, condition_width=8, predict=predict,
        noise_levels=1,
    )  # fmt: skip
    decoder = NativeDecoder(config)
    image, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    truth = image if predict == "picture" else noise - image
    monkeypatch.setattr(NativeDecoder, "forward", lambda self, *_: truth)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    nothing = torch.zeros(2, 0, 8), torch.ones(2, 0, dtype=torch.bool)
    assert decoder.loss(image, *nothing).max() == 0
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    levels = []

    def guided(noisy: torch.Tensor, level: float) -> torch.Tensor:
        levels.append(level)
        return decoder.predict(noisy, level, *nothing)

    torch.testing.assert_close(decoder.sample(guided, 2, 5), image, atol=1e-5, rtol=1e-4)
    assert len(levels) == 5
    assert levels[0] == 1
    assert levels == sorted(levels, reverse=True)


def test_a_wrong_background_weighs_less_than_wrong_objects(monkeypatch):
    image, error = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.4)
    error[1, :, ::2] *= -1  # as large, but even over nothing
    monkeypatch.setattr(NativeDecoder, "forward", lambda self, *_: error)
    config = NativeConfig(
        image_size=8, patch_size=4, width=8, num_heads=2, condition_width=8, noise_levels=1,
        noise_mean=20,
    )  # fmt: skip
    nothing = torch.zeros(2, 0, 8), torch.ones(2, 0, dtype=torch.bool)
    even, uneven = NativeDecoder(config).loss(image, *nothing)
    assert uneven.item() == pytest.approx(0.16, rel=1e-3)
    assert even.item() == pytest.approx(EVEN_WEIGHT * 0.16, rel=1e-3)


def test_one_condition_serves_several_noise_levels():
    torch.manual_seed(0)
    decoder = NativeDecoder(CONFIG.decoder)  # type: ignore[arg-type]
    torch.nn.init.normal_(decoder.patch_output.weight)
    noisy, level = torch.randn(6, 3, 16, 16), torch.rand(6)
    condition, mask = torch.randn(2, 5, 16), torch.rand(2, 5) < 0.7
    mask[:, 0] = True
    shared = decoder(noisy, level, condition, mask)
    rows = torch.arange(6) // 3
    torch.testing.assert_close(shared, decoder(noisy, level, condition[rows], mask[rows]))
    assert not torch.allclose(shared, decoder(noisy, level, condition[1 - rows], mask[1 - rows]))


def test_details_start_as_the_identity_and_reach_beyond_a_patch():
    torch.manual_seed(0)
    details = Details(8)
    image, noisy, level = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16), torch.rand(1)
    assert torch.equal(details(image, noisy, level), image)
    torch.nn.init.normal_(details.output.weight)
    before = details(image, noisy, level)
    noisy[:, :, 8, 8] += 1  # the first pixel of a patch of 4 or 8
    moved = (details(image, noisy, level) - before).abs().amax((0, 1)) > 0
    assert moved[7, 7]
    assert not moved[:2].any()
    assert not moved[:, :2].any()
    assert (details(image, noisy, level + 0.1) != details(image, noisy, level)).any()


def test_the_side_of_an_image_is_even():
    with pytest.raises(ValueError, match="image_size must be even; got 9"):
        NativeConfig(image_size=9, patch_size=3)


def test_noise_levels_of_an_image_are_spread():
    torch.manual_seed(0)
    config = CONFIG.decoder.model_copy(update={"noise_levels": 4})
    logit = NativeDecoder(config)._random_levels(5000).logit().unflatten(0, (-1, 4))
    assert isinstance(config, NativeConfig)
    assert logit.mean().item() == pytest.approx(config.noise_mean, abs=0.05)
    assert logit.std().item() == pytest.approx(config.noise_std, abs=0.05)
    assert (logit[:, :-1].amax(0) <= logit[:, 1:].amin(0) + 1e-4).all()  # one of each quarter


def test_only_the_chosen_parts_train(model: TextToImage, loader: DrawLoader, tmp_path: Path):
    choices = {("drawing",): False, ("bridge", "qformer_cross_attention"): True}
    for number, (choice, qformer) in enumerate(choices.items()):
        model.set_trainable(choice)
        chosen = set(trainable_parameters(model))
        before = {name: p.clone() for name, p in model.state_dict().items()}
        train(model, loader, None, settings(steps=2, trainable=choice), tmp_path / str(number))
        moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
        assert moved <= chosen
        assert {"conditioner.generation_queries", "conditioner.connector.output.weight"} <= moved
        assert any(n.startswith("decoder.") for n in moved) == (not qformer)
        assert any("crossattention" in n for n in moved) == qformer
        assert not any(
            n.startswith(("instructblip.language", "instructblip.vision")) for n in moved
        )


def test_always_frozen_parts_are_refused(model: TextToImage):
    with pytest.raises(ValueError, match="vision_tower cannot train"):
        model.set_trainable(("drawing", "vision_tower"))
    with pytest.raises(ValueError, match=r"some of .*; got \['decodr'\]"):
        model.set_trainable(("decodr",))


def settings(**changes) -> TrainingConfig:
    values = {
        "batch_size": 6, "learning_rate": 3e-3, "warmup_steps": 1, "steps": 6, "precision": "fp32",
        "optimizer": "muon", "device": "cpu", "save_every": 2, "log_every": 2,
        "validate_every": None, "trainable": ("drawing",),
    }  # fmt: skip
    return TrainingConfig.model_validate(values | changes)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    directory: Path, loader: DrawLoader, tmp_path: Path, optimizer: str
):
    def run(folder: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = TextToImage(InstructBlip.from_pretrained(directory), CONFIG)
        config = settings(optimizer=optimizer)
        if stop:
            # the same schedule, cut off: the loader ends where a kill would come
            class Ends:
                def iterate(self, step):
                    return (loader.step(s) for s in range(step, stop))

            with pytest.raises(StopIteration):
                train(model, Ends(), None, config, folder)
        train(model, loader, None, config, folder, resume=stop is not None)
        return trainable_parameters(model)

    whole, parts = run(tmp_path / "whole"), run(tmp_path / "parts", stop=3)
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_a_blip2_cannot_draw(tmp_path: Path):
    from tests.testing import write_model

    blip2 = InstructBlip.from_pretrained(write_model(tmp_path, "blip2"))
    with pytest.raises(ValueError, match="instruction_aware=True"):
        TextToImage(blip2, CONFIG)


def test_it_learns_two_images(painter: Painter, tmp_path: Path):
    """A short training on two instructions with two colours; each is then drawn in its colour."""
    from PIL import Image

    from instructblip.text_to_image.tasks import DrawExample

    colours = {"red": (220, 20, 20), "the blue cat": (20, 20, 220)}
    examples = [
        DrawExample(text, lambda c=c: Image.new("RGB", (16, 16), c)) for text, c in colours.items()
    ]
    sets = {"two": examples}
    loader = DrawLoader(sets, {}, painter.tokens, painter.transform, 16, batch_size=6)
    config = settings(steps=300, learning_rate=1e-2, save_every=1000, batch_size=6)
    train(painter.model, loader, None, config, tmp_path)
    painter.model.eval()
    for text, colour in colours.items():
        (image,) = painter.draw(text, seed=1, guidance=1.0)
        mean = torch.tensor(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
        assert (mean - torch.tensor(colour)).abs().max() < 60, (text, mean)
