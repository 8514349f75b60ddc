"""Rendering fills all places, loses no part of an example and chooses one answer."""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from instructblip.core.example import Example
from instructblip.data import templates as templates_module
from instructblip.data.templates import (
    TEMPLATES,
    TEMPLATES_FILE,
    TEMPLATES_ZH,
    check_template,
    render_instruction,
    render_prompt,
    template_hash,
    templates_note,
    warn_of_other_templates,
)

EXAMPLE = Example(
    dataset="d",
    split="train",
    id="1",
    images=("a.jpg",),
    task="vqa",
    question="what colour is {it}?",
    answers=("red",) * 7 + ("blue",) * 3,
    where="f.json:record 1",
)


def test_every_task_has_ten_to_fifteen_short_templates() -> None:
    for task, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates)
        assert task == "instruct" or 10 <= len(templates) <= 15
        for template in templates:
            check_template(template)
            assert len(template.split()) <= 15
            assert "{question}" in template or task.startswith("caption")
            assert ("{options}" in template) == (task == "multiple_choice")


def test_one_answer_is_chosen_by_its_frequency() -> None:
    rng = random.Random(0)
    rendered = [render_instruction(EXAMPLE, rng) for _ in range(2000)]
    counts = Counter(r.response for r in rendered)
    assert set(counts) == {"red", "blue"}
    assert 0.65 < counts["red"] / 2000 < 0.75
    assert len({r.prompt for r in rendered}) == len(TEMPLATES["vqa"])
    assert all("{it}" in r.prompt and r.instruction == r.prompt for r in rendered)
    with pytest.raises(ValueError, match=r"f\.json:record 1: no answer"):
        render_instruction(replace(EXAMPLE, answers=()), rng)


def test_an_empty_answer_is_never_chosen() -> None:
    silent = Example(dataset="d", split="train", id="1", images=(), task="caption")
    mostly = replace(silent, answers=("",) * 8 + ("red", " "))
    assert {render_instruction(mostly, random.Random(i)).response for i in range(50)} == {"red"}
    with pytest.raises(ValueError, match="no answer to train on"):
        render_instruction(replace(silent, answers=("", " ")), random.Random(0))


def test_training_and_evaluation_render_alike() -> None:
    for template in TEMPLATES["vqa"]:
        trained = render_instruction(EXAMPLE, random.Random(0), template)
        assert render_prompt(EXAMPLE, template).prompt == trained.prompt
    assert render_prompt(EXAMPLE).prompt == "Question: what colour is {it}? Short answer:"
    assert render_prompt(EXAMPLE).response == ""


def test_parts_that_the_template_does_not_name_come_first() -> None:
    full = replace(
        EXAMPLE,
        question="and the cup?",
        context="A table.",
        ocr_tokens=("milk", "1L"),
        history=(("is it day", "yes"), ("how many cups?", "two.")),
    )
    assert render_prompt(full, "{question} Answer:").prompt == (
        "Context: A table. Words in the image: milk, 1L. Dialog history: "
        "Question: is it day Answer: yes. Question: how many cups? Answer: two. "
        "and the cup? Answer:"
    )
    custom = "OCR tokens: {ocr_tokens}. Dialog history: {history}\n{context} Question: {question}"
    assert render_prompt(full, custom).prompt.startswith(
        "OCR tokens: milk, 1L. Dialog history: Ques"
    )
    assert render_prompt(full, custom).prompt.count("A table.") == 1


def test_options_are_lettered_and_the_response_is_the_text() -> None:
    choice = replace(
        EXAMPLE,
        task="multiple_choice",
        question="which?",
        choices=("red", "blue"),
        answers=("blue",),
    )
    rendered = render_instruction(choice, random.Random(0), TEMPLATES["multiple_choice"][0])
    assert rendered.prompt == "Question: which? Options: (a) red (b) blue. Short answer:"
    assert rendered.response == "blue"


def test_llava_questions_are_the_whole_instruction() -> None:
    custom = replace(
        EXAMPLE, task="instruct", question="Describe\n\nit, please.", answers=("A. B!",)
    )
    rendered = render_instruction(custom, random.Random(0))
    assert (rendered.prompt, rendered.response) == ("Describe\n\nit, please.", "A. B!")


def test_unknown_places_and_tasks() -> None:
    with pytest.raises(ValueError, match=r"no place '\{answer\}'; expected \{question\}"):
        render_prompt(EXAMPLE, "{answer}")
    with pytest.raises(ValueError, match="no templates for task 'vqa2'"):
        render_prompt(replace(EXAMPLE, task="vqa2"))


def test_hash_follows_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    before = template_hash()
    assert before == template_hash()
    monkeypatch.setitem(templates_module.TEMPLATES, "vqa", ("{question}",))
    assert template_hash() != before


def test_chinese_templates_cover_every_task() -> None:
    assert TEMPLATES_ZH.keys() == TEMPLATES.keys()
    for task, texts in TEMPLATES_ZH.items():
        assert task == "instruct" or 10 <= len(set(texts)) == len(texts) <= 15
        for text in texts:
            assert set(re.findall(r"\{(\w+)\}", text)) == set(
                re.findall(r"\{(\w+)\}", TEMPLATES[task][0])
            )
            assert task == "instruct" or re.search("[\u4e00-\u9fff]", text)
        if task in ("vqa", "read", "dialogue"):
            assert all(re.search("简|短|几个词|一两个词|回答", text) for text in texts)


def test_chinese_parts() -> None:
    example = Example(
        dataset="d",
        split="train",
        id="1",
        images=("a.jpg",),
        task="dialogue",
        question="它在哪？",
        answers=("左边",),
        ocr_tokens=("牛奶", "1L"),
        history=(("是什么？", "猫"),),
    )
    rendered = render_instruction(example, random.Random(0), language="zh")
    assert rendered.prompt.startswith(
        "图中的文字：牛奶, 1L。 之前的对话：问题：是什么？ 回答：猫。 "
    )
    assert "它在哪？" in rendered.prompt
    assert rendered.response == "左边"


def test_a_model_with_other_templates_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warn_of_other_templates(tmp_path)  # no file, no warning
    (tmp_path / TEMPLATES_FILE).write_text(templates_note())
    warn_of_other_templates(tmp_path)
    monkeypatch.setitem(TEMPLATES, "vqa", ("{question} Now:",))
    with pytest.warns(UserWarning, match="tuned with other instruction templates"):
        warn_of_other_templates(tmp_path)
