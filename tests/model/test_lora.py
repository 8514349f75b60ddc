"""LoRA: what an adapter changes, and its files, which PEFT reads."""

import json
import re
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import InstructBlipForConditionalGeneration

from instructblip.cli import main as cli
from instructblip.core.batch import Batch
from instructblip.experiment.model import shape_language
from instructblip.model.checkpoints.lavis import export_lavis
from instructblip.model.config import LoraConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.lora import (
    FOLDERS,
    adapted_layers,
    add_lora,
    load_lora,
    lora_layers,
    merge_lora,
    save_lora,
)
from instructblip.model.trainable import part_of
from instructblip.recipe.load import load_recipe
from instructblip.release.export import export_model
from tests.model.test_activations import gradients
from tests.model.test_language import single, tiny_model
from tests.parity.tiny import tiny_batch, tiny_transformers, transformers_inputs


def loss_of(model: InstructBlip, batch: Batch | None = None) -> torch.Tensor:
    return model.loss(batch or tiny_batch(model.config)).loss_sum


def adapted(model: InstructBlip, **settings: object) -> InstructBlip:
    """``model`` with an adapter that changes its results."""
    add_lora(model.language_model, LoraConfig.model_validate({"rank": 2, **settings}))
    with torch.no_grad():
        for adapter in lora_layers(model.language_model).values():
            adapter.B.normal_(0, 0.5)
    return model.set_trainable(("qformer", "lora")).eval()


@pytest.fixture(params=["llama", "t5"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> InstructBlip:
    tiny_transformers(request.param).save_pretrained(tmp_path / "start")
    return InstructBlip.from_pretrained(tmp_path / "start")


def test_an_untrained_adapter_changes_nothing_and_gets_gradients(loaded: InstructBlip):
    with torch.no_grad():  # with gradients, a trainable last norm of the image encoder is folded
        before = loss_of(loaded)
        add_lora(loaded.language_model, LoraConfig(rank=2))
        assert torch.equal(loss_of(loaded), before)
    loaded.set_trainable(("lora",)).eval()
    trained = dict(loaded.trainable_parameters())
    assert trained
    assert all(name.endswith((".lora.A", ".lora.B")) for name in trained)
    computed = gradients(loaded, tiny_batch(loaded.config))
    assert all(computed[name].abs().max() > 0 for name in trained if name.endswith("B"))


def test_only_the_adapter_has_dropout():
    model = adapted(tiny_model("opt"), dropout=0.5).train()
    for name, module in model.language_model.named_modules():
        assert module.training == ("lora" in name.split(".")), name


def test_saving_loading_and_merging_change_no_result(loaded: InstructBlip, tmp_path: Path):
    plain = loss_of(loaded)
    model = adapted(loaded)
    expected = loss_of(model)
    assert not torch.isclose(expected, plain)
    model.save_pretrained(tmp_path / "saved")
    again = InstructBlip.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loss_of(again), expected, rtol=0, atol=0)
    assert not any("lora" in name for name, _ in again.trainable_parameters())
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any("lora" in name for name in names)
    merge_lora(again.language_model)
    assert not lora_layers(again.language_model)
    torch.testing.assert_close(loss_of(again), expected, rtol=1e-5, atol=1e-4)
    again.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / FOLDERS["lora"]).exists()


def test_export_merges_the_adapter_or_keeps_its_files(tmp_path: Path):
    tiny_transformers("llama").save_pretrained(tmp_path / "start")
    model = adapted(InstructBlip.from_pretrained(tmp_path / "start"))
    expected = loss_of(model)
    model.save_pretrained(tmp_path / "saved")
    for out, options in (("apart", ["--keep-lora"]), ("merged", [])):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", str(tmp_path / "saved"), str(tmp_path / out), *options, "--debug"])
        assert not stop.value.code
    assert (tmp_path / "apart" / FOLDERS["lora"] / "adapter_config.json").is_file()
    apart = InstructBlip.from_pretrained(tmp_path / "apart")
    assert lora_layers(apart.language_model)
    assert torch.equal(loss_of(apart), expected)
    assert not (tmp_path / "merged" / FOLDERS["lora"]).exists()
    merged = InstructBlip.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loss_of(merged), expected, rtol=1e-5, atol=1e-4)
    keep = ["export", "--keep-lora", "--debug"]
    with pytest.raises(ValueError, match="no place for an adapter"):
        cli.main([*keep, str(tmp_path / "saved"), str(tmp_path / "x.pth"), "--format", "lavis"])
    with pytest.raises(ValueError, match="no LoRA adapter to keep apart"):
        cli.main([*keep, str(tmp_path / "merged"), str(tmp_path / "x")])


PATTERNS = {
    "plain": {"rank": 2},
    "rslora": {"rank": 4, "alpha": 6, "rslora": True},
    "patterns": {
        "rank": 2,
        "rank_pattern": {r"0\..*\.(q_proj|c_attn|query)": 5, "value": 3},
        "alpha_pattern": {"v_proj|c_attn|crossattention.attention.value": 7},
    },
}
"""Settings of an adapter; a pattern that names a layer of another model is left out."""


def settings_for(root: torch.nn.Module, name: str) -> LoraConfig:
    values = dict(PATTERNS[name])
    names = adapted_layers(root, LoraConfig())
    for key in ("rank_pattern", "alpha_pattern"):
        pairs = values.get(key, {}).items()
        values[key] = {k: v for k, v in pairs if any(re.search(f"({k})$", n) for n in names)}
    return LoraConfig.model_validate(values)


def with_adapter(root: torch.nn.Module, config: LoraConfig) -> None:
    """Add an adapter that changes the results."""
    add_lora(root, config)
    with torch.no_grad():
        for adapter in lora_layers(root).values():
            adapter.B.normal_(0, 0.5)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("language", ["llama", "gpt2"])
def test_files_are_those_of_peft(language: str, name: str, tmp_path: Path):
    """PEFT reads what is written here with the same results, and what it writes is read here."""
    model = tiny_model(language)
    with_adapter(model.language_model, settings_for(model.language_model, name))
    ids = torch.arange(6)[None] + 4
    expected = model.language_model(input_ids=ids).logits
    save_lora(model.language_model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model(language).language_model, tmp_path / "ours")
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_model(language)
    load_lora(again.language_model, tmp_path / "theirs")
    torch.testing.assert_close(again.language_model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("targets", [None, (".*",)])
@pytest.mark.parametrize("name", PATTERNS)
def test_qformer_adapter_is_one_of_peft_on_transformers_instructblip(
    targets: tuple[str, ...] | None, name: str, tmp_path: Path
):
    """Losses and gradients are PEFT's, for the default targets and for all layers of the Q-Former
    and the projection; the adapter survives saving, and merging changes no loss."""
    tiny_transformers("llama").save_pretrained(tmp_path / "start")
    model = InstructBlip.from_pretrained(tmp_path / "start")
    root = model.adapted["qformer_lora"]
    config = settings_for(root, name)
    with_adapter(root, config.model_copy(update={"targets": targets}))
    assert ("language_projection" in lora_layers(root)) == (targets is not None)
    batch = tiny_batch(model.config)
    expected = loss_of(model)
    model.save_pretrained(tmp_path / "saved")
    merged = InstructBlip.from_pretrained(tmp_path / "saved")
    merge_lora(merged)
    assert not lora_layers(merged)
    torch.testing.assert_close(loss_of(merged), expected, rtol=1e-5, atol=1e-4)
    again = InstructBlip.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loss_of(again), expected, rtol=0, atol=0)

    base = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "start")
    folder = tmp_path / "saved" / FOLDERS["qformer_lora"]
    theirs = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval().double()
    theirs.get_base_model().vision_model.post_layernorm.requires_grad_(True)
    model.double().set_trainable(("qformer_lora", "vision_norm")).eval()
    assert batch.pixel_values is not None
    batch = replace(batch, pixel_values=batch.pixel_values.double())
    ours = gradients(model, batch)
    tokens = batch.num_response_tokens
    loss = theirs(**transformers_inputs(batch, model.config.num_query_tokens)).loss * tokens
    torch.testing.assert_close(loss, loss_of(model, batch), rtol=1e-6, atol=1e-6)
    loss.backward()
    named = {
        name.replace("lora_", "lora.").replace(".default.weight", ""): parameter.grad
        for name, parameter in theirs.get_base_model().named_parameters()
        if parameter.grad is not None
    }
    assert named.keys() >= ours.keys()
    for part, gradient in ours.items():
        torch.testing.assert_close(gradient, named[part], rtol=1e-4, atol=1e-5)


def test_the_qformer_stays_as_it_was_beside_its_adapter(tmp_path: Path):
    """A run trains the adapter alone, from a recipe; the saved Q-Former has the start's weights."""
    tiny_transformers("llama").save_pretrained(tmp_path / "start")
    model = InstructBlip.from_pretrained(tmp_path / "start")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = ("model.qformer_lora={rank: 2, dropout: 0.5}", "training.precision=fp32")
    trainable = "training.trainable=[query_tokens, qformer_lora]"
    recipe = load_recipe("quickstart", [*settings, trainable])
    shape_language(model, recipe)
    trained = {part_of(name) for name, _ in model.trainable_parameters()}
    assert trained == {"query_tokens", "qformer_lora"}
    for name, module in model.train().qformer.named_modules():
        assert module.training == ("lora" in name.split(".")), name
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    changed = {name for name, value in saved.items() if not torch.equal(value, before[name])}
    assert changed == {"query_tokens"}
    adapter = load_file(tmp_path / "saved" / FOLDERS["qformer_lora"] / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    with pytest.raises(ValueError, match="add qformer_lora to it"):
        shape_language(model, recipe, ("query_tokens",))
    with pytest.raises(ValueError, match=r"no adapter qformer_lora.*model.qformer_lora=\{\}"):
        tiny_model("llama").set_trainable(("qformer_lora",))


@pytest.mark.parametrize("target", ["key", "value"])
def test_an_adapter_reads_images_of_one_sample_as_it_reads_those_of_several(target: str):
    """Cross-attention has a faster form for images that no samples share."""
    model = tiny_model("llama")
    config = LoraConfig(rank=2, targets=(rf"crossattention\.attention\.{target}",))
    with_adapter(model.adapted["qformer_lora"], config)
    batch = tiny_batch(model.config)
    alone = model.loss(single(batch, 0)).sample_losses[0]
    torch.testing.assert_close(model.loss(batch).sample_losses[0], alone, rtol=1e-5, atol=1e-5)


def test_a_lavis_file_has_the_qformer_with_its_adapter_merged(tmp_path: Path):
    tiny_transformers("llama").save_pretrained(tmp_path / "start")
    model = InstructBlip.from_pretrained(tmp_path / "start")
    with_adapter(model.adapted["qformer_lora"], LoraConfig(rank=2))
    model.save_pretrained(tmp_path / "saved")
    export_model(tmp_path / "saved", tmp_path / "x.pth", "lavis")
    merge_lora(model)
    export_lavis(model, tmp_path / "merged.pth")
    written, merged = (
        torch.load(tmp_path / name, weights_only=True)["model"] for name in ("x.pth", "merged.pth")
    )
    assert written.keys() == merged.keys()
    assert all(torch.equal(written[name], merged[name]) for name in merged)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path):
    model = adapted(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"'query'.*are no layers of a llama.*q_proj"):
        add_lora(tiny_model("llama").language_model, LoraConfig(targets=("query",)))
    with pytest.raises(ValueError, match="no adapter lora to train"):
        tiny_model("llama").set_trainable(("lora",))
    save_lora(model.language_model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"rank_pattern.*matches no adapted layer.*q_proj"):
        add_lora(tiny_model("llama").language_model, LoraConfig(rank_pattern={"query": 3}))
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        LoraConfig(alpha_pattern={"(": 3})
    with pytest.raises(ValueError, match="another model"):
        load_lora(tiny_model("opt").language_model.model.decoder.layers[0], tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    plain = json.loads(file.read_text())
    for odd in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"target_parameters": ["x"]}):
        file.write_text(json.dumps({**plain, **odd}))
        with pytest.raises(ValueError, match=rf"plain LORA.*{next(iter(odd))}"):
            load_lora(tiny_model("llama").language_model, tmp_path / "a")
    file.write_text(json.dumps({**plain, "r": 3}))
    with pytest.raises(ValueError, match="another model"):
        load_lora(tiny_model("llama").language_model, tmp_path / "a")
