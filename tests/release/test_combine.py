"""A new pair of image encoder and language model: what fits, what is built, where it starts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from instructblip.cli import main as cli
from instructblip.data.tokens import Tokens
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.combine import word_rms
from instructblip.model.checkpoints.shared_words import shared_tokenizer
from instructblip.model.instructblip import InstructBlip
from instructblip.release.assemble import combine_parts
from tests.parity.tiny import LANGUAGES
from tests.testing import byte_level, llama_like, wordpiece, write_model, write_picture

WORDS = "qformer.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vision/, language/ of width 24 with 270 words, bert/ with weights of width 12."""
    folder = tmp_path_factory.mktemp("parts")
    write_model(folder / "vision", "blip2")
    tokenizer = byte_level()
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    values = {**LANGUAGES["llama"], **ends, "vocab_size": 270}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(1)
    language = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(language.model.embed_tokens.weight, std=0.3)
    language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    words = wordpiece()
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=2, **sizes))
    bert.save_pretrained(folder / "bert")
    words.save_pretrained(folder / "bert")
    return folder


def test_the_language_models_own_words(parts: Path, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "cross_attention_frequency": 1}
    made = combine_parts(parts / "vision", parts / "language", None, tmp_path / "a", 3, None, sizes)
    model = InstructBlip.from_pretrained(tmp_path / "a")
    qformer = model.config.qformer
    assert (qformer.hidden_size, qformer.num_attention_heads) == (24, 1)
    assert (qformer.num_hidden_layers, qformer.intermediate_size) == (2, 96)
    assert all(layer.crossattention is not None for layer in model.qformer.encoder.layer)
    table = model.state_dict()[WORDS]
    words = model.language_model.get_input_embeddings().weight[: len(table)]
    torch.testing.assert_close(table / table.std(), words / words.std())
    assert table.std() == pytest.approx(qformer.initializer_range, rel=1e-3)
    assert len(table) == len(byte_level()), "a row for each id, and none for rows without one"
    tokens = Tokens.from_pretrained(tmp_path / "a")
    assert tokens.around_instruction == ("<|end|>", "<|end|>")
    assert "word table" in made.describe()
    assert "the language model's, scaled to deviation 0.02" in made.describe()
    image = write_picture(tmp_path / "a.png")
    engine = Engine.from_pretrained(tmp_path / "a", device="cpu")
    assert isinstance(engine.answer(image, "what?", num_beams=1, max_new_tokens=3), str)


def test_projected_queries_are_as_large_as_words(parts: Path, tmp_path: Path) -> None:
    combine_parts(parts / "vision", parts / "language", None, tmp_path / "a", 16)
    model = InstructBlip.from_pretrained(tmp_path / "a").eval()
    features = torch.randn(8, model.config.vision.num_tokens, model.config.vision.hidden_size)
    none = torch.zeros(8, 0, dtype=torch.long)
    with torch.no_grad():
        queries = model.project_queries(model.query_image(features, none, none))
    assert queries.pow(2).mean().sqrt() == pytest.approx(word_rms(model), rel=0.1)
    assert word_rms(model) == pytest.approx(0.3, rel=0.05)


def test_another_width_starts_random_words_and_says_so(parts: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 4}
    for name in ("a", "b"):
        out = tmp_path / name
        made = combine_parts(parts / "vision", parts / "language", None, out, 3, None, sizes)
    row = next(part for part in made.parts if part.name == "word table")
    assert row.start == "random, deviation 0.02"
    one, two = (InstructBlip.from_pretrained(tmp_path / n).state_dict() for n in "ab")
    assert one[WORDS].std() == pytest.approx(0.02, rel=0.05)
    assert all(torch.equal(one[name], two[name]) for name in one), "the same parts, another model"


def test_a_text_branch_of_bert(parts: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
    bert, languages = parts / "bert", (parts / "vision", parts / "language")
    sizes["num_hidden_layers"] = 1
    made = combine_parts(*languages, bert, tmp_path / "a", 3, bert, sizes)
    model, theirs = InstructBlip.from_pretrained(tmp_path / "a"), BertModel.from_pretrained(bert)
    words = theirs.embeddings.word_embeddings.weight
    assert torch.equal(model.state_dict()[WORDS][:-1], words)
    layer = theirs.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(model.qformer.encoder.layer[0].intermediate.dense.weight, layer)
    assert [part.start for part in made.parts].count(str(bert)) == 2
    assert not list((tmp_path / "a" / "qformer_tokenizer").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"text branch does not fit a Q-Former of width 12.*nothing"),
        ({"hidden_size": 24}, r"text branch does not fit a Q-Former of width 24.*\[69, 12\]"),
        ({"num_attention_heads": 5}, r"width 12 has no 5 heads.*--heads"),
    ],
)
def test_sizes_that_do_not_fit(
    parts: Path,
    tmp_path: Path,
    change: dict[str, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("instructblip.release.assemble.combine", pytest.fail)
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20, **change}
    bert, languages = parts / "bert", (parts / "vision", parts / "language")
    with pytest.raises(ValueError, match=message) as error:
        combine_parts(*languages, bert, tmp_path / "a", 3, bert, sizes)
    assert "\n" not in str(error.value)


def test_tokenizers_that_do_not_fit(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instructblip.release.assemble.combine", pytest.fail)
    vision, language, out = parts / "vision", parts / "language", tmp_path / "a"
    with pytest.raises(ValueError, match=r"tokenizer does not fit.*no \[CLS\]"):
        combine_parts(vision, language, language, out)
    with pytest.raises(ValueError, match=r"--text-branch .*bert.*--qformer-tokenizer"):
        combine_parts(vision, language, None, out, text_branch=parts / "bert")
    small = tmp_path / "small"
    small.mkdir()
    config = json.loads((language / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 259}))
    byte_level().save_pretrained(small)
    with pytest.raises(ValueError, match=r"tokenizer does not fit.* 260 .*has 259"):
        combine_parts(vision, small, None, out)
    big = wordpiece()
    big.add_tokens([f"word{i}" for i in range(9)])
    big.save_pretrained(tmp_path / "big")
    with pytest.raises(ValueError, match=r"text branch does not fit the tokenizer, it has 69"):
        combine_parts(vision, language, tmp_path / "big", out, text_branch=parts / "bert")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vision", r"no image encoder.*config\.json; .*transformers, .*lite0, efficientnet-lite2"),
        ("language", r"no language model.*config\.json; expected .*transformers, a GGUF file"),
    ],
)
def test_a_folder_without_a_model(parts: Path, tmp_path: Path, part: str, message: str) -> None:
    names = {"vision": parts / "vision", "language": parts / "language", part: tmp_path}
    with pytest.raises(FileNotFoundError, match=message) as error:
        combine_parts(names["vision"], names["language"], None, tmp_path / "a")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_start_token_comes_first() -> None:
    shared = shared_tokenizer(llama_like())
    ids = shared("red")["input_ids"]
    assert [shared.decode([ids[0]]), shared.decode([ids[-1]])] == ["<s>", "</s>"]


def test_the_command_prints_what_it_built_and_what_it_costs(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--{name}={parts / name}" for name in ("vision", "language")]
    arguments += [f"--out={tmp_path / 'a'}", "--queries=3", "--layers=1", "--width=20"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["combine", *arguments, "--heads=4", "--feed-forward=10", "--debug"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    total = sum(p.numel() for p in InstructBlip.from_pretrained(tmp_path / "a").parameters())
    assert f"{total:,}" in printed
    for text in ("3 tokens", "4 heads", "10 inside", "llama", "RMS", "MiB", "GiB", "<|end|> text"):
        assert text in printed, printed
