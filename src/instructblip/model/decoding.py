"""The settings of decoding: names, ranges and defaults, each of them defined here and nowhere else.

The command line, the Python API, the HTTP server, the benchmarks and the recipe read this module.
Settings are layered: the paper's defaults, the model directory's ``generation_config.json``, what
the caller gives. Benchmarks start from ``GREEDY`` instead, so that a score depends on nothing but
the benchmark.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MIN_TEMPERATURE = 1e-3
"""Sampling at a lower temperature equals searching, and logits divided by it overflow."""
MAX_TEMPERATURE = 2.0
MAX_TOKENS = 100_000

NumBeams = Annotated[int, Field(ge=1, le=100, description="Beams of the search; 1 is greedy.")]
MaxNewTokens = Annotated[
    int, Field(ge=1, le=MAX_TOKENS, description="Maximum number of tokens of an answer.")
]
MinNewTokens = Annotated[
    int, Field(ge=0, le=MAX_TOKENS, description="Minimum number of tokens of an answer.")
]
LengthPenalty = Annotated[
    float,
    Field(ge=-10, le=10, description="Above 0 beams favor long answers, below 0 short ones."),
]
RepetitionPenalty = Annotated[
    float, Field(ge=0.1, le=10, description="Above 1 the answer repeats less.")
]
Temperature = Annotated[
    float,
    Field(
        ge=MIN_TEMPERATURE,
        le=MAX_TEMPERATURE,
        description="Temperature of sampling; 0 searches instead.",
    ),
]
TopP = Annotated[
    float, Field(gt=0, le=1, description="Share of the likeliest tokens to sample from.")
]


class Decoding(BaseModel):
    """Complete settings of generation. The defaults are those of the paper's official code
    (``generate`` of LAVIS)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    num_beams: NumBeams = 5
    max_new_tokens: MaxNewTokens = 256
    min_new_tokens: MinNewTokens = 1
    length_penalty: LengthPenalty = 1.0
    repetition_penalty: RepetitionPenalty = 1.5
    do_sample: bool = Field(default=False, description="Whether to sample; otherwise search.")
    temperature: Temperature = 1.0
    top_p: TopP = 1.0

    @model_validator(mode="after")
    def _check_lengths(self) -> "Decoding":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                f"{self.max_new_tokens}: lower it"
            )
        return self

    def override(self, **settings: Any) -> "Decoding":
        """These settings below the given ones. See ``merge_overrides``."""
        return _validate(merge_overrides(self.model_dump(), settings))

    def generate_options(self) -> dict[str, Any]:
        """Keyword arguments of transformers' ``generate``."""
        return self.model_dump(exclude=None if self.do_sample else {"temperature", "top_p"})


PAPER = Decoding()
"""The defaults."""
GREEDY = Decoding(num_beams=1, max_new_tokens=32, min_new_tokens=0, repetition_penalty=1.0)
"""Plain greedy search, below the settings that a benchmark states."""


def check_overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns partial settings, checked, without those that are None.

    A temperature or ``top_p`` turns sampling on, with one beam unless ``num_beams`` is given; a
    temperature of 0 turns it off.

    Raises:
        ValueError: for an unknown name, naming the nearest one, and for a value out of its range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in Decoding.model_fields:
            near = get_close_matches(name, Decoding.model_fields, n=1)
            known = ", ".join(Decoding.model_fields)
            hint = f"did you mean {near[0]}?" if near else f"expected {known}"
            raise ValueError(f"unknown decoding setting {name}: {hint}")
    if given.get("do_sample", bool(given.get("temperature")) or "top_p" in given):
        given = {"num_beams": 1, "do_sample": True, **given}
    elif given.get("temperature") == 0:
        del given["temperature"]
        given["do_sample"] = False
    _validate({"min_new_tokens": 0, "max_new_tokens": MAX_TOKENS, **given})
    return given


def merge_overrides(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``base`` below the checked ``settings``. A given ``max_new_tokens`` lowers a
    ``min_new_tokens`` of ``base`` that is above it."""
    given = check_overrides(settings)
    merged = {**base, **given}
    if "max_new_tokens" in given and "min_new_tokens" in base and "min_new_tokens" not in given:
        merged["min_new_tokens"] = min(base["min_new_tokens"], given["max_new_tokens"])
    return merged


def stored_overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a ``generation_config.json`` says of decoding. As in transformers, sampling is
    off unless ``do_sample`` turns it on."""
    known = {name: value for name, value in settings.items() if name in Decoding.model_fields}
    return check_overrides({"do_sample": False, **known}) if known else {}


def allowed_values(name: str) -> str:
    """Returns the range of a setting in words, such as "a whole number from 1 to 100"."""
    field = Decoding.model_json_schema()["properties"][name]
    if field["type"] == "boolean":
        return "true or false"
    kind = "a whole number" if field["type"] == "integer" else "a number"
    low = f"from {field['minimum']:g}" if "minimum" in field else "above 0 and up"
    return f"{kind} {low} to {field['maximum']:g}"


def _validate(settings: Mapping[str, Any]) -> Decoding:
    try:
        return Decoding.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise ValueError(first["msg"].removeprefix("Value error, ")) from None
        name = str(first["loc"][0])
        raise ValueError(f"{name} must be {allowed_values(name)}; got {first['input']!r}") from None
