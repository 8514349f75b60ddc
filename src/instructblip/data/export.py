"""Writes rendered training samples in the formats of other frameworks.

Each example gives one sample, whose template and answer are chosen at random by the seed, as in
training. The earlier turns of a dialogue are part of the prompt. Images that are not in front of
the prompt keep their places. Image paths of all data sets are relative to one folder.

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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from instructblip.core.example import IMAGE_MARK
from instructblip.core.files import replacing
from instructblip.data.order import mix
from instructblip.data.reading.members import file_of
from instructblip.data.samples import Examples
from instructblip.data.templates import Language, in_parts, render_instruction

Form = Literal["llava", "sharegpt", "messages", "parquet"]
"""The formats that can be written."""
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

    def row(i: int) -> dict[str, Any]:
        example = dataset[i]
        if any(file_of(image) != image for image in example.images):
            raise ValueError(
                f"{name}: its images are in tar shards, where other frameworks cannot read them; "
                "unpack the shards and read the folder as an imagefolder"
            )
        rng = random.Random(mix(seed, zlib.crc32(name.encode()), i))
        template = rng.choice(templates) if templates else None
        rendered = render_instruction(example, rng, template, language)
        return {
            "id": f"{name}/{example.id}",
            "images": [os.path.normpath(f"{prefix}/{image}") for image in example.images],
            "prompt": rendered.prompt,
            "response": rendered.response,
            "question": example.question,
            "answers": list(example.answers),
        }

    suffix, write = _WRITERS[form]
    path = folder / (name + suffix)
    with replacing(path) as temporary:
        write(temporary, map(row, range(len(dataset))))
    return path


def _llava(row: dict[str, Any]) -> dict[str, Any]:
    images = row["images"]
    image = images[0] if len(images) == 1 else images
    return {"id": row["id"], "image": image, "conversations": _turns(row)}


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "images": row["images"], "conversations": _turns(row)}


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    in_front = len(row["images"]) - row["prompt"].count(IMAGE_MARK)
    return [
        {"from": "human", "value": f"{IMAGE_MARK}\n" * in_front + row["prompt"]},
        {"from": "gpt", "value": row["response"]},
    ]


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    images = ({"type": "image_url", "image_url": {"url": image}} for image in row["images"])
    parts = in_parts(row["prompt"], len(row["images"]))
    content = [next(images) if p == IMAGE_MARK else {"type": "text", "text": p} for p in parts]
    prompt = {"role": "user", "content": content}
    response = {"role": "assistant", "content": row["response"]}
    return {"id": row["id"], "messages": [prompt, response]}


_Rows = Iterator[dict[str, Any]]
_Convert = Callable[[dict[str, Any]], dict[str, Any]]


def _write_json(convert: _Convert, path: Path, rows: _Rows) -> None:
    with path.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for row in rows:
            file.write(separator + json.dumps(convert(row), ensure_ascii=False))
            separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def _write_lines(convert: _Convert, path: Path, rows: _Rows) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(convert(row), ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path: Path, rows: _Rows) -> None:
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        while part := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(part, schema=_SCHEMA))


_WRITERS: dict[Form, tuple[str, Callable[[Path, _Rows], None]]] = {
    "llava": (".llava.json", partial(_write_json, _llava)),
    "sharegpt": (".sharegpt.json", partial(_write_json, _sharegpt)),
    "messages": (".messages.jsonl", partial(_write_lines, _messages)),
    "parquet": (".parquet", _write_parquet),
}
