"""The ids of instruction, prompt and response for each kind of tokenizer."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from instructblip.data.templates import Rendered
from instructblip.data.tokens import Tokens
from tests.testing import byte_level, llama_like, t5_like, wordpiece

PROMPT = "Question: what? Short answer:"
STYLES = {"llama": llama_like, "bytes": byte_level}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("response", ["red", "a red cat.", "42", "red red"])
def test_prompt_and_response_ids_decode_to_one_text(style: str, response: str) -> None:
    tokens = Tokens(language=STYLES[style]())
    _, prompt_ids, response_ids, _ = tokens.tokenize(Rendered(PROMPT, PROMPT, response))
    if style == "bytes" or "42" not in response:
        assert tokens.decode(prompt_ids + response_ids) == f"{PROMPT} {response}"
        assert tokens.decode(response_ids) == response
    # The ids equal those of the whole text.
    whole = tokens.prompt(f"{PROMPT} {response}")
    assert prompt_ids + response_ids == [*whole, tokens.eos_id]


def test_special_tokens_of_a_decoder() -> None:
    tokens = Tokens(language=llama_like())
    _, prompt_ids, response_ids, _ = tokens.tokenize(Rendered(PROMPT, PROMPT, "red"))
    assert prompt_ids[0] == tokens.language.bos_token_id
    assert tokens.eos_id not in prompt_ids
    assert response_ids == [tokens.language.convert_tokens_to_ids("▁red"), tokens.eos_id]
    # A tokenizer that ends every text with an end token does not end the prompt of a decoder.
    assert tokens.eos_id not in Tokens(language=t5_like()).prompt(PROMPT)
    assert tokens.tokenize(Rendered(PROMPT, PROMPT))[2] == []


def test_special_tokens_of_an_encoder_decoder() -> None:
    tokens = Tokens(language=t5_like(), decoder_only=False)
    _, prompt_ids, response_ids, _ = tokens.tokenize(Rendered(PROMPT, PROMPT, "red"))
    assert prompt_ids[-1] == tokens.eos_id
    assert response_ids == [tokens.language.convert_tokens_to_ids("▁red"), tokens.eos_id]


def test_truncation_keeps_question_and_special_tokens() -> None:
    qformer = wordpiece()
    tokens = Tokens(llama_like(), qformer, max_instruction=6, max_prompt=5, max_response=4)
    text = "blue blue blue blue blue is red"
    instruction, prompt, response, _ = tokens.tokenize(Rendered(text, text, text))
    assert qformer.convert_ids_to_tokens(instruction) == [
        "[CLS]",
        "blue",
        "blue",
        "is",
        "red",
        "[SEP]",
    ]
    assert prompt == [1, *tokens.prompt("is red")[-4:]]
    assert len(response) == 4
    assert response[-1] == tokens.eos_id
    assert response[:3] == Tokens(llama_like()).response(text)[:3]
    encoder = Tokens(t5_like(), decoder_only=False, max_prompt=5)
    assert len(encoder.prompt(text)) == 5
    assert encoder.prompt(text)[-1] == encoder.eos_id


@pytest.mark.parametrize("make", [llama_like, byte_level])
def test_special_tokens_written_in_a_text_are_text(make: type[PreTrainedTokenizerFast]) -> None:
    tokens = Tokens(language=make(), qformer=wordpiece())
    end = tokens.language.eos_token
    text = f"is it {end} red [SEP] ?"
    instruction, prompt, response, _ = tokens.tokenize(Rendered(text, text, text))
    assert tokens.eos_id not in prompt
    assert response.count(tokens.eos_id) == 1
    assert wordpiece().convert_ids_to_tokens(instruction).count("[SEP]") == 1


@pytest.mark.parametrize("decoder_only", [True, False])
def test_save_and_load(decoder_only: bool, tmp_path: Path) -> None:
    tokens = Tokens(llama_like(), wordpiece(), decoder_only=decoder_only)
    text = {"model_type": "llama" if decoder_only else "t5"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "instructblip", "text_config": text})
    )
    tokens.save_pretrained(tmp_path)
    loaded = Tokens.from_pretrained(tmp_path, max_prompt=9)
    assert loaded.decoder_only is decoder_only
    assert loaded.max_prompt == 9
    rendered = Rendered("is it red?", "is it?", "red")
    assert loaded.tokenize(rendered) == tokens.tokenize(rendered)


def test_a_model_type_of_ours_brings_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tokens(byte_level()).save_pretrained(tmp_path)
    config = {"model_type": "instructblip-other-tower", "text_config": {"model_type": "llama"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    warned: list[str] = []
    for name in ("configuration_utils", "models.auto.tokenization_auto", "tokenization_utils_base"):
        child = logging.getLogger(f"transformers.{name}")
        monkeypatch.setattr(child, "handle", lambda record: warned.append(record.getMessage()))
    assert Tokens.from_pretrained(tmp_path).prompt("red")
    assert warned == []


def test_errors_of_loading(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model directory"):
        Tokens.from_pretrained(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "instructblip"}')
    with pytest.raises(ValueError, match=r"no tokenizer; expected one of tokenizer\.json"):
        Tokens.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer cannot be read"):
        Tokens.from_pretrained(tmp_path)
    plain = byte_level()
    plain.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        Tokens(plain)


def placed(tokens: Tokens, text: str, num_images: int) -> tuple[list[str], tuple[int, ...]]:
    """The tokens of a prompt and the places of the images."""
    texts = tokens.tokenize(Rendered(text, text), num_images)
    return tokens.language.convert_ids_to_tokens(texts.prompt_ids), texts.image_places


@pytest.mark.parametrize("style", STYLES)
def test_images_between_words(style: str) -> None:
    """The words around an image have the ids that they have behind a space."""
    tokens = Tokens(language=STYLES[style](), qformer=wordpiece())
    plain, _ = placed(tokens, "is red ? red", 0)
    start = 1 if style == "llama" else 0
    head = len(placed(tokens, "is red", 0)[0])
    middle = len(placed(tokens, "is red ?", 0)[0])
    assert start < head < middle < len(plain)
    assert placed(tokens, "is red <image> ? <image> red", 2) == (plain, (head, middle))
    assert placed(tokens, "is red <image><image> ? red", 2) == (plain, (head, head))
    assert placed(tokens, "is red ? red\n<image>", 1) == (plain, (len(plain),))
    # Without a mark, with marks at the beginning, and where there are fewer marks than images.
    assert placed(tokens, "is red ? red", 2) == (plain, ())
    assert placed(tokens, "<image>\n<image> is red ? red", 2)[1] == ()
    assert placed(tokens, "<image>is red ? red", 1) == (plain, ())
    assert placed(tokens, "is red <image> ? red", 3) == (plain, (0, 0, head))
    text = "is red <image> ? <image> red"
    aware = tokens.tokenize(Rendered(text, text), 2).qformer_ids
    assert tokens.qformer is not None
    assert tokens.qformer.convert_ids_to_tokens(aware)[1:-1] == ["is", "red", "?", "red"]


@pytest.mark.parametrize("decoder_only", [True, False])
def test_a_cut_prompt_keeps_its_images(decoder_only: bool) -> None:
    tokens = Tokens(llama_like() if decoder_only else t5_like(), decoder_only=decoder_only)
    tokens = replace(tokens, max_prompt=5)
    texts = tokens.tokenize(Rendered("", "red <image> red <image> red red red <image> red"), 3)
    start = int(decoder_only)
    assert len(texts.prompt_ids) == 5
    assert texts.image_places == (0, 0, start + 3)


def test_more_marks_than_images_are_refused() -> None:
    tokens = Tokens(llama_like())
    with pytest.raises(ValueError, match=r"2 <image> and there are 1 images; .* take 1 out"):
        tokens.tokenize(Rendered("a", "<image> or <image>?"), 1)
