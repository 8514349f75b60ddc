"""One benchmark: which examples, asked how, answered how, scored by what."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Mode = Literal["generate", "rank"]
Role = Literal["held_in", "held_out", "finetuned"]
Decoding = Mapping[str, int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One evaluation set with everything its figure depends on.

    ``source`` is a key of ``data.sources.SOURCES``; ``prompt`` a template with its places.
    ``mode`` "rank" chooses among ``candidates`` by log-likelihood (None: the example's choices,
    or with ``vocabulary`` the distinct answers of the training split). ``verbalizers`` are further
    wordings of a candidate: it is worth as much as its best wording (section 3.3).
    ``unseen_type``: no data set of this task was in the instruction tuning.
    """

    name: str
    title: str
    source: str
    split: str
    prompt: str
    mode: Mode
    metric: str
    role: Role
    candidates: tuple[str, ...] | None = None
    verbalizers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    vocabulary: bool = False
    decoding: Decoding = field(default_factory=dict)
    unseen_type: bool = False

    def settings(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)
