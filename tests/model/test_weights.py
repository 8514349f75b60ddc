"""Wrong, damaged and hostile files are refused with a message; a save is whole or not at all."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from instructblip.model.checkpoints import weights as weights_module
from instructblip.model.checkpoints.weights import read_weights
from instructblip.model.instructblip import InstructBlip
from tests.parity.tiny import tiny_batch, tiny_transformers


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    tiny_transformers("opt").save_pretrained(path)
    return path


def rewrite(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_missing_unexpected_and_misshaped_tensors_are_listed_together(directory):
    def change(tensors):
        del tensors["query_tokens"]
        tensors["qformer.stray.weight"] = torch.zeros(2)
        tensors["language_projection.bias"] = torch.zeros(7)

    rewrite(directory, change)
    with pytest.raises(ValueError, match="do not fit") as error:
        InstructBlip.from_pretrained(directory)
    message = str(error.value)
    assert "missing: query_tokens [1, 3, 20]" in message
    assert "unexpected: qformer.stray.weight [2]" in message
    assert "mis-shaped: language_projection.bias got [7], expected [24]" in message


def test_leftover_buffers_and_tied_names_are_harmless(directory):
    def change(tensors):
        tensors["qformer.embeddings.position_ids"] = torch.arange(12)[None]
        embedding = tensors["language_model.model.decoder.embed_tokens.weight"]
        tensors["language_model.lm_head.weight"] = embedding.clone()

    rewrite(directory, change)
    language = InstructBlip.from_pretrained(directory).language_model
    assert language.lm_head.weight is language.model.decoder.embed_tokens.weight


def test_tied_name_alone_is_enough(directory):
    def change(tensors):
        name = "language_model.model.decoder.embed_tokens.weight"
        tensors["language_model.lm_head.weight"] = tensors.pop(name)

    before = InstructBlip.from_pretrained(directory).language_model.lm_head.weight
    rewrite(directory, change)
    assert torch.equal(
        InstructBlip.from_pretrained(directory).language_model.lm_head.weight, before
    )


def test_truncated_file_is_named(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        InstructBlip.from_pretrained(directory)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(os.system)])
def test_the_message_for_a_damaged_file_does_not_advise_to_trust_it(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth cannot be read as tensors alone") as error:
        read_weights(tmp_path / "x.pth")
    assert str(error.value).endswith("convert it to safetensors.")


def test_broken_or_foreign_config_is_named(directory):
    config = directory / "config.json"
    values = json.loads(config.read_text())
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        InstructBlip.from_pretrained(directory)
    config.write_text(json.dumps({**values, "model_type": "llava"}))
    with pytest.raises(ValueError, match="got 'llava'"):
        InstructBlip.from_pretrained(directory)


class Malice:
    """Unpickling this writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_pickle_that_runs_code_is_refused(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    target = tmp_path / "owned"
    file = directory / "pytorch_model.bin"
    with file.open("wb") as stream:
        pickle.dump({"query_tokens": Malice(target)}, stream, protocol=2)
    with pytest.raises(ValueError, match="refused"):
        InstructBlip.from_pretrained(directory)
    torch.save({"query_tokens": Malice(target)}, file)
    with pytest.raises(ValueError, match="refused"):
        InstructBlip.from_pretrained(directory)
    assert not target.exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_pickle_of_plain_tensors_is_read(directory, sharded):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if sharded:
        names = sorted(tensors)
        parts = {"a.bin": names[::2], "b.bin": names[1::2]}
        for part, listed in parts.items():
            torch.save({name: tensors[name] for name in listed}, directory / part)
        index = {"weight_map": {name: part for part, listed in parts.items() for name in listed}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, directory / "pytorch_model.bin")
    ours = InstructBlip.from_pretrained(directory)
    assert torch.equal(ours.query_tokens.detach(), tensors["query_tokens"])


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "a\\b", ".."])
def test_index_that_leaves_the_directory_is_refused(directory, name):
    (directory / "model.safetensors").rename(directory / "hidden.safetensors")
    index = {"weight_map": {"query_tokens": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="plain names in the same directory"):
        InstructBlip.from_pretrained(directory)


def test_shard_that_lacks_a_promised_tensor(directory):
    save_file({"other": torch.zeros(1)}, directory / "one.safetensors")
    index = {"weight_map": {"query_tokens": "one.safetensors"}}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="promises"):
        InstructBlip.from_pretrained(directory)


def test_absent_paths_say_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="'starter'"):
        InstructBlip.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        InstructBlip.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        read_weights(tmp_path)


def test_run_directory_gives_best_before_last(directory, tmp_path):
    model = InstructBlip.from_pretrained(directory)
    model.save_pretrained(tmp_path / "run" / "last")
    with torch.no_grad():
        model.query_tokens.fill_(0.5)
    assert not InstructBlip.from_pretrained(tmp_path / "run").query_tokens.eq(0.5).all()
    model.save_pretrained(tmp_path / "run" / "best")
    assert InstructBlip.from_pretrained(tmp_path / "run").query_tokens.eq(0.5).all()


def test_save_copies_tokenizers_and_the_image_size(directory, tmp_path):
    (directory / "qformer_tokenizer").mkdir()
    (directory / "qformer_tokenizer" / "vocab.txt").write_text("a\n")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "secret.py").write_text("")
    preprocessor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    model = InstructBlip.from_pretrained(directory, image_size=24)
    model.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert (saved / "qformer_tokenizer" / "vocab.txt").read_text() == "a\n"
    assert (saved / "tokenizer.json").exists()
    assert not (saved / "secret.py").exists()
    values = json.loads((saved / "preprocessor_config.json").read_text())
    assert values == {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3}


def test_saving_over_the_directory_that_the_model_came_from(directory):
    (directory / "tokenizer.json").write_text("{}")
    model = InstructBlip.from_pretrained(directory)
    before = model.loss(tiny_batch(model.config)).loss_sum
    model.save_pretrained(directory)
    again = InstructBlip.from_pretrained(directory)
    assert torch.equal(again.loss(tiny_batch(model.config)).loss_sum, before)
    assert (directory / "tokenizer.json").exists()


def test_failed_save_leaves_the_old_model_whole(directory, monkeypatch):
    model = InstructBlip.from_pretrained(directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written.*disk full"):
        model.save_pretrained(directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    assert sorted(p.name for p in directory.parent.iterdir()) == [directory.name]
