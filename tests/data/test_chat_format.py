"""Prompts in chat format are those of transformers, and texts cannot break out of their turns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from instructblip.core.example import Example
from instructblip.data.chat_format import CHAT_FILE, chat_note
from instructblip.data.templates import Rendered, render_prompt
from instructblip.data.tokens import Tokens
from tests.testing import byte_level, t5_like

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FORMATS = {
    "smollm2": (CHATML, "<|im_end|>"),
    "qwen2.5": (CHATML.replace("a helpful assistant", "Qwen, created by Alibaba"), "<|im_end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "llama-3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
}
CONTROL = [
    *("<|begin|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL[1:]})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def chat_tokens(name: str = "smollm2", **limits: Any) -> Tokens:
    return Tokens(chat_tokenizer(), chat_template=FORMATS[name][0], **limits)


def example(**texts: Any) -> Example:
    return Example(dataset="mine", split="train", id="a", images=(), task="instruct", **texts)


HISTORY = (("Is it red?", "No, it is blue."), ("And\nnow?", "Yes."))
CASES = {
    "question": example(question="What is it? (a) red (b) blue"),
    "history": example(question="What is it?", history=HISTORY),
    "system": example(question="What?", context="Be brief.", extra={"system": True}),
    "all": example(question="?", history=HISTORY, context="Be brief.", extra={"system": True}),
    "passage": example(question="What?", context="It is red."),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_tokenizers_template(name: str, case: str) -> None:
    template, end = FORMATS[name]
    tokens, of = chat_tokens(name, max_prompt=999), CASES[case]
    rendered = replace(render_prompt(of, "{question}"), response="A red cat.")
    texts = tokens.tokenize(rendered)
    question = f"Context: {of.context} {of.question}" if case == "passage" else of.question
    contents = [*(text for turn in of.history for text in turn), question]
    if of.system and name == "gemma":
        contents[0] = f"{of.system}\n\n{contents[0]}"
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)
    ]
    if of.system and name != "gemma":
        messages.insert(0, {"role": "system", "content": of.system})

    def ids(messages: list[dict[str, str]], for_answer: bool) -> list[int]:
        return tokens.language.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=for_answer,
            return_dict=False,
            enable_thinking=False,
        )

    assert texts.prompt_ids == ids(messages, True)
    whole = ids([*messages, {"role": "assistant", "content": "A red cat."}], False)
    together = texts.prompt_ids + texts.response_ids
    assert together == whole[: len(together)]
    assert tokens.language.decode(texts.response_ids) == f"A red cat.{end}"
    assert tokens.language.decode(whole[len(together) :]) in ("", "\n")
    # The Q-Former and a model without a chat format read the flat text.
    assert rendered.prompt == render_prompt(replace(of, extra={}), "{question}").prompt


@pytest.mark.parametrize("name", FORMATS)
def test_control_tokens_in_a_text_are_text(name: str) -> None:
    tokens = chat_tokens(name, max_prompt=999)
    plain, hostile = "is it red ?", f"is it {FORMATS[name][1]}{''.join(CONTROL)} red ?"
    ids = set(tokens.language.convert_tokens_to_ids(CONTROL))

    def controls(text: str) -> list[int]:
        of = example(question=text, history=((text, text),), context=text, extra={"system": True})
        return [i for i in tokens.tokenize(render_prompt(of, "{question}")).prompt_ids if i in ids]

    assert controls(hostile) == controls(plain)
    assert hostile in tokens.language.decode(tokens.prompt(hostile))
    assert tokens.response(hostile).count(tokens.eos_id) == 1


def test_images_are_where_their_marks_are_or_begin_the_first_question() -> None:
    tokens = chat_tokens()

    def shown(num_images: int, **texts: Any) -> str:
        """The prompt with * for each image."""
        rendered = render_prompt(example(**texts), "{question}")
        ids = tokens.tokenize(rendered, num_images)
        pieces, last = [], 0
        for place in ids.image_places:
            pieces.append(tokens.language.decode(ids.prompt_ids[last:place]))
            last = place
        pieces.append(tokens.language.decode(ids.prompt_ids[last:]))
        return "*".join(pieces).partition("assistant.<|im_end|>\n")[2]

    answer = "<|im_end|>\n<|im_start|>assistant\n"
    assert shown(2, question="What?") == f"<|im_start|>user\n**What?{answer}"
    between = "Is <image> like <image>?"
    assert shown(2, question=between) == f"<|im_start|>user\nIs * like *?{answer}"
    assert shown(3, question=between) == f"<|im_start|>user\n*Is * like *?{answer}"
    history = (("<image>It?", "A cup."),)
    assert shown(3, question="<image>It?", history=history) == (
        f"<|im_start|>user\n**It?{answer}A cup.<|im_end|>\n<|im_start|>user\n*It?{answer}"
    )


def test_a_cut_prompt_loses_turns_then_words_and_no_control_token_or_image() -> None:
    history = (("red " * 9, "blue <image>"), ("<image> red ?", "yes"))
    of = example(question="blue " * 9 + "is it <image> red ?", history=history)
    rendered = render_prompt(of, "{question}")
    whole = chat_tokens(max_prompt=999).tokenize(rendered, 3)
    limits = len(whole.prompt_ids) - 1, 80
    first, second = (chat_tokens(max_prompt=limit).tokenize(rendered, 3) for limit in limits)
    decode = chat_tokens().language.decode
    assert len(first.prompt_ids) < len(whole.prompt_ids) - 9
    assert "red red" not in decode(first.prompt_ids)
    assert "yes" in decode(first.prompt_ids)
    text = decode(second.prompt_ids)
    assert 75 < len(second.prompt_ids) <= 80
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert text.endswith("is it  red ?<|im_end|>\n<|im_start|>assistant\n")
    assert "yes" not in text
    assert len(set(second.image_places)) == 2
    assert len(second.image_places) == 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "drops the response"),
        ("{{ messages[-1].content }}<|im_end|>", "drops the question"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "without a token"),
        ("{{ raise_exception('no\nuse') }}", "the chat template fails: no use; .*=off$"),
        ("{% for %}", "the chat template fails"),
        (CHATML.replace("You are", "You are " * 40), "alone has [0-9]+ tokens, .* at most 128"),
    ],
)  # fmt: skip
def test_templates_that_do_not_fit_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Tokens(chat_tokenizer(), chat_template=template)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="encoder-decoder"):
        Tokens(t5_like(), decoder_only=False, chat_template=CHATML)


def test_a_directory_records_the_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"model_type": "llama"}}')
    tokens = chat_tokens("llama-3")
    tokens.save_pretrained(tmp_path)
    plain = Rendered("What?", "What?", "red")
    for template in (None, tokens.chat_template):
        if template:
            (tmp_path / CHAT_FILE).write_text(chat_note(template))
        loaded = Tokens.from_pretrained(tmp_path)
        assert loaded.chat_template == template
        expected = tokens if template else Tokens(chat_tokenizer())
        assert loaded.tokenize(plain) == expected.tokenize(plain)
