"""Writes rendered training samples in the formats of other frameworks.

Each example gives one sample, whose template and answer are chosen at random by the seed, as in
training. The earlier turns of a dialogue are part of the prompt. Image paths of all data sets are
relative to one folder.

===========  ============================================================================
llava        ``[{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."},
             {"from": "gpt", "value": "..."}]}]``
sharegpt     the same turns, with ``"images": [...]``
messages     JSON lines of ``{"messages": [{"role": "user", "content": [{"type": "image_url",
             ...}, {"type": "text", ...}]}, {"role": "assistant", "content": "..."}]}``
parquet      columns id, images, prompt, response, question, answers
===========  ============================================================================
"""

import json
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from instructblip.core.files import replacing
from instructblip.data.order import mix
from instructblip.data.samples import Examples
from instructblip.data.templates import Language, render_instruction

Form = Literal["llava", "sharegpt", "messages", "parquet"]
"""The formats that can be written."""
_SUFFIXES = {
    "llava": ".llava.json",
    "sharegpt": ".sharegpt.json",
    "messages": ".messages.jsonl",
    "parquet": ".parquet",
}
_ROWS = 2048
_TEXTS = pa.list_(pa.string())
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", _TEXTS),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("question", pa.string()),
        ("answers", _TEXTS),
    ]
)


def export(
    dataset: Examples,
    name: str,
    form: Form,
    folder: Path,
    prefix: str,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    language: Language = "en",
) -> Path:
    """Writes the samples of a data set to one file in ``folder``, whole or not at all.

    ``prefix`` is the path of the images relative to the folder that written paths are relative to.
    Returns the path ``folder/<name>.<form>.json``, ``.jsonl`` or ``.parquet``.
    """
    rows = _rows(dataset, name, prefix, seed, templates, language)
    path = folder / (name + _SUFFIXES[form])
    with replacing(path) as temporary:
        if form == "parquet":
            _write_parquet(temporary, rows)
        else:
            _write_json(temporary, map(_RECORDS[form], rows), lines=form == "messages")
    return path


def _rows(
    dataset: Examples,
    name: str,
    prefix: str,
    seed: int,
    templates: Sequence[str] | None,
    language: Language,
) -> Iterator[dict[str, Any]]:
    for i in range(len(dataset)):
        example = dataset[i]
        rng = random.Random(mix(seed, zlib.crc32(name.encode()), i))
        template = rng.choice(templates) if templates else None
        rendered = render_instruction(example, rng, template, language)
        yield {
            "id": f"{name}/{example.id}",
            "images": [os.path.normpath(f"{prefix}/{image}") for image in example.images],
            "prompt": rendered.prompt,
            "response": rendered.response,
            "question": example.question,
            "answers": list(example.answers),
        }


def _llava(row: dict[str, Any]) -> dict[str, Any]:
    images = row["images"]
    image = images[0] if len(images) == 1 else images
    return {"id": row["id"], "image": image, "conversations": _turns(row)}


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "images": row["images"], "conversations": _turns(row)}


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    marks = "<image>\n" * len(row["images"])
    return [
        {"from": "human", "value": marks + row["prompt"]},
        {"from": "gpt", "value": row["response"]},
    ]


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": image}} for image in row["images"]]
    prompt = {"role": "user", "content": [*images, {"type": "text", "text": row["prompt"]}]}
    response = {"role": "assistant", "content": row["response"]}
    return {"id": row["id"], "messages": [prompt, response]}


_RECORDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llava": _llava,
    "sharegpt": _sharegpt,
    "messages": _messages,
}


def _write_json(path: Path, records: Iterable[dict[str, Any]], lines: bool) -> None:
    with path.open("w", encoding="utf-8") as file:
        separator = "" if lines else "[\n"
        for record in records:
            file.write(separator + json.dumps(record, ensure_ascii=False))
            separator = "\n" if lines else ",\n"
        file.write("\n" if lines else "\n]\n" if separator == ",\n" else "[]\n")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        while part := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(part, schema=_SCHEMA))
