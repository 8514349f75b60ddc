"""The schedule's values and the two groups of AdamW."""

import pytest
from pydantic import ValidationError
from torch import nn

from instructblip.training.config import TrainingConfig
from instructblip.training.optim import learning_rate, make_optimizer, trainable_parameters
from tests.training.toy import Toy, toy_config


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-8),
        (1, 1e-8 + (1e-5 - 1e-8) / 1000),
        (500, (1e-5 + 1e-8) / 2),
        (1000, 1e-5),
        (1000 + 59_000 // 4, 1e-5 * 0.8535533905932737),
        (1000 + 59_000 // 2, 5e-6),
        (60_000, 0.0),
    ],
)
def test_the_papers_schedule(step: int, rate: float):
    """Linear from 1e-8 to 1e-5 in 1,000 steps, then half a cosine to 0 at step 60,000."""
    assert learning_rate(step, TrainingConfig()) == pytest.approx(rate, rel=1e-9, abs=1e-20)


def test_the_cosine_moves_at_every_step():
    """The official code's is a staircase with one tread per epoch."""
    config = toy_config(min_learning_rate=0.001)
    rates = [learning_rate(step, config) for step in range(config.steps + 1)]
    assert len(set(rates)) == len(rates)
    assert max(rates) == rates[config.warmup_steps] == config.learning_rate
    assert rates[-1] == pytest.approx(0.001)


def test_a_warmup_that_does_not_fit_is_a_tenth_of_the_run():
    short = toy_config(warmup_steps=1000, steps=200)
    fitting = toy_config(warmup_steps=20, steps=200)
    assert (short.warmup_steps, short.warmup, fitting.warmup) == (1000, 20, 20)
    rates, expected = (
        [learning_rate(step, each) for step in range(200)] for each in (short, fitting)
    )
    assert rates == expected
    assert learning_rate(0, toy_config(warmup_steps=1, steps=1)) == 0.02
    assert toy_config(warmup_steps=199, steps=200).warmup == 199


def test_no_warmup_starts_at_the_top():
    assert learning_rate(0, toy_config(warmup_steps=0)) == 0.02


def test_weight_decay_groups():
    """Matrices and query tokens decay; biases and norms do not; what is frozen is in neither."""
    model = Toy()
    parameters = trainable_parameters(model)
    names = {id(p): name for name, p in parameters.items()}
    optimizer = make_optimizer(model, TrainingConfig())
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }
    assert groups == {
        0.05: {"query_tokens", "words.weight", "hidden.weight", "head.weight"},
        0.0: {"hidden.bias", "norm.weight", "norm.bias", "head.bias"},
    }
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


def test_nothing_to_train_is_an_error():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="selects no parameter"):
        make_optimizer(model, TrainingConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "greater than 0"),
        ({"accumulate": 3}, "does not divide"),
        ({"early_stopping_patience": 2, "validate_every": None}, "set validate_every"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"learning_rat": 1}, "Extra inputs"),
        ({"precision": "fp16"}, "fp32"),
        ({"min_learning_rate": 1.0}, "above learning_rate"),
    ],
)
def test_config_ranges(change: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        toy_config(**change)


def test_micro_batches_over_ranks():
    config = toy_config(batch_size=24, accumulate=3)
    assert config.micro_batch_size(4) == 2
    with pytest.raises(ValueError, match="choose a multiple of 15"):
        config.micro_batch_size(5)


def test_the_earlier_name_of_replicate_is_accepted():
    assert TrainingConfig().parallel == "replicate"
    assert TrainingConfig.model_validate({"parallel": "ddp"}) == TrainingConfig()
    with pytest.raises(ValidationError, match="replicate"):
        TrainingConfig.model_validate({"parallel": "dp"})
