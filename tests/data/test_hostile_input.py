"""Every reader against broken and hostile files, made by damaging its miniature.

Whatever a file holds, a reader gives examples whose images lie below the root, or an error that
names the file. Nothing else may come out: no other exception, no path outside, no endless text.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.reading.records import MAX_TEXT
from instructblip.data.sources import SOURCES
from tests.data.miniatures import CASES, write_files
from tests.testing import HOSTILE_VALUES, places, replaced

FIRST: dict[Any, tuple[Any, ...]] = {}
for case in CASES:
    if not case[0].endswith("_question"):  # they read the files of other sets, with their readers
        FIRST.setdefault((case[0], case[1], tuple(case[2])), case)
MINIATURES = [
    case for case in FIRST.values() if any(name.endswith(("json", "jsonl")) for name in case[2])
]
IDS = [f"{case[0]}-{case[1]}-{i}" for i, case in enumerate(MINIATURES)]


@pytest.mark.parametrize("case", MINIATURES, ids=IDS)
def test_wrong_values_in_every_field(case: tuple[Any, ...], tmp_path: Path):
    files = case[2]
    write_files(tmp_path, files)
    for name, value in files.items():
        if not name.endswith(("json", "jsonl")):
            continue
        for place in places(value):
            for hostile in (*HOSTILE_VALUES, ...):
                write_raw(tmp_path / name, replaced(value, place, hostile))
                read(tmp_path, case, f"{name} {place} {str(hostile)[:40]!r}")
        write_files(tmp_path, {name: value})


@pytest.mark.parametrize("case", MINIATURES, ids=IDS)
def test_truncated_and_binary_files(case: tuple[Any, ...], tmp_path: Path):
    files = case[2]
    write_files(tmp_path, files)
    for name in [name for name in files if name.endswith(("json", "jsonl"))]:
        path = tmp_path / name
        whole = path.read_bytes()
        contents = [whole[:cut] for cut in range(0, len(whole) - 1, max(1, len(whole) // 40))]
        contents += [b"\xff\xfe" + whole, whole[:9] + b"\xff" + whole[9:], b"[" * 9000]
        contents += [b"<html>404</html>", b"null", b"7", b'"text"', b"\xef\xbb\xbf" + whole]
        for i, content in enumerate(contents):
            path.write_bytes(content)
            read(tmp_path, case, f"{name} content {i}")
        path.unlink()
        path.mkdir()
        read(tmp_path, case, f"{name} is a folder")
        path.rmdir()
        path.write_bytes(whole)


def test_the_same_question_twice_is_refused(tmp_path: Path):
    case = next(case for case in CASES if case[:2] == ("vqav2", "train"))
    files = deepcopy(case[2])
    for value in files.values():
        if "annotations" in value:
            value["annotations"].append(value["annotations"][0])
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match="each question once"):
        list(SOURCES["vqav2"].read(tmp_path, "train"))


def read(root: Path, case: tuple[Any, ...], what: str) -> None:
    name, split = case[:2]
    examples, error = [], None
    try:
        examples = list(SOURCES[name].read(root, split))
    except Exception as raised:
        error = raised
    if error is not None:
        assert isinstance(error, ValueError | OSError), f"{what}: {error!r}"
        named = [Path(file).name for file in case[2]]
        assert any(file in str(error) for file in named), f"{what}: {error!r} names no file"
        assert len(str(error)) < 2000, f"{what}: the message is too long"
    for example in examples:
        assert example.where, what
        for image in example.images:
            path = (root / "images" / image).resolve()
            assert path.is_relative_to(root.resolve() / "images"), f"{what}: {image}"
        json.dumps([example.question, example.answers, example.extra]).encode()
        example.question.encode()
        assert len(example.question) <= MAX_TEXT


def write_raw(path: Path, value: Any) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        path.write_text(json.dumps(value))
