"""Damaged and hostile files of a model directory: one line that says what is wrong, at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.images import ImageTransform
from instructblip.data.tokens import Tokens
from instructblip.model.checkpoints.directory import model_directory, read_config
from instructblip.model.language.adapters import build_language_model, num_words

DEEP = {"a deep list": b"[" * 10_000, "a deep object": b'{"a":' * 10_000}
ANY = DEEP | {"a list": b"[]", "null": b"null", "binary": b"\xff\xfe\0", "nothing": b""}


def read(folder: Path) -> None:
    """What every command that uses a model reads before its weights."""
    config = read_config(folder)
    words = num_words(config.language)
    Tokens.from_pretrained(folder).check_rows(words, config.qformer.vocab_size)
    ImageTransform.from_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The starter without its weights."""
    folder = tmp_path / "model"
    skipped = shutil.ignore_patterns("*.safetensors", "text_to_image")
    shutil.copytree(model_directory("starter"), folder, ignore=skipped)
    read(folder)
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_format.json",
        "qformer_tokenizer/tokenizer.json",
    ],
)
def test_files_that_are_no_object(folder: Path, file: str) -> None:
    path = folder / file
    whole = path.read_bytes() if path.is_file() else b'{"chat_template": null}'
    for what, content in {**ANY, "half": whole[: len(whole) // 2]}.items():
        path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            read(folder)
        message = str(raised.value)
        assert Path(file).parent.name in message or Path(file).name in message, what
        assert "\n" not in message, what
        assert len(message) < 600, what


def set_text(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["text_config"].update(changes)


def set_top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


def set_vocabulary(vocab: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["model"].update(vocab=vocab)


WORDS = {f"zz{i}": 90_000 + i for i in range(9)}
WRONG = [
    ("config.json", set_top(text_config=[1]), "text_config is '.1.'; expected an object"),
    ("config.json", set_top(vision_config=3), "vision_config is '3'; expected an object"),
    ("config.json", set_top(qformer_config="x"), "qformer_config is 'x'; expected an object"),
    ("config.json", set_text(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; exp"),
    ("config.json", set_text(hidden_size=10**12), "hidden_size is 1000000000000; expected"),
    ("config.json", set_top(num_query_tokens=10**9), "num_query_tokens"),
    ("config.json", set_text(model_type="\x1b[2J"), "language model|language config"),
    ("config.json", set_text(num_hidden_layers="many"), "language model|language config"),
    ("tokenizer.json", lambda t: t.pop("model"), "Model missing"),
    ("tokenizer.json", set_vocabulary([1, 2]), "the tokenizer cannot be read"),
    ("tokenizer.json", set_vocabulary({"a": "b"}), "the tokenizer cannot be read"),
    ("tokenizer.json", lambda t: t["model"]["vocab"].update(WORDS), "has the id 90008, and its"),
    ("tokenizer_config.json", set_top(eos_token=5), "the tokenizer cannot be read"),
    ("tokenizer_config.json", set_top(model_max_length="x"), "the tokenizer cannot be read"),
    ("chat_format.json", set_top(chat_template=5), "chat_template is 5; expected|'5'; expected"),
    ("preprocessor_config.json", set_top(size={"height": 10**6}), "expected height and width of"),
    ("preprocessor_config.json", set_top(image_std=[float("nan")] * 3), "expected three numbers"),
    ("preprocessor_config.json", set_top(image_mean=["a"] * 3), "expected three numbers"),
]


@pytest.mark.parametrize(("file", "change", "message"), WRONG)
def test_values_that_no_model_has(folder: Path, file: str, change: Any, message: str) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_a_language_model_without_heads(folder: Path) -> None:
    language = read_config(folder).language | {"num_attention_heads": 0}
    with pytest.raises(ValueError, match="language"):
        build_language_model(language)


def test_a_key_that_is_there_twice(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text('{"model_type": "blip-2",' + path.read_text().lstrip()[1:])
    with pytest.raises(ValueError, match=r"config\.json .* the key 'model_type' is there twice"):
        read(folder)
