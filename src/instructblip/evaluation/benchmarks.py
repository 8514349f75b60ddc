"""Reads ``benchmarks.yaml``; to add a benchmark, add a row there."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter

Mode = Literal["generate", "rank", "retrieve"]
Role = Literal["held_in", "held_out", "finetuned", "objects", "retrieval", "own"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One evaluation set with everything its score depends on.

    ``source`` is a key of ``data.sources.SOURCES`` (of ``data.sets`` for the role "own"),
    ``prompt`` a template (None: the first of each example's task), ``metric`` a key of
    ``scoring.SCORERS``, and ``others`` are further ones that are reported beside it. ``mode``
    "rank" chooses the likeliest of ``candidates`` (None: the choices of the example, or with
    ``vocabulary`` the distinct answers of the training split). ``verbalizers`` are further wordings
    of a candidate, which scores as its likeliest wording (section 3.3 of the paper). ``decoding``
    has settings of ``Decoding`` above ``GREEDY``. ``mode`` "retrieve" compares all images with all
    answers, and matches the ``rerank`` most similar of each. ``unseen_type``: the instruction
    tuning has no set of this task.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    title: str
    source: str
    split: str
    prompt: str | None
    mode: Mode
    metric: str
    role: Role
    candidates: tuple[str, ...] | None = None
    verbalizers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    vocabulary: bool = False
    decoding: Mapping[str, int | float] = field(default_factory=dict)
    unseen_type: bool = False
    others: tuple[str, ...] = ()
    rerank: int = 0

    def settings(self) -> dict[str, Any]:
        """All fields as values that JSON can hold; no ``others`` and ``rerank`` where there
        are none, as in results of earlier versions."""
        absent = [name for name in ("others", "rerank") if not getattr(self, name)]
        return {name: value for name, value in asdict(self).items() if name not in absent}


def _benchmarks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Benchmark]:
    adapter = TypeAdapter(Benchmark)
    benchmarks = {}
    for name, row in rows.items():
        mode = "generate" if "decoding" in row else "retrieve" if "rerank" in row else "rank"
        derived = {"name": name, "source": name.removeprefix("scenes_"), "mode": mode}
        benchmarks[name] = adapter.validate_python({**derived, **row})
    return benchmarks


_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

BENCHMARKS: dict[str, Benchmark] = _benchmarks(_FILE["benchmarks"])
OWNERS: dict[str, str] = _FILE["owners"]
"""Source of a benchmark -> the page where its owner offers the data. Nothing is downloaded."""

GROUPS = (
    *("held_in", "held_out", "finetuned", "objects", "retrieval"),
    *("scenes", "scenes_held_in", "scenes_held_out", "scenes_objects", "scenes_retrieval", "own"),
)


def select_benchmarks(
    names: Iterable[str], own: Mapping[str, Benchmark] = MappingProxyType({})
) -> list[Benchmark]:
    """Return the benchmarks called ``names``, each once; the name of a group means its members.

    Groups: "held_in", "held_out" and "finetuned" (the paper's), "objects" (which answers invent),
    "retrieval" (which needs heads), "scenes", "scenes_held_in", "scenes_held_out",
    "scenes_objects", "scenes_retrieval", and "own" for those of the recipe, which are ``own`` by
    name. "scenes" is without "scenes_objects", whose images and questions are its own, and without
    "scenes_retrieval". Raises ValueError with the nearest names for an unknown one.
    """
    known, chosen = {**BENCHMARKS, **own}, dict[str, Benchmark]()
    for name in names:
        members = [b for b in known.values() if name in (b.name, *groups_of(b.name, b.role))]
        if not members:
            near = get_close_matches(name, [*known, *GROUPS], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no benchmark or group '{name}'{hint} Groups: {', '.join(GROUPS)}")
        chosen |= {b.name: b for b in members}
    return list(chosen.values())


def groups_of(name: str, role: str) -> tuple[str, ...]:
    """Return the groups that the benchmark ``name`` belongs to."""
    scenes = name.startswith("scenes_") and role != "own"
    if not scenes:
        return (role,)
    apart = role in ("objects", "retrieval")
    return (f"scenes_{role}",) if apart else ("scenes", f"scenes_{role}")
