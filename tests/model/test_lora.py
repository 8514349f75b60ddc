"""LoRA: what an adapter changes, and its files, which PEFT reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instructblip.cli import main as cli
from instructblip.model.config import LoraConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.lora import (
    FOLDER,
    add_lora,
    load_lora,
    lora_layers,
    merge_lora,
    save_lora,
)
from tests.model.test_activations import gradients
from tests.model.test_language import tiny_model
from tests.parity.tiny import tiny_batch, tiny_transformers


def loss_of(model: InstructBlip) -> torch.Tensor:
    return model.loss(tiny_batch(model.config)).loss_sum


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
    assert not (tmp_path / "merged" / FOLDER).exists()


def test_export_merges_the_adapter_or_keeps_its_files(tmp_path: Path):
    tiny_transformers("llama").save_pretrained(tmp_path / "start")
    model = adapted(InstructBlip.from_pretrained(tmp_path / "start"))
    expected = loss_of(model)
    model.save_pretrained(tmp_path / "saved")
    for out, options in (("apart", ["--keep-lora"]), ("merged", [])):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", str(tmp_path / "saved"), str(tmp_path / out), *options, "--debug"])
        assert not stop.value.code
    assert (tmp_path / "apart" / FOLDER / "adapter_config.json").is_file()
    apart = InstructBlip.from_pretrained(tmp_path / "apart")
    assert lora_layers(apart.language_model)
    assert torch.equal(loss_of(apart), expected)
    assert not (tmp_path / "merged" / FOLDER).exists()
    merged = InstructBlip.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loss_of(merged), expected, rtol=1e-5, atol=1e-4)
    keep = ["export", "--keep-lora", "--debug"]
    with pytest.raises(ValueError, match="no place for an adapter"):
        cli.main([*keep, str(tmp_path / "saved"), str(tmp_path / "x.pth"), "--format", "lavis"])
    with pytest.raises(ValueError, match="no LoRA adapter to keep apart"):
        cli.main([*keep, str(tmp_path / "merged"), str(tmp_path / "x")])


def test_peft_reads_our_files_and_we_read_theirs(tmp_path: Path):
    peft = pytest.importorskip("peft")
    for language in ("llama", "gpt2"):
        model = adapted(tiny_model(language))
        ids = torch.arange(6)[None] + 4
        expected = model.language_model(input_ids=ids).logits
        save_lora(model.language_model, tmp_path / language)
        theirs = tiny_model(language).language_model
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / language)
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected)
        theirs.save_pretrained(tmp_path / f"{language}-theirs")
        ours = tiny_model(language)
        load_lora(ours.language_model, tmp_path / f"{language}-theirs")
        torch.testing.assert_close(ours.language_model(input_ids=ids).logits, expected)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path):
    model = adapted(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"'query'.*are no layers of a llama.*q_proj"):
        add_lora(tiny_model("llama").language_model, LoraConfig(targets=("query",)))
    with pytest.raises(ValueError, match="no adapter to train"):
        tiny_model("llama").set_trainable(("lora",))
    save_lora(model.language_model, tmp_path / "a")
    with pytest.raises(ValueError, match="another language model"):
        load_lora(tiny_model("opt").language_model.model.decoder.layers[0], tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match=r"plain LORA.*use_dora"):
        load_lora(tiny_model("llama").language_model, tmp_path / "a")
