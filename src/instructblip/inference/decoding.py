"""Settings of decoding: their names, and how the official code sets them."""

import inspect
from collections.abc import Mapping
from typing import Any

from instructblip.model.inference import generate_responses

LEAST_TEMPERATURE = 1e-3
"""Below it drawing is no different from searching, and logits divided by it overflow."""

DECODING = tuple(inspect.signature(generate_responses).parameters)[3:]
"""Names of the decoding settings: those of ``generate_responses``."""

PAPER_DECODING: dict[str, Any] = {
    "num_beams": 5,
    "max_new_tokens": 256,
    "min_new_tokens": 1,
    "length_penalty": 1.0,
    "repetition_penalty": 1.5,
}
"""How the official code answers an instruction unless told otherwise (``generate`` of LAVIS)."""


RANGES: dict[str, tuple[float, float]] = {
    "num_beams": (1, 100),
    "max_new_tokens": (1, 100_000),
    "min_new_tokens": (0, 100_000),
    "length_penalty": (-100, 100),
    "repetition_penalty": (0.01, 100),
    "temperature": (LEAST_TEMPERATURE, 100),
    "top_p": (0, 1),
}
COUNTS = ("num_beams", "max_new_tokens", "min_new_tokens")


def check_decoding(settings: Mapping[str, Any]) -> None:
    """ValueError for a setting that ``generate_responses`` does not know, or not in its range. None
    is no setting, and the temperature counts only where there is sampling."""
    unknown = sorted(set(settings) - set(DECODING))
    if unknown:
        raise ValueError(
            f"unknown decoding setting {', '.join(unknown)}; expected {', '.join(DECODING)}"
        )
    for name, (low, high) in RANGES.items():
        value = settings.get(name)
        unused = name == "temperature" and value == 0 and not settings.get("do_sample")
        if value is None or unused:
            continue
        if name in COUNTS and isinstance(value, float):
            raise ValueError(f"{name} must be a whole number; got {value!r}")
        if not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{name} must be {low:g} to {high:g}; got {value!r}")
    least, most = settings.get("min_new_tokens"), settings.get("max_new_tokens")
    if least is not None and most is not None and least > most:
        raise ValueError(f"min_new_tokens {least} is above max_new_tokens {most}: lower it")
