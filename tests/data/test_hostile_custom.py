"""Custom data and iVQA's table with broken and hostile files: as in test_hostile_input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructblip.data.custom.formats import custom_source
from instructblip.data.custom.rows import CustomSet
from instructblip.data.prepared.check import check_dataset
from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading.records import MAX_TEXT
from instructblip.data.sources import SOURCES
from tests.testing import (
    HOSTILE_VALUES,
    TURNS,
    places,
    read_custom,
    replaced,
    write_json_lines,
    write_picture,
    write_tar,
)

PART = {"type": "image_url", "image_url": {"url": "0.png"}}
ASKED = {"role": "user", "content": [PART, {"type": "text", "text": "What?"}]}
ROW: dict[str, Any] = {"file_name": "0.png", "question": "Which?", "answer": "red"}
WHOLE: dict[str, Any] = {
    "llava_json": {"id": "7", "image": "0.png", "conversations": TURNS},
    "sharegpt": {"images": ["0.png"], "conversations": TURNS},
    "openai_messages": {"messages": [ASKED, {"role": "assistant", "content": "A cup."}]},
    "table": ROW | {"choices": ["red", "blue"], "context": "Look.", "ocr_tokens": ["A"], "id": 3},
    "imagefolder": ROW | {"answer": ["red", "blue"]},
}


def write_sample(path: Path, record: Any) -> None:
    write_tar(path, {"1.json": json.dumps(record).encode()})


FORMS: dict[str, tuple[str, Callable[[Path, Any], None], dict[str, Any]]] = {
    **{
        name: ("rows.jsonl", write_json_lines, WHOLE[name])
        for name in WHOLE
        if name != "imagefolder"
    },
    "imagefolder": ("metadata.jsonl", write_json_lines, WHOLE["imagefolder"]),
    "webdataset": ("rows.tar", write_sample, {"question": "Which?", "answer": "red", "id": 3}),
}


@pytest.mark.parametrize("form", FORMS)
def test_wrong_values_in_every_field(form: str, tmp_path: Path) -> None:
    name, write, whole = FORMS[form]
    write_picture(tmp_path / "0.png")
    for place in places(whole):
        for hostile in (*HOSTILE_VALUES, ...):
            write(tmp_path / name, replaced(whole, place, hostile))
            what = f"{place} {str(hostile)[:40]!r}"
            good(tmp_path, name, what, lambda: read_custom(tmp_path, form))


@pytest.mark.parametrize("form", FORMS)
def test_truncated_and_binary_files(form: str, tmp_path: Path) -> None:
    name, write, whole = FORMS[form]
    write_picture(tmp_path / "0.png")
    write(tmp_path / name, whole)
    content = (tmp_path / name).read_bytes()
    cuts = [content[:cut] for cut in range(0, len(content) - 1, max(1, len(content) // 30))]
    for i, data in enumerate([*cuts, *NO_TEXT, b"\xff" + content, b"\xef\xbb\xbf" + content]):
        (tmp_path / name).write_bytes(data)
        good(tmp_path, name, f"content {i}", lambda: read_custom(tmp_path, form))


NO_TEXT = (b"", b"\xff\xfe\0", b"[" * 9000, b"null\n", b"7\n", b"<html>404</html>", b"\0" * 99)


@pytest.mark.parametrize("hostile", HOSTILE_VALUES)
def test_parquet(hostile: Any, tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png")
    for column in ROW:
        try:
            rows = pa.Table.from_pylist([{**ROW, column: hostile}])
        except (pa.ArrowException, UnicodeError, OverflowError):
            continue  # nobody can write it
        if any(
            pa.types.is_struct(field.type) and not field.type.num_fields for field in rows.schema
        ):
            continue
        pq.write_table(rows, tmp_path / "rows.parquet")
        good(
            tmp_path,
            "rows.parquet",
            f"{column} {hostile!r:.40}",
            lambda: read_custom(tmp_path, "table"),
        )


CELLS = [v for v in HOSTILE_VALUES if isinstance(v, str) and "\ud800" not in v] + [
    'a "b',
    '"',
    "a,b",
    "a\nb",
]


@pytest.mark.parametrize("cell", CELLS, ids=range(len(CELLS)))
def test_tables_of_plain_text(cell: str, tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a1B2" / "0.png")
    header = "video_id,question,answer1,answer2,answer3,answer4,answer5,start,end"
    row = ["a1B2", "What?", "milk", "", "", "", "", "1", "2"]
    path = tmp_path / "annotations" / "test.csv"
    path.parent.mkdir()
    read = SOURCES["ivqa"].read
    for i in range(len(row)):
        path.write_text("\n".join([header, ",".join([*row[:i], cell, *row[i + 1 :]])]))
        good(
            tmp_path,
            "test.csv",
            f"column {i}",
            lambda: list(read(tmp_path, "test")),
        )
    (tmp_path / "rows.csv").write_text(f"image,answer\n{cell},{cell}\n")
    good(tmp_path, "rows.csv", "a row", lambda: read_custom(tmp_path, "table"))


def good(root: Path, file: str, what: str, read: Callable[[], list[Any]]) -> None:
    """Examples below the root, or errors that name the file."""
    examples: list[Any] = []
    message = None
    try:
        examples = read()
    except (ValueError, OSError) as error:
        message = str(error)
    if message is not None:
        assert file in message, f"{what}: {message[:300]} names no file"
        assert len(message) < 2000, f"{what}: the message is too long"
    for example in examples:
        if isinstance(example, ValueError):  # a bad row, which is counted with the others
            assert file in str(example), what
            continue
        assert file in example.where, what
        for image in example.images:
            assert (root / image).resolve().is_relative_to(root.resolve()), f"{what}: {image}"
        texts = [example.question, example.context, *example.answers, *example.choices]
        json.dumps([texts, example.history], ensure_ascii=False).encode()
        assert max(map(len, texts)) <= MAX_TEXT, what


def test_a_text_of_ten_megabytes(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png")
    for field in ("file_name", "answer"):
        write_json_lines(tmp_path / "rows.jsonl", ROW | {field: "x" * 10_000_000})
        with pytest.raises(ValueError, match=r"rows\.jsonl:line 1: .* has 10000000 characters"):
            read_custom(tmp_path, "table")


def test_an_id_twice_is_listed(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png")
    rows = [ROW | {"id": 1, "question": f"{i}?"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = custom_source(CustomSet("mine", "table", "rows.jsonl"))
    data = prepare("mine", tmp_path, "train", tmp_path / "out", source=source)
    assert check_dataset(data).kinds == {"duplicate id": 2}


def test_a_file_url_is_a_path_like_any_other(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for place in (root / "a b.png", elsewhere / "0.png"):
        write_picture(place)
    write_json_lines(root / "rows.jsonl", ROW | {"file_name": f"file://{root}/a%20b.png"})
    (example,) = read_custom(root, "table")
    assert example.images == ("a b.png",)
    for url in (f"file://{elsewhere}/0.png", "file:///etc/passwd", "file://host/0.png"):
        write_json_lines(root / "rows.jsonl", ROW | {"file_name": url})
        with pytest.raises(ValueError, match=r"leaves the image root|file of another machine"):
            read_custom(root, "table")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"file_name": "0.png", "answer": "a", "answer": "b"}', "the key 'answer' is there twice"),
        ('{"file_name": "0.png", "answer": NaN}', "NaN is not a value"),
        ('{"file_name": "0.png", "answer": ' + "[" * 10_000, "nested|deep"),
        ('{"file_name": "0.png", "answer": ' + '{"a":' * 10_000, "nested|deep"),
    ],
)
def test_json_that_is_deep_or_contradicts_itself(
    tmp_path: Path, name: str, record: str, message: str
) -> None:
    write_picture(tmp_path / "0.png")
    (tmp_path / name).write_text(f"[{record}]" if name.endswith("json") else record + "\n")
    with pytest.raises(ValueError, match=rf"{name}:.*({message})"):
        read_custom(tmp_path, "table")
