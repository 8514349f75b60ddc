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


def check_decoding(settings: Mapping[str, Any]) -> None:
    """ValueError for a setting that ``generate_responses`` does not know."""
    unknown = sorted(set(settings) - set(DECODING))
    if unknown:
        raise ValueError(
            f"unknown decoding setting {', '.join(unknown)}; expected {', '.join(DECODING)}"
        )
