"""Samples with different numbers of images: what stands beside a sample changes no result."""

from collections.abc import Callable

import pytest
import torch

from instructblip.core.batch import Batch, Sample
from instructblip.data.samples import collate
from instructblip.model.decoding import GREEDY
from instructblip.model.inference import cross_attention, generate_responses, rank_candidates
from instructblip.model.instructblip import InstructBlip
from tests.model.test_language import TEXT_CONFIGS, tiny_model

IMAGES = ("a", "bca", "db", "aa")
"""A letter is an image; the third sample shares one with the second."""

Make = Callable[..., Batch]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=list(TEXT_CONFIGS))
def model(request: pytest.FixtureRequest) -> InstructBlip:
    return tiny_model(request.param)


@pytest.fixture(params=["pixels", "features"])
def make(request: pytest.FixtureRequest, model: InstructBlip) -> Make:
    """The batch of the samples with the given numbers."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    images = model.encode_image(pixels) if request.param == "features" else pixels
    samples = []
    for number, keys in enumerate(IMAGES):
        shown = tuple(images["abcd".index(key)] for key in keys)
        ids = torch.randint(4, 30, (3, 6), generator=generator).tolist()
        texts = [row[: 2 + (number * step) % 5] for row, step in zip(ids, (1, 2, 3), strict=True)]
        texts = dict(zip(("qformer_ids", "prompt_ids", "response_ids"), texts, strict=True))
        samples.append(Sample(image_keys=tuple(keys), **{request.param: shown}, **texts))
    return lambda *numbers: collate([samples[i] for i in numbers or range(len(samples))])


def losses_and_gradients(model: InstructBlip, batches: list[Batch]) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    outputs = [model.loss(batch) for batch in batches]
    torch.stack([output.loss_sum for output in outputs]).sum().backward()
    gradients = {name: p.grad for name, p in model.trainable_parameters() if p.grad is not None}
    return torch.cat([output.sample_losses for output in outputs]), gradients


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[0, 1], [2, 3]]])
def test_any_micro_batch_gives_the_same_loss_and_gradients(
    model: InstructBlip, make: Make, parts: list[list[int]]
):
    model.set_trainable(("qformer", "projection"))
    losses, gradients = losses_and_gradients(model, [make()])
    expected, expected_gradients = losses_and_gradients(model, [make(*part) for part in parts])
    close(losses, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert gradients["query_tokens"].abs().max() > 1e-4
    for name, value in gradients.items():  # sums in another order: rounding is that of the largest
        other = expected_gradients[name]
        assert (value - other).norm() <= 1e-5 * other.norm() + 1e-6, name


def test_answers_and_scores_are_those_of_each_sample_alone(model: InstructBlip, make: Make):
    whole, candidates = make(), [[5, 6, 7, 2], [5, 6, 2], [9, 2]]
    scores = rank_candidates(model, whole, [candidates] * len(whole))
    greedy, beams = ({"max_new_tokens": 5}, {"max_new_tokens": 5, "num_beams": 3})
    answers = [
        generate_responses(model, whole, None, GREEDY.override(**o)) for o in (greedy, beams)
    ]
    for number in range(len(whole)):
        alone = make(number)
        close(scores[number], rank_candidates(model, alone, [candidates])[0])
        for rows, options in zip(answers, (greedy, beams), strict=True):
            expected = generate_responses(model, alone, None, GREEDY.override(**options))
            assert rows[number] == expected[0]


def test_attention_to_absent_images_is_zero(make: Make, model: InstructBlip):
    weights = cross_attention(model, make())
    for number, keys in enumerate(IMAGES):
        close(weights[number, : len(keys)], cross_attention(model, make(number))[0])
        assert not weights[number, len(keys) :].any()
