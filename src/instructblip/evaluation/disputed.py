"""Published scores that others did not reproduce, each with the settings that may explain it.

The table is ``disputed.yaml``; `instructblip reproduce` evaluates a model under all settings of an
entry.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter

from instructblip.core.example import Example
from instructblip.data.templates import render_prompt
from instructblip.evaluation.benchmarks import BENCHMARKS, Benchmark
from instructblip.evaluation.tables import PUBLISHED


@dataclass(frozen=True, slots=True, kw_only=True)
class Disputed:
    """One published score: the ``benchmark`` and the ``model`` of the paper's table, the ``thread``
    that did not reproduce it, and ``why`` in a sentence.

    ``settings`` are fields of the benchmark to change, by the name of the setting; "paper" changes
    nothing. ``reported`` in a setting is the score that the thread states for it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    benchmark: str
    model: str
    thread: str
    why: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def published(self) -> float | None:
        """The score in the paper, 0 to 100 (CIDEr may exceed it); None where it has none."""
        return PUBLISHED[self.model].get(self.benchmark)

    def reported(self, setting: str) -> float | None:
        """The score of a setting in the thread."""
        return self.settings[setting].get("reported")

    def variants(self) -> dict[str, Benchmark]:
        """The benchmark under each setting."""
        frozen = BENCHMARKS[self.benchmark]
        return {
            name: replace(frozen, **{k: v for k, v in changes.items() if k != "reported"})
            for name, changes in self.settings.items()
        }


def without_ocr_tokens(example: Example) -> str:
    """A prompt that asks the question alone, without the words that OCR detected."""
    template = "Question: {question} Short answer:"
    return render_prompt(replace(example, ocr_tokens=()), template).prompt


def without_context(example: Example) -> str:
    """A prompt with question and options, without the context."""
    template = "Question: {question} Options: {options}. Answer:"
    return render_prompt(replace(example, context=""), template).prompt


def _read() -> dict[str, Disputed]:
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    adapter = TypeAdapter(Disputed)
    return {name: adapter.validate_python(row) for name, row in rows.items()}


DISPUTED: dict[str, Disputed] = _read()
