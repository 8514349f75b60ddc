"""Custom data in its formats, read without code."""

import base64
import hashlib
import json
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from instructblip.cli import data as commands
from instructblip.cli import main as cli
from instructblip.core.example import Example
from instructblip.data.custom.folder import read_folder
from instructblip.data.custom.formats import custom_source
from instructblip.data.custom.rows import CustomSet, keep_image
from instructblip.data.export import Form, export
from instructblip.data.features import hash_images
from instructblip.data.images import ImageTransform
from instructblip.data.prepared.check import Evaluated, check_dataset, unchecked
from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading.images import load_image
from instructblip.data.reading.members import read_image
from instructblip.data.reading.records import Source
from instructblip.data.samples import ImageReader
from instructblip.data.templates import render_prompt
from instructblip.experiment.datasets import prepare_training
from instructblip.recipe.load import load_recipe
from tests.evaluation.fakes import ListDataset
from tests.testing import (
    TURNS,
    read_custom,
    write_json,
    write_json_lines,
    write_picture,
    write_tar,
    write_vqa,
)


def read(root: Path, form: str, split: str = "train", **options: Any) -> list[Example]:
    custom = CustomSet("mine", form, **options)
    data = prepare("mine", root, split, root / "prepared", source=custom_source(custom))
    return list(data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        write_picture(tmp_path / f"{i}.png", seed=i)
    return tmp_path


def assert_dialogue(examples: list[Example]) -> None:
    first, second = examples
    assert (first.question, first.answers, first.history) == ("What is it?", ("A cup.",), ())
    assert (second.question, second.answers) == ("Which colour?", ("Red.",))
    assert second.history == (("What is it?", "A cup."),)
    assert {(e.images, e.task, e.dataset) for e in examples} == {(("0.png",), "instruct", "mine")}


def test_llava_json(root: Path):
    write_json(root / "data.json", [{"id": "7", "image": "0.png", "conversations": TURNS}])
    examples = read(root, "llava_json")
    assert_dialogue(examples)
    assert [e.context for e in examples] == ["Be kind."] * 2
    assert examples[1].id == "7_4"
    assert examples[1].where == "data.json:record 0, conversations 4"


def test_sharegpt(root: Path):
    write_json(root / "data.json", [{"images": ["0.png"], "conversations": TURNS}])
    assert_dialogue(read(root, "sharegpt"))
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": roles[t["from"]], "content": t["value"]} for t in TURNS]
    (root / "data.json").unlink()
    write_json_lines(root / "data.jsonl", {"images": ["0.png"], "messages": messages})
    assert_dialogue(read(root, "sharegpt"))


def test_openai_messages(root: Path):
    url = {"type": "image_url", "image_url": {"url": "0.png"}}
    asked = {"role": "user", "content": [url, {"type": "text", "text": "What is it?"}]}
    rest = [
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": "Red."},
    ]
    write_json_lines(root / "data.jsonl", {"messages": [asked, *rest]})
    assert_dialogue(read(root, "openai_messages"))
    data = base64.b64encode((root / "1.png").read_bytes()).decode()
    url["image_url"] = {"url": f"data:image/png;base64,{data}"}
    write_json_lines(root / "data.jsonl", {"messages": [asked, *rest]})
    (name,) = read(root, "openai_messages")[0].images
    assert (root / name).read_bytes() == (root / "1.png").read_bytes()


COLUMNS = (("answer", "reply"), ("image", "file"), ("question", "ask"))
ROWS = [{"file": "0.png", "ask": "What?", "reply": "cup"}, {"file": "1.png", "ask": "", "reply": 3}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_table(suffix: str, root: Path):
    path = root / f"train{suffix}"
    if suffix == ".jsonl":
        write_json_lines(path, *ROWS)
    elif suffix == ".json":
        write_json(path, ROWS)
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{**r, "reply": str(r["reply"])} for r in ROWS]), path)
    else:
        tab = "\t" if suffix == ".tsv" else ","
        lines = [
            tab.join(COLUMN for COLUMN in ROWS[0]),
            *(tab.join(map(str, r.values())) for r in ROWS),
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
    first, second = read(root, "table", path="{split}.*", columns=COLUMNS)
    assert (first.images, first.question, first.answers) == (("0.png",), "What?", ("cup",))
    assert (second.task, second.answers) == ("caption", ("3",))
    assert first.task == "vqa"


def test_table_with_choices(root: Path):
    row = {"image": "0.png", "question": "Which?", "choices": ["red", "blue"], "answer": 1}
    write_json_lines(root / "a.jsonl", row, row | {"answer": "red", "context": "Look.", "id": 5})
    first, second = read(root, "table", path="a.jsonl")
    assert (first.task, first.answers) == ("multiple_choice", ("blue",))
    assert (second.answers, second.context, second.id) == (("red",), "Look.", "5")
    (root / "a.csv").write_text("image,question,choices,answer\n0.png,Which?,red | blue,0\n")
    assert read(root, "table", path="a.csv")[0].answers == ("red",)
    write_json_lines(root / "a.jsonl", row | {"answer": 7})
    with pytest.raises(ValueError, match=r"a\.jsonl:line 1: field 'answer' is 7"):
        read(root, "table", path="a.jsonl")


def test_case_and_space_of_headings_are_ignored(root: Path):
    for header in ("image,Question,answer", "image, question,ANSWER", "Image ,INSTRUCTION,answer"):
        (root / "a.csv").write_text(f"{header}\n0.png,what is it?,yes\n")
        (example,) = read(root, "table", path="a.csv")
        assert (example.question, example.answers) == ("what is it?", ("yes",))
        assert example.task == ("instruct" if "INSTR" in header else "vqa")
    write_json_lines(root / "a.jsonl", {"image": "0.png", "ANSWER": "a", "Answer": "b"})
    with pytest.raises(ValueError, match=r"line 1: columns \['ANSWER', 'Answer'\] have one name"):
        read(root, "table", path="a.jsonl")
    (root / "a.csv").write_text("image,answer, Answer\n0.png,a,b\n")
    with pytest.raises(ValueError, match=r"a\.csv:line 1: the header names 'answer' more than"):
        read(root, "table", path="a.csv")


def test_a_question_under_another_heading_is_no_caption(root: Path):
    (root / "a.csv").write_text("image,ask,answer\n0.png,what is it?,yes\n")
    for columns in ((), (("question", "aks"),)):
        with pytest.raises(ValueError, match=r"line 2: 'answer' .* 'ask'.*\{question: ask\}"):
            read(root, "table", path="a.csv", columns=columns)
    (example,) = read(root, "table", path="a.csv", columns=(("question", "Ask"),))
    assert (example.task, example.question) == ("vqa", "what is it?")
    (example,) = read(root, "table", path="a.csv", task="caption")
    assert example.answers == ("yes",)
    (root / "a.csv").write_text("image,source,caption\n0.png,a camera,a cup\n")
    assert read(root, "table", path="a.csv")[0].task == "caption"
    with pytest.raises(ValueError, match=r"columns 'cntext' that .* has 'image', 'source', 'cap"):
        read(root, "table", path="a.csv", columns=(("context", "cntext"),))


def test_names_that_other_tools_write_are_accepted(root: Path):
    row = {"filename": "0.png", "prompt": "what is it?", "label": "a cup"}
    write_json_lines(root / "a.jsonl", row, {"image_path": "1.png", "label": "a dog"})
    asked, named = read(root, "table", path="a.jsonl")
    assert (asked.images, asked.question, asked.answers) == (("0.png",), "what is it?", ("a cup",))
    assert (named.task, named.answers) == ("caption", ("a dog",))


def test_zero_is_an_answer_and_an_empty_column_is_none(root: Path):
    row = {"image": "0.png", "question": "how many dogs?", "caption": "a red square"}
    write_json_lines(root / "a.jsonl", row | {"answer": 0}, row | {"answer": [0]}, row)
    assert [e.answers[0] for e in read(root, "table", path="a.jsonl")] == ["0", "0", "a red square"]
    source = custom_source(CustomSet("mine", "table", "a.jsonl"))
    for nothing in ("", None, []):
        write_json_lines(root / "a.jsonl", row | {"answer": nothing})
        (example,) = source.read(root, "train")
        assert example.answers == ()
    write_json_lines(root / "a.jsonl", row | {"answer": "", "question": ""})
    assert read(root, "table", path="a.jsonl")[0].answers == ("a red square",)


def test_choices_in_digits(root: Path):
    row = {"image": "0.png", "question": "how many?", "choices": ["1", "2", "3"]}
    write_json_lines(root / "a.jsonl", *(row | {"answer": a} for a in (0, 1, "3", "1", [2])))
    answers = [e.answers[0] for e in read(root, "table", path="a.jsonl")]
    assert answers == ["1", "2", "3", "1", "3"]
    write_json_lines(root / "a.jsonl", *(row | {"answer": a, "choices": [1, 2, 3]} for a in (1, 0)))
    with pytest.raises(
        ValueError, match=r"line 2: field 'answer' is 0, an index, but digits are the"
    ):
        read(root, "table", path="a.jsonl")
    for answers, message in (((0, 2), "itself, but"), ((2, 0), "an index, but"), ((3, 1, 2), "")):
        lines = "".join(f"0.png,how many?,1|2|3,{a}\n" for a in answers)
        (root / "a.csv").write_text(f"image,question,choices,answer\n{lines}")
        if message:
            with pytest.raises(
                ValueError, match=rf"line 3: .* {message}.*line 2; write the choice"
            ):
                read(root, "table", path="a.csv")
        else:
            assert [e.answers[0] for e in read(root, "table", path="a.csv")] == ["3", "1", "2"]


def test_an_instruction_with_choices_keeps_them(root: Path):
    row = {"image": "0.png", "instruction": "Choose.", "choices": ["red", "blue"], "answer": "red"}
    write_json_lines(root / "a.jsonl", row)
    (example,) = read(root, "table", path="a.jsonl")
    assert example.task == "multiple_choice"
    assert "(a) red (b) blue" in render_prompt(example).prompt


def test_json_with_text_after_its_end(root: Path):
    for more in ('[{"image": "1.png", "answer": "b"}]', "junk"):
        (root / "a.json").write_text('[{"image": "0.png", "answer": "a"}]\n' + more)
        with pytest.raises(ValueError, match=r"a\.json:.* follows the end of the value"):
            read(root, "table", path="a.json")


def test_other_settings_prepare_again(root: Path):
    write_json_lines(root / "a.jsonl", {"image": "0.png", "text": "one", "other": "two"})
    for column, answer in (("text", "one"), ("other", "two")):
        (example,) = read(
            root, "table", path="a.jsonl", columns=(("answer", column),), task="caption"
        )
        assert example.answers == (answer,)


def test_imagefolder_with_captions_beside(root: Path):
    (root / "0.txt").write_text("A cup.\n\nA red cup.\n")
    (root / "1.txt").write_text("A dog.")
    (root / "2.png").unlink()
    first, second = read(root, "imagefolder")
    assert (first.images, first.answers, first.task) == (
        ("0.png",),
        ("A cup.", "A red cup."),
        "caption",
    )
    assert second.answers == ("A dog.",)
    (root / "1.txt").write_text("A dog runs.")
    assert read(root, "imagefolder")[1].answers == ("A dog runs.",)
    (root / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1\.png:: a training example needs an answer"):
        read(root, "imagefolder")


def test_texts_without_a_readable_image_cause_a_warning(root: Path):
    for name in ("0", "1", "2", "p", "q"):
        (root / f"{name}.txt").write_text("A cup.")
    for name in ("p.psd", "q.PSD"):
        (root / name).write_bytes(b"no picture for Pillow")
    (root / "2.txt").rename(root / "2.TXT")
    with pytest.warns(UserWarning, match=r"2 \.txt .* no image .*: p\.txt, q\.txt; .*as \.png"):
        examples = read(root, "imagefolder")
    assert [e.images for e in examples] == [("0.png",), ("1.png",), ("2.png",)]
    (root / "sub").mkdir()
    (root / "metadata.csv").write_text("file_name,text\n0.png,A cup.\n")
    assert len(read(root, "imagefolder")) == 1  # the table speaks for all, and nothing is warned of


def test_skipped_members_of_a_shard_are_counted(root: Path):
    png = (root / "0.png").read_bytes()
    files = {"1.png": png, "1.txt": b"A cup.", "v1.0_x.png": png, "v1.0_x.txt": b"A dog."}
    write_tar(root / "a.tar", files)
    with pytest.warns(UserWarning, match=r"a\.tar: 2 of 4 .*: v1\.0_x\.png, .*first dot"):
        (example,) = read(root, "webdataset")
    assert example.answers == ("A cup.",)


@pytest.mark.parametrize("name", ["Metadata.csv", "metadata.CSV", "METADATA.Csv"])
def test_case_of_table_names_is_ignored(root: Path, name: str):
    (root / name).write_text("file_name,text\n0.png,A cup.\n")
    assert read(root, "imagefolder")[0].answers == ("A cup.",)
    (root / "P.CSV").write_text("image,text\n1.png,A dog.\n")
    (root / name).unlink()
    assert read(root, "table")[0].answers == ("A dog.",)


def test_tables_as_spreadsheets_save_them(root: Path):
    path, rows = root / "a.csv", "image,caption\n0.png,A cup.\n"
    path.write_text("sep=,\n" + rows)
    assert read(root, "table")[0].where == "a.csv:line 3"
    for separator in (";", "\t"):
        table = 'image,caption\n0.png,"A cup, red; new."\n'.replace(",", separator, 1)
        path.write_text(table.replace("0.png,", f"0.png{separator}"), encoding="utf-8-sig")
        (example,) = read(root, "table")
        assert example.answers == ("A cup, red; new.",)
    path.write_text('"image;one",caption\n0.png,A cup.\n')
    with pytest.raises(ValueError, match="fields present: image;one, caption"):
        read(root, "table")
    path.write_text("sep=;\nimage;caption\n0.png;A cup.\n")
    assert read(root, "table")[0].answers == ("A cup.",)
    path.write_text(rows, encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.csv.* is UTF-16; save it as UTF-8 \(.*CSV UTF-8"):
        read(root, "table")
    path.write_text(rows.replace("0.png", "a\\b\\w.webp"))
    with pytest.raises(ValueError, match=r"line 2: .*w\.webp' .* write / for \\"):
        read(root, "table")


def test_errors_of_custom_data_mention_no_owner(root: Path):
    write_json(root / "a.json", [{"image": "0.png", "conversations": [{"from": "robot"}]}])
    for form in ("llava_json", "table"):
        with pytest.raises(ValueError, match=r"a\.json:record 0") as error:
            read(root, form, columns=() if form == "llava_json" else (("image", "file"),))
        assert "owner" not in str(error.value)
        assert "images/" not in str(error.value)


def test_imagefolder_with_metadata(root: Path):
    write_picture(root / "train" / "deep" / "a.png")
    (root / "train" / "deep" / "metadata.csv").write_text("file_name,text\na.png,A cup.\n")
    (example,) = read(root, "imagefolder")
    assert (example.images, example.answers) == (("train/deep/a.png",), ("A cup.",))
    (root / "train" / "deep" / "metadata.csv").write_text("file_name,text\n../../0.png,A cup.\n")
    with pytest.raises(ValueError, match=r"metadata\.csv:line 2: image name '../../0.png'"):
        read(root, "imagefolder")


def test_swapped_captions_are_read_again(root: Path):
    (root / "2.png").unlink()
    for i, caption in enumerate(("A cup.", "A dog.")):
        (root / f"{i}.txt").write_text(caption)
    assert [e.answers[0] for e in read(root, "imagefolder")] == ["A cup.", "A dog."]
    (root / "0.txt").rename(root / "kept")
    (root / "1.txt").rename(root / "0.txt")
    (root / "kept").rename(root / "1.txt")
    assert [e.answers[0] for e in read(root, "imagefolder")] == ["A dog.", "A cup."]


def test_circular_links_are_followed_once(root: Path):
    write_picture(root / "deep" / "a.png")
    for path in root.rglob("*.png"):
        path.with_suffix(".txt").write_text("A cup.")
    for loop in (root / "loop", root / "deep" / "back"):
        loop.symlink_to(root)
    elsewhere = write_picture(root.parent / f"{root.name}_more" / "b.png")
    elsewhere.with_suffix(".txt").write_text("A dog.")
    (root / "more").symlink_to(elsewhere.parent)
    names = [e.images[0] for e in read(root, "imagefolder")]
    assert names == ["0.png", "1.png", "2.png", "deep/a.png", "more/b.png"]
    elsewhere.with_suffix(".txt").write_text("A red dog.")
    assert read(root, "imagefolder")[-1].answers == ("A red dog.",)


def test_imagefolder_with_one_table_of_any_name(root: Path):
    table = "image,question,answer\na.png,what is it?,a dog\n"
    write_picture(root / "a.png")
    (root / "labels of march.csv").write_text(table)
    (example,) = read(root, "imagefolder")
    assert (example.images, example.question, example.answers) == (
        ("a.png",), "what is it?", ("a dog",)
    )  # fmt: skip
    (root / "other.csv").write_text(table)
    with pytest.raises(ValueError, match=r"several tables \(labels of march.csv, other.csv\)"):
        read(root, "imagefolder")
    (root / "metadata.csv").write_text(table)
    assert read(root, "imagefolder")[0].answers == ("a dog",)
    (root / "metadata.csv").unlink()
    for name in ("a", "0", "1", "2"):  # captions beside images come first, as they always did
        (root / f"{name}.txt").write_text("A cat.")
    assert [e.answers for e in read(root, "imagefolder")] == [("A cat.",)] * 4


def test_imagefolder_with_metadata_beside_its_images(root: Path):
    for i in range(2):
        (root / "images").mkdir(exist_ok=True)
        (root / f"{i}.png").rename(root / "images" / f"{i}.png")
    (root / "2.png").unlink()
    (root / "metadata.csv").write_text("file_name,text\nimages/0.png,A cup.\nimages/1.png,A dog.\n")
    recipe = root / "custom.yaml"
    recipe.write_text(f"data: {{root: {root}, sets: {{mine: {{format: imagefolder, root: .}}}}}}")
    dataset = prepare_training(load_recipe(recipe))["mine"]
    assert [e.images for e in dataset] == [("images/0.png",), ("images/1.png",)]
    assert [e.images for e in read_folder(root).examples] == [e.images for e in dataset]


def test_imagefolder_with_splits_below_images(root: Path):
    for i, split in enumerate(("train", "val")):
        folder = root / "images" / split
        folder.mkdir(parents=True)
        (root / f"{i}.png").rename(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"Number {i}.")
    for split, number in (("train", 0), ("val", 1)):
        (example,) = read(root, "imagefolder", split, images=".")
        assert (example.images, example.answers) == (
            (f"images/{split}/{number}.png",),
            (f"Number {number}.",),
        )


def test_images_that_no_table_covers_need_a_caption(root: Path):
    (root / "x").mkdir()
    (root / "0.png").rename(root / "x" / "0.png")
    (root / "x" / "metadata.csv").write_text("file_name,text,,\n0.png,A cup.,,\n")
    (root / "1.txt").write_text("A dog.")
    examples = read(root, "imagefolder", images=".")
    assert {e.images: e.answers for e in examples} == {
        ("x/0.png",): ("A cup.",),
        ("1.png",): ("A dog.",),
    }


@pytest.mark.parametrize("value", ["3 + 0 =", "3+0=", "color?", "Farbe？", "7?", "colour:", "5＝ "])
def test_a_short_question_under_another_heading_is_no_caption(root: Path, value: str):
    (root / "metadata.csv").write_text(f"file_name,aufgabe,answer\n0.png,{value},3\n")
    with pytest.raises(ValueError, match=r"line 2: 'answer' .* 'aufgabe'.*call it `question`"):
        read(root, "imagefolder")


USUAL = ("flickr", "http://a.b/c?d=", "0042 17", "2024-05-01 10:30", "a1-7", "TW9uZGF5TW9y=")


@pytest.mark.parametrize("value", USUAL)
def test_what_cannot_be_a_question_beside_a_caption(root: Path, value: str):
    (root / "t.csv").write_text(f"image,answer,source\n0.png,a cat,{value}\n")
    (example,) = read(root, "table", path="t.csv", images=".")
    assert (example.task, example.answers) == ("caption", ("a cat",))


def test_hf_dataset(root: Path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(root / "0.png"), str(root / "1.png")], "text": ["A cup.", "A dog."]}
    saved = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": saved}).save_to_disk(str(root / "saved"))
    columns = (("answer", "text"),)
    first, second = read(root, "hf_dataset", path="saved", columns=columns)
    assert (first.answers, second.answers) == (("A cup.",), ("A dog.",))
    assert second.images[0].startswith("extracted/")
    with pytest.raises(FileNotFoundError, match="no split 'val'; it has train"):
        read(root, "hf_dataset", "val", path="saved")


def test_webdataset(root: Path):
    png = (root / "0.png").read_bytes()
    fields = json.dumps({"question": "What?", "answer": "cup"}).encode()
    files = {"a/1.png": png, "a/1.txt": b"A cup.\n", "a/2.json": fields, "a/2.png": png}
    write_tar(root / "train-0.tar", files)
    before = {path for path in root.rglob("*") if "prepared" not in path.parts}
    first, second = read(root, "webdataset", path="{split}-*.tar")
    assert (first.task, first.answers) == ("caption", ("A cup.",))
    assert (second.task, second.question, second.answers) == ("vqa", "What?", ("cup",))
    assert first.images == (f"train-0.tar/512+{len(png)}",)
    assert read_image(root / second.images[0]) == png
    assert {path for path in root.rglob("*") if "prepared" not in path.parts} == before


def test_images_in_shards_are_used_as_files_are(root: Path):
    """The data check, the loader, leaked and changed images, and the error of an export."""
    pngs = [(root / f"{i}.png").read_bytes() for i in range(3)]
    files = {f"{i}.{k}": d for i in range(3) for k, d in (("png", pngs[i]), ("txt", b"A cup."))}
    write_tar(root / "a.tar", files)
    source = custom_source(CustomSet("mine", "webdataset", images="images"))
    data = prepare("mine", root, "train", root / "prepared", source=source)
    facts = data.update_images(decode=True)
    assert [f.sha256 for f in facts.values()] == [hashlib.sha256(png).digest() for png in pngs]
    assert not any(fact.fault for fact in facts.values())
    evaluated = Evaluated({hashlib.sha256(pngs[1]).digest(): "vqav2 val"})
    found = check_dataset(data, evaluated=evaluated, perceptual=True)
    assert found.kinds == {"leaked image": 1}
    assert unchecked(data) == ""
    for i, example in enumerate(data):
        shown = load_image(example.images[0], data.image_root)
        assert np.array_equal(np.asarray(shown), np.asarray(load_image(root / f"{i}.png")))
    reader = ImageReader(ImageTransform())
    (path,) = reader.paths(data[0].images, data.image_root)
    expected = reader.load(str(root / "0.png"), None, False)
    assert torch.equal(reader.load(path, None, False), expected)
    assert hash_images([path], {}) == {path: hashlib.sha256(pngs[0]).hexdigest()}
    with pytest.raises(ValueError, match="its images are in tar shards"):
        export(data, "mine", "llava", root / "out", ".")
    write_tar(root / "a.tar", files | {"3.png": pngs[0], "3.txt": b"A dog."})
    os.utime(root / "a.tar", (1, 1))
    assert "a.tar/512+" in unchecked(data)
    assert len(prepare("mine", root, "train", root / "prepared", source=source)) == 4
    (root / "a.tar").write_bytes((root / "a.tar").read_bytes()[:600])
    with pytest.raises(ValueError, match=r"a\.tar/512\+\d+: .* ends \d+ bytes early; download"):
        load_image(path)
    (root / "a.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.tar/512\+\d+ does not exist"):
        load_image(path)


def test_data_that_was_unpacked_by_an_earlier_version_still_loads(root: Path):
    """Its manifest names the image root, and its settings are those of today."""
    png = (root / "0.png").read_bytes()
    write_tar(root / "a.tar", {"1.png": png, "1.txt": b"A cup."})
    custom = CustomSet("mine", "webdataset", images="images")
    example = replace(next(iter(custom_source(custom).read(root, "train"))))
    name = keep_image(root / "images", png)
    earlier = Source(
        lambda root, split: iter([replace(example, images=(name,))]),
        "",
        "your own",
        "",
        "images",
        custom_source(custom).settings,
    )
    prepare("mine", root, "train", root / "prepared", source=earlier)
    data = prepare("mine", root, "train", root / "prepared", source=custom_source(custom))
    assert data[0].images == (name,)
    assert load_image(name, data.image_root).size == load_image(root / "0.png").size


def lying_member(kind: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo({"absolute": "/1.png", "above": "../1.png"}.get(kind, "1.png"))
    member.size = 1 << 20 if kind == "long" else 0
    types = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE}
    member.type = {**types, "sparse": tarfile.GNUTYPE_SPARSE}.get(kind, tarfile.REGTYPE)
    member.linkname = "/etc/passwd" if kind in ("symbolic", "hard") else ""
    return member


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("symbolic", "is a link to '/etc/passwd'; expected a file"),
        ("hard", "is a link to '/etc/passwd'; expected a file"),
        ("fifo", "is sparse or no file"),
        ("sparse", "is sparse or no file"),
        ("absolute", "leaves the archive"),
        ("above", "leaves the archive"),
        ("long", "claims 1048576 bytes, more than the shard has"),
    ],
)
def test_members_that_lie_are_refused(kind: str, message: str, root: Path):
    member = lying_member(kind)
    header = member.tobuf(tarfile.GNU_FORMAT)
    (root / "a.tar").write_bytes(header + b"\0" * 2048)
    expected = re.escape(f"a.tar:{member.name} {message}")
    with pytest.raises(ValueError, match=rf"^{expected}.*; make the shard anew$"):
        read(root, "webdataset")


@pytest.mark.parametrize(
    ("form", "name", "content", "message"),
    [
        (
            "llava_json",
            "a.json",
            [{"image": "0.png", "conversations": []}],
            "record 0: .*turns that end",
        ),
        ("llava_json", "a.json", [{"image": "0.png"}], "record 0: field 'messages' is missing"),
        (
            "llava_json",
            "a.json",
            [{"image": "0.png", "conversations": [{"from": "gpt", "value": "x"}]}],
            "conversations 0: .* expected a question before",
        ),
        (
            "llava_json",
            "a.json",
            [{"image": "0.png", "conversations": [{"from": "robot", "value": "x"}]}],
            "conversations 0: field 'from' is 'robot'",
        ),
        ("llava_json", "a.json", [{"image": "/a", "conversations": TURNS}], "record 0: image name"),
        ("sharegpt", "a.json", [{"image": 5, "conversations": TURNS}], "record 0: an image is 5"),
        ("sharegpt", "a.json", [{"image": "s3://x", "conversations": TURNS}], "on the network"),
        ("sharegpt", "a.json", [{"image": "data:x,%%", "conversations": TURNS}], "not base64"),
        (
            "sharegpt",
            "a.json",
            [{"image": "data:x,é", "conversations": TURNS}],
            "record 0: .*base64",
        ),
        ("table", "a.json", [{"question": "x"}], "record 0: field 'image' is missing"),
        ("table", "a.json", [{"image": "../0.png", "answer": "x"}], "record 0: image name"),
        ("table", "a.json", [{"image": "0.png", "answer": {"a": 1}}], "field 'answer' is {'a': 1}"),
        ("table", "a.parquet", b"PAR1 no", r"a\.parquet:row 0: not readable as Parquet"),
        (
            "table",
            "a.csv",
            b"image,answer\n0.png,a,b\n",
            r"a\.csv:line 2: has more or fewer",
        ),
        ("webdataset", "a.tar", b"\0" * 100, r"a\.tar: not readable as a tar"),
        ("hf_dataset", "dataset_info.json", b"{", "is not a saved data set"),
    ],
)
def test_broken_input(form: str, name: str, content: Any, message: str, root: Path):
    if isinstance(content, bytes):
        (root / name).write_bytes(content)
    else:
        write_json(root / name, content)
    with pytest.raises(ValueError, match=message):
        read(root, form)


def test_error_names_a_truncated_shard(root: Path):
    write_tar(root / "a.tar", {f"{i}.png": (root / "0.png").read_bytes() for i in range(30)})
    data = (root / "a.tar").read_bytes()
    (root / "a.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.tar: not readable as a tar archive: its end"):
        read(root, "webdataset")


def test_paths_stay_below_the_root(root: Path):
    for path in ("../a.json", "/etc/*.json"):
        with pytest.raises(ValueError, match="leaves the data root"):
            read(root, "table", path=path)
    with pytest.raises(FileNotFoundError, match=r"no \.tar file matches \*"):
        read(root, "webdataset")
    with pytest.raises(ValueError, match=r"columns \['picture'\]; expected some of id, image"):
        custom_source(CustomSet("mine", "table", columns=(("picture", "a"),)))


@pytest.mark.parametrize(
    ("form", "reader"),
    [("llava", "llava_json"), ("sharegpt", "sharegpt"), ("messages", "openai_messages")],
)
def test_an_export_is_read_again(form: Any, reader: str, tmp_path: Path):
    data = prepare("vqav2", write_vqa(tmp_path / "vqav2", 6), "train", tmp_path / "prepared")
    path = export(data, "vqav2", form, tmp_path / "out", "vqav2/images", seed=3)
    first = path.read_bytes()
    again = export(data, "vqav2", form, tmp_path / "out", "vqav2/images", seed=3)
    assert again.read_bytes() == first
    source = custom_source(CustomSet("mine", reader, path=f"out/{path.name}"))
    examples = list(prepare("mine", tmp_path, "train", tmp_path / "prepared", source=source))
    assert len(examples) == 6
    for before, after in zip(data, examples, strict=True):
        assert before.question in after.question
        assert after.answers[0] in before.answers
        assert (tmp_path / after.images[0]).samefile(data.image_root / before.images[0])


@pytest.mark.parametrize(
    ("form", "reader"), [("sharegpt", "sharegpt"), ("messages", "openai_messages")]
)
def test_an_export_keeps_images_between_words(form: Any, reader: str, tmp_path: Path):
    for i in range(3):
        write_picture(tmp_path / f"{i}.png", seed=i)
    asked = "Is <image> like <image>, or not?"
    images = ["0.png", "1.png", "2.png"]
    record = {"messages": [
        {"role": "user", "content": asked}, {"role": "assistant", "content": "It is."}
    ]}  # fmt: skip
    write_json(tmp_path / "data.json", [record | {"images": images[:2]}])
    (example,) = read_custom(tmp_path, "sharegpt")
    dataset = ListDataset([replace(example, images=tuple(images))], image_root=tmp_path)
    path = export(dataset, "mine", form, tmp_path / "out", ".", templates=["{question}"])
    (again,) = read_custom(tmp_path, reader, path=f"out/{path.name}")
    # The image without a mark is in front, and so it is written.
    assert again.images == tuple(images)
    assert again.question.removeprefix("<image>").strip() == asked


def test_an_export_of_a_linked_set_is_read_again(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vqav2").symlink_to(write_vqa(tmp_path / "big" / "vqav2", 4))
    settings = [f"data.root={tmp_path / 'data'}", "data.sets={vqav2: {}}"]
    out = tmp_path / "data" / "out"
    for form in get_args(Form):
        commands.prepare("scenes", settings, export=form, out=out)
    written = sorted(path.name for path in out.iterdir())
    endings = ("llava.json", "messages.jsonl", "parquet", "sharegpt.json")
    assert written == [f"vqav2.{ending}" for ending in endings]
    source = custom_source(CustomSet("mine", "sharegpt", path="out/vqav2.sharegpt.json"))
    examples = prepare("mine", tmp_path / "data", "train", tmp_path / "prepared", source=source)
    assert examples[0].images[0].startswith("vqav2/images/COCO_train2014_")


def test_export_parquet(tmp_path: Path):
    data = prepare("vqav2", write_vqa(tmp_path / "vqav2", 4), "train", tmp_path / "prepared")
    path = export(
        data, "vqav2", "parquet", tmp_path / "out", "vqav2/images", templates=["Ask: {question}"]
    )
    rows = pq.read_table(path).to_pylist()
    assert [row["prompt"] for row in rows] == [f"Ask: what is {i}?" for i in range(4)]
    assert rows[0]["response"] in rows[0]["answers"]


def test_an_unknown_export_format_is_refused_before_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_vqa(tmp_path / "vqav2", 4)
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare", "scenes", f"data.root={tmp_path}", "--export", "lava"])
    assert stop.value.code == 2
    assert "'lava' is not one of 'llava', 'sharegpt'" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["vqav2"]


def test_recipe_reads_custom_data_from_a_url(root: Path):
    write_json_lines(root / "a.jsonl", {"file": "0.png", "text": "A cup."})
    memory = fsspec.filesystem("memory")
    memory.put(str(root / "a.jsonl"), "/mine/a.jsonl")
    memory.put(str(root / "0.png"), "/mine/0.png")
    recipe = root / "custom.yaml"
    recipe.write_text(
        "data:\n  root: " + str(root) + "\n  sets:\n    mine:\n      format: table\n"
        "      root: memory://mine\n      columns: {image: file, answer: text}\n"
    )
    dataset = prepare_training(load_recipe(recipe))["mine"]
    assert dataset[0].answers == ("A cup.",)
    assert (dataset.image_root / dataset[0].images[0]).is_file()
    assert not check_dataset(dataset).left_out
    with pytest.raises(ValueError, match="vqav2 is a published data set; choose another name"):
        prepare_training(load_recipe(recipe, ["data.sets={vqav2: {format: table, root: x}}"]))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        prepare_training(load_recipe(recipe, ["data.sets.mine.root=memory://other"]))
