"""The check lists every bad sample by file, record and reason, and notices what has changed."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from instructblip.data.prepared.check import (
    Context,
    check_dataset,
    evaluated_by,
    findings,
    left_out,
    unchecked,
)
from instructblip.data.prepared.images import FACTS_FILE, read_facts
from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading.decode import MAX_PIXELS, Window, examine_image
from instructblip.data.templates import render_prompt
from instructblip.data.tokens import Tokens
from tests.testing import bad_samples, llama_like, prepare_vizwiz, write_picture


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header says a size and that has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + head + b"\0\0\0\0IEND\xaeB`\x82"


def test_more_marks_than_images(tmp_path: Path):
    questions = ["<image>What?", "<image>What is like <image>?", "What?"]
    dataset = prepare_vizwiz(tmp_path, [{"question": question} for question in questions])
    assert check_dataset(dataset).left_out == (1,)
    (line,) = bad_samples(dataset)
    assert line["reason"] == "the texts have 2 <image> and the example 1 images"


def test_unreadable_images(tmp_path: Path):
    images = tmp_path / "images"
    names = ["whole.png", "cut.png", "half.jpg", "empty.jpg", "text.jpg", "bomb.png", "folder.png"]
    for name in names[:3]:
        write_picture(images / name, (60, 50), seed=len(name))
    for name in names[1:3]:
        data = (images / name).read_bytes()
        (images / name).write_bytes(data[: len(data) // 2])
    (images / "empty.jpg").touch()
    (images / "text.jpg").write_text("<html>not found</html>")
    (images / "bomb.png").write_bytes(png_header(9000, 9000))
    (images / "folder.png").mkdir()
    dataset = prepare_vizwiz(tmp_path, [{"image": name} for name in [*names, "later.png"]])
    (images / "later.png").unlink()
    diagnosis = check_dataset(dataset)
    assert diagnosis.left_out == tuple(range(1, 8)) == left_out(dataset)
    assert diagnosis.kinds == {"unreadable image": 7}
    listed = {Path(line["reason"].partition(": ")[0]).name: line for line in bad_samples(dataset)}
    assert {line["file"] for line in listed.values()} == {"train.json"}
    assert listed["half.jpg"]["record"] == "record 2"
    for name, reason in [
        ("cut.png", "truncated"),
        ("half.jpg", "truncated"),
        ("empty.jpg", "empty file"),
        ("text.jpg", "not an image"),
        ("bomb.png", f"9000 x 9000 pixels; at most {MAX_PIXELS}"),
        ("folder.png", "directory"),
        ("later.png", "does not exist"),
    ]:
        assert reason in listed[name]["reason"], name
    assert "all in" in diagnosis.describe()
    assert "train.json:record 1: unreadable image" in diagnosis.describe()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_whole_and_cut_files(kind: str, tmp_path: Path):
    path = tmp_path / "a"
    Image.radial_gradient("L").convert("RGB").save(path, kind)
    data = path.read_bytes()
    assert examine_image(data) == ("", "")
    assert examine_image(data[: len(data) * 2 // 3])[0]
    if kind == "JPEG":  # cameras write more after the end of the image
        assert examine_image(data + b"trailer") == ("", "")


def test_damage_in_the_middle_needs_decoding(tmp_path: Path):
    data = bytearray(write_picture(tmp_path / "a.png", (80, 80)).read_bytes())
    data[200:260] = bytes(60)
    assert examine_image(bytes(data)) == ("", "")
    assert examine_image(bytes(data), decode=True)[0]


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        ("auto", "values 0 to 3459 of I;16 pixels, stretched to 0 to 255 by data.window=auto"),
        ("full", "nearly all alike in 8 bits; set data.window=auto or [low, high]"),
        ((0.0, 4095.0), ""),
    ],
)
def test_images_that_use_a_small_part_of_16_bits_are_named(
    window: Window, reason: str, tmp_path: Path
):
    ramp = np.linspace(0, 3459, 4096).reshape(64, 64).astype(np.uint16)
    (tmp_path / "images").mkdir()
    Image.fromarray(ramp).save(tmp_path / "images" / "scan.png")
    dataset = prepare_vizwiz(tmp_path, [{}, {"image": "scan.png"}])
    diagnosis = check_dataset(dataset, window=window)
    assert diagnosis.kinds == ({"narrow range": 1} if reason else {})
    assert not left_out(dataset)
    assert findings(dataset) == diagnosis.kinds
    if reason:
        (line,) = bad_samples(dataset)
        assert line["reason"].startswith("scan.png: grey values 0 to 3459 of I;16 pixels, ")
        assert line["reason"].endswith(reason)
        assert line["reason"] in diagnosis.describe()


def test_data_of_earlier_versions_are_looked_at_again_where_it_matters(tmp_path: Path):
    dataset = prepare_vizwiz(tmp_path, [{}, {"image": "a.jpg"}])
    path = dataset.path / FACTS_FILE
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        old = reader.read_all().drop_columns(["note"])
    with pa.ipc.new_stream(path, old.schema) as writer:
        writer.write_table(old)
    assert {name: fact.note for name, fact in read_facts(path).items()} == {
        "train0.png": None,
        "a.jpg": "",
    }
    check_dataset(dataset)
    assert {fact.note for fact in read_facts(path).values()} == {""}


def test_faults_of_texts(tmp_path: Path, tokens: Tokens):
    long = "word " * 400
    dataset = prepare_vizwiz(
        tmp_path,
        [
            {},
            {"image": "train0.png", "question": "What is 0?", "answers": [{"answer": "cup 0"}]},
            {"question": "   "},
            {"answers": [{"answer": "<answer>"}, {"answer": "TODO"}]},
            {"answers": [{"answer": "nan"}, {"answer": "cup"}]},
            {"question": "{question}"},
            {"answers": [{"answer": long}]},
        ],
    )
    diagnosis = check_dataset(dataset, tokens=tokens)
    listed = [(line["index"], line["kind"]) for line in bad_samples(dataset)]
    assert listed == [
        (1, "duplicate"),
        (1, "duplicate id"),
        (2, "no question"),
        (3, "placeholder"),
        (5, "placeholder"),
        (6, "over-long answer"),
    ]
    assert diagnosis.left_out == (2, 3, 5)
    length = tokens.response_length(long.strip())
    assert f"{length} tokens; training cuts it to 256" in bad_samples(dataset)[-1]["reason"]
    check_dataset(dataset)  # without tokens no length is known; lines do not accumulate
    assert [line["index"] for line in bad_samples(dataset)] == [1, 1, 2, 3, 5]


def test_an_answer_that_looks_misspelled_is_suspect_and_trained_on(tmp_path: Path):
    rows = [{"question": "what?", "answers": [{"answer": "cup"}]} for _ in range(20)]
    rows[4]["answers"] = [{"answer": "cupp"}]
    diagnosis = check_dataset(prepare_vizwiz(tmp_path, rows))
    assert diagnosis.left_out == ()
    assert diagnosis.kinds == {"misspelling": 1}
    assert any("misspelling: 'cupp', 19 times 'cup'" in line for line in diagnosis.shown)


def test_samples_that_exceed_the_context(tmp_path: Path):
    tokens = Tokens(llama_like())
    dataset = prepare_vizwiz(tmp_path, [{}, {"question": "is it red? " * 9}])
    texts = [render_prompt(example, None).prompt for example in dataset]
    answers = [max(example.answers, key=len) for example in dataset]
    lengths = [
        tokens.prompt_length(text) + tokens.response_length(answer)
        for text, answer in zip(texts, answers, strict=True)
    ]
    for room, kinds in ((lengths[1], {}), (lengths[1] - 1, {"over-long sample": 1})):
        context = Context(room + 32, num_queries=32, num_frames=4)
        assert check_dataset(dataset, tokens=tokens, context=context).kinds == kinds
    (line,) = bad_samples(dataset)
    assert line["index"] == 1
    assert f"1 x 32 queries and {lengths[1]} tokens" in line["reason"]


def test_prompts_that_training_would_cut(tmp_path: Path):
    tokens = Tokens(llama_like(), max_prompt=64)
    dataset = prepare_vizwiz(tmp_path, [{}, {"question": "is it red? " * 9}])
    assert check_dataset(dataset, tokens=tokens).kinds == {"over-long prompt": 1}
    (line,) = bad_samples(dataset)
    assert line["index"] == 1
    assert "its beginning is cut to leave 64 (data.max_prompt)" in line["reason"]


def test_answers_may_be_missing_in_a_test_split(tmp_path: Path):
    assert not check_dataset(prepare_vizwiz(tmp_path, [{"answers": []}], "test")).kinds


def test_leaked_images_are_found_by_content(tmp_path: Path):
    train = prepare_vizwiz(tmp_path, [{}, {}, {}])
    copy = tmp_path / "images" / "other_name.png"
    copy.write_bytes((tmp_path / "images" / "train1.png").read_bytes())
    test = prepare_vizwiz(tmp_path, [{}, {"image": copy.name}], "test")
    check_dataset(test)
    evaluated = evaluated_by([test])
    diagnosis = check_dataset(train, evaluated=evaluated, against=["vizwiz test"])
    assert (diagnosis.kinds, diagnosis.left_out) == ({"leaked image": 1}, ())
    assert bad_samples(train)[0]["index"] == 1
    assert "train1.png is also an image of vizwiz test" in bad_samples(train)[0]["reason"]
    dropped = check_dataset(train, evaluated=evaluated, drop_leaked=True)
    assert dropped.left_out == (1,)


def test_examples_that_prepare_left_out_stay_listed(tmp_path: Path):
    records = [{"image": "a.png"}, {"image": "b.png"}, {"answers": [{"answer": "nan"}]}]
    prepare_vizwiz(tmp_path, records)
    (tmp_path / "images" / "a.png").unlink()
    dataset = prepare("vizwiz", tmp_path, "train", tmp_path / "new", max_bad_rate=0.5)
    for _ in range(2):
        text = check_dataset(dataset).describe()
        assert "2 examples (1 left out before: 1 x missing image), 2 images: 1 x placeh" in text
        assert "record 0: missing image: image" in text
        assert "bad_samples.jsonl" in text
        assert [line["kind"] for line in bad_samples(dataset)] == ["missing image", "placeholder"]


def test_changes_are_noticed(tmp_path: Path):
    dataset = prepare_vizwiz(tmp_path, [{}, {}])
    assert unchecked(dataset) == "was never checked"
    check_dataset(dataset, against=["vizwiz test"])
    assert unchecked(dataset) == unchecked(dataset, ["vizwiz test"]) == ""
    assert "not checked for leaked images against gqa test" in unchecked(dataset, ["gqa test"])
    assert "drop_leaked" in unchecked(dataset, drop_leaked=True)

    image = tmp_path / "images" / "train1.png"
    os.utime(image, ns=(1, 1))
    assert unchecked(dataset) == "has changed since it was checked (image train1.png)"
    check_dataset(dataset)
    assert not unchecked(dataset)
    image.unlink()
    assert "image train1.png" in unchecked(dataset)

    again = prepare_vizwiz(tmp_path, [{}, {}, {}])
    assert unchecked(again) == "was never checked"


def test_images_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = prepare_vizwiz(tmp_path, [{}, {}, {"image": "train0.png"}])
    assert check_dataset(dataset).num_images == 2
    write_picture(tmp_path / "images" / "train1.png", seed=77)
    read: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), real(path))[1])
    check_dataset(dataset)
    assert [name for name in read if name.endswith(".png")] == ["train1.png"]
