"""One definition of the decoding settings, read by every way to ask a model."""

import math
from typing import Any

import pytest

from instructblip.evaluation.benchmarks import BENCHMARKS
from instructblip.model.decoding import (
    GREEDY,
    Decoding,
    allowed_values,
    check_overrides,
    merge_overrides,
    stored_overrides,
)

# What the benchmarks of 7714d80 passed to `generate` where they stated nothing.
UNSTATED = {
    "num_beams": 1,
    "max_new_tokens": 32,
    "min_new_tokens": 0,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "do_sample": False,
}


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_benchmarks_decode_as_before(benchmark: Any) -> None:
    options = GREEDY.override(**benchmark.decoding).generate_options()
    assert options == UNSTATED | dict(benchmark.decoding)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beems": 5}, "unknown decoding setting num_beems: did you mean num_beams?"),
        ({"seed": 1}, "unknown decoding setting seed: expected num_beams, max_new_tokens"),
        ({"num_beams": 0}, "num_beams must be a whole number from 1 to 100; got 0"),
        ({"num_beams": "3"}, "num_beams must be a whole number from 1 to 100; got '3'"),
        ({"max_new_tokens": 2.5}, "must be a whole number from 1 to 100000; got 2.5"),
        ({"top_p": 0}, "top_p must be a number above 0 and up to 1; got 0"),
        ({"repetition_penalty": math.nan}, "must be a number from 0.1 to 10; got nan"),
        ({"do_sample": 1}, "do_sample must be true or false; got 1"),
        ({"temperature": 0, "top_p": 0.9}, "temperature must be a number from 0.001 to 2; got 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens 9 is above max_new_tokens 3"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    for refuses in (check_overrides, lambda given: Decoding().override(**given)):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            refuses(settings)


def test_partial_settings_are_compared_with_what_they_override() -> None:
    assert check_overrides({"min_new_tokens": 300, "num_beams": None}) == {"min_new_tokens": 300}
    with pytest.raises(ValueError, match="min_new_tokens 300 is above max_new_tokens 256"):
        Decoding().override(min_new_tokens=300)
    assert Decoding(min_new_tokens=10).override(max_new_tokens=4).min_new_tokens == 4
    assert merge_overrides({"min_new_tokens": 10}, {"max_new_tokens": 4})["min_new_tokens"] == 4


def test_a_temperature_or_top_p_samples() -> None:
    assert not Decoding().override(temperature=0.0).do_sample
    for settings in ({"temperature": 0.5}, {"top_p": 0.5}):
        sampling = Decoding().override(**settings)
        assert (sampling.do_sample, sampling.num_beams) == (True, 1)
        assert Decoding().override(num_beams=3, **settings).num_beams == 3
    assert {"temperature", "top_p"} < set(sampling.generate_options())
    assert not sampling.override(temperature=0).do_sample


def test_stored_settings_sample_only_where_they_say_so() -> None:
    stored = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "num_beams": None}
    decoding = Decoding().override(**stored_overrides(stored))
    assert decoding == Decoding(temperature=0.9, top_p=0.6)
    assert stored_overrides({"do_sample": True, "temperature": 0.9})["do_sample"]
    assert stored_overrides({"max_length": 20}) == {}


def test_every_setting_says_what_it_is_and_what_it_allows() -> None:
    for name, field in Decoding.model_fields.items():
        assert (field.description or "").endswith(".")
        assert allowed_values(name)
