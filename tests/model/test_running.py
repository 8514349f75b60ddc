"""Responses that start and end at different steps are those of their samples alone."""

import pytest
import torch

from instructblip.model.decoding import GREEDY
from instructblip.model.inference import generate_responses, read_prompts
from instructblip.model.language.running import Response, Running
from tests.model.test_language import single, tiny_model
from tests.parity.tiny import tiny_batch

SETTINGS = [
    {"max_new_tokens": 9},
    {"max_new_tokens": 2},
    {"max_new_tokens": 12, "min_new_tokens": 12},
    {"max_new_tokens": 7, "repetition_penalty": 3.0, "min_new_tokens": 3},
    {"max_new_tokens": 1},
    {"max_new_tokens": 8, "temperature": 1.3},
    {"max_new_tokens": 6, "temperature": 2.0, "top_p": 0.6, "min_new_tokens": 6},
]
ENDS = [2, 7, 1000]
"""The last one is no token of the model."""


@pytest.mark.parametrize(
    ("language", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("opt", "sdpa"), ("gpt2", "sdpa"), ("qwen2", "sdpa")],
)
def test_responses_join_and_leave_without_changing_others(language: str, attention: str) -> None:
    model = tiny_model(language)
    with torch.no_grad():
        model.language_projection.weight.mul_(10)
        model.language_model.get_input_embeddings().weight.mul_(5)
    batch = tiny_batch(model.config)
    assert model.language.reads_trees
    model.language_model.set_attn_implementation(attention)
    asked, expected = [], []
    for number, settings in enumerate(SETTINGS * 3):
        decoding = GREEDY.override(**settings)
        alone = single(batch, number % len(batch))
        torch.manual_seed(number)
        expected += generate_responses(model, alone, None, decoding, ENDS)
        asked.append((read_prompts(model, alone)[0], Response(decoding, ENDS, seed=number)))
    assert len({tuple(ids) for ids in expected}) > 10
    running, waiting, sizes = Running(model.language), list(asked), []
    while waiting or not all(response.ended for _, response in asked):
        if waiting and len(running) < 5:  # one or two at a time
            some, waiting = waiting[: 1 + len(waiting) % 2], waiting[1 + len(waiting) % 2 :]
            running.start(*zip(*some, strict=True))
        running.step()
        sizes.append(len(running))
    assert max(sizes) >= 4
    assert [response.ids for _, response in asked] == expected
    running.step()
    assert not running._layers, "an idle decoder keeps no memory"


def test_a_response_ends_when_its_reader_says() -> None:
    model = tiny_model("llama")
    batch = tiny_batch(model.config)
    decoding = GREEDY.override(max_new_tokens=6, min_new_tokens=6)
    expected = generate_responses(model, batch, None, decoding, ENDS)
    responses = [Response(decoding, ENDS) for _ in expected]
    running = Running(model.language)
    running.start(read_prompts(model, batch), responses)
    running.step()
    responses[0].ended = True
    for _ in range(4):
        running.step()
    assert [response.ids for response in responses] == [expected[0][:2], *expected[1:]]
