"""Images between the words of a prompt: the language model reads the queries at their places."""

from dataclasses import replace

import pytest
import torch

from instructblip.core.batch import Batch, Sample
from instructblip.data.samples import collate
from instructblip.model.decoding import GREEDY
from instructblip.model.inference import generate_responses, rank_candidates
from instructblip.model.instructblip import InstructBlip
from tests.model.test_language import tiny_model

PROMPTS = ([5, 6, 7, 8], [9, 10], [11, 12, 13])
RESPONSES = ([14, 15, 2], [16, 2], [17, 18, 19, 2])
IMAGES = ("ab", "c", "bab")
PLACES = ((1, 3), (2,), (0, 1, 1))
"""Number of prompt ids in front of each image."""


def make(*numbers: int, places: tuple[tuple[int, ...], ...] = PLACES) -> Batch:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return collate(
        [
            Sample(
                image_keys=tuple(IMAGES[i]),
                pixels=tuple(pixels["abc".index(key)] for key in IMAGES[i]),
                qformer_ids=[4, 5 + i, 6],
                prompt_ids=PROMPTS[i],
                response_ids=RESPONSES[i],
                image_places=places[i],
            )
            for i in numbers or range(3)
        ]
    )


def mixed_embeds(model: InstructBlip, number: int, response: list[int]) -> torch.Tensor:
    """[1, X, L]: prompt and queries of one sample in their order, put together by hand."""
    embed = model.language_model.get_input_embeddings()
    images = model.encode_queries(make(number))[0].unflatten(0, (len(IMAGES[number]), -1))
    pieces, read = [], 0
    for place, queries in zip(PLACES[number], images, strict=True):
        pieces += [embed(torch.tensor(PROMPTS[number][read:place], dtype=torch.long)), queries]
        read = place
    rest = PROMPTS[number][read:] + response
    return torch.cat([*pieces, embed(torch.tensor(rest, dtype=torch.long))])[None]


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_loss_answers_and_scores_are_transformers_of_the_mixed_row(language: str) -> None:
    model = tiny_model(language).requires_grad_(False)
    batch, raw = make(), model.language_model
    packed = model.loss(batch).sample_losses
    candidates = [[14, 15, 2], [14, 16, 2]]
    scores = rank_candidates(model, batch, [candidates] * 3)
    decoding = {"max_new_tokens": 4}
    answers = generate_responses(model, batch, None, GREEDY.override(**decoding))
    beams = generate_responses(model, batch, None, GREEDY.override(num_beams=2, **decoding))
    for i, response in enumerate(RESPONSES):
        encoder = language == "t5"
        row = mixed_embeds(model, i, [] if encoder else response)
        labels = torch.tensor([response])
        if not encoder:
            ignored = torch.full((1, row.shape[1] - len(response)), -100)
            labels = torch.cat([ignored, labels], dim=1)
        expected = raw(inputs_embeds=row, labels=labels).loss * len(response)
        torch.testing.assert_close(packed[i], expected, rtol=1e-4, atol=1e-4)
        prompt = mixed_embeds(model, i, [])
        for rows, num_beams in ((answers, 1), (beams, 2)):
            alone = raw.generate(
                inputs_embeds=prompt, do_sample=False, num_beams=num_beams, **decoding
            )[0].tolist()
            alone = alone[1:] if encoder else alone
            assert rows[i] == alone[: alone.index(2)] if 2 in alone else alone
        ranked = model.loss(replace_response(make(i), candidates[1])).sample_losses
        torch.testing.assert_close(scores[i][1], -ranked[0], rtol=1e-4, atol=1e-4)
    raw.set_attn_implementation("sdpa")
    torch.testing.assert_close(model.loss(batch).sample_losses, packed, rtol=1e-5, atol=1e-5)


def replace_response(batch: Batch, ids: list[int]) -> Batch:
    row = torch.tensor([ids])
    return replace(batch, response_ids=row, response_mask=torch.ones_like(row))


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_images_in_front_are_bit_equal_to_a_batch_without_places(language: str) -> None:
    model = tiny_model(language)
    front = ((), (), ())
    batch = make(places=front)
    assert batch.image_places is None
    beside = make(places=(*front[:2], PLACES[2]))
    assert beside.image_places is not None
    queries = model.encode_queries(batch)
    plain, mixed = model.language.join(queries, batch), model.language.join(queries, beside)
    first = 2 * 3 + len(PROMPTS[0])
    assert torch.equal(plain.inputs_embeds[0, :first], mixed.inputs_embeds[0, :first])
    losses = model.loss(batch).sample_losses
    assert torch.equal(losses[:2], model.loss(beside).sample_losses[:2])
    assert losses[2] != model.loss(beside).sample_losses[2]
