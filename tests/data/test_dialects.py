"""Custom data as users of other trainers have it: miniatures in each form, read unedited."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructblip.core.example import Example
from instructblip.data.custom.folder import read_folder
from instructblip.data.custom.formats import custom_source
from instructblip.data.custom.rows import CustomSet
from instructblip.data.prepared.check import check_dataset
from instructblip.data.prepared.prepare import prepare
from instructblip.data.templates import Dialogue, render_prompt
from tests.testing import read_custom, write_json, write_json_lines, write_picture, write_video

RED, BLUE = (250, 20, 20), (20, 20, 250)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        write_picture(tmp_path / f"{i}.png", seed=i)
    return tmp_path


def dialogue(root: Path, *records: Any, form: str = "sharegpt") -> list[Example]:
    write_json(root / "data.json", list(records))
    return read_custom(root, form)


def seen(examples: list[Example]) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(question, answers, images) of each."""
    return [(e.question, e.answers, e.images) for e in examples]


def turns(*texts: str, names: tuple[str, str] = ("user", "assistant")) -> list[dict[str, str]]:
    role, content = ("role", "content") if names[0] == "user" else ("from", "value")
    return [{role: names[i % 2], content: text} for i, text in enumerate(texts)]


def test_an_answer_sees_the_images_before_it(root: Path):
    """LLaMA-Factory: the second image comes with the second question."""
    messages = turns("<image>What is it?", "A cup.", "And this?<image>", "A dog.")
    assert seen(dialogue(root, {"messages": messages, "images": ["0.png", "1.png"]})) == [
        ("What is it?", ("A cup.",), ("0.png",)),
        ("And this?<image>", ("A dog.",), ("0.png", "1.png")),
    ]
    unmarked = turns("What is it?", "A cup.", "And this?", "A dog.")
    both = dialogue(root, {"messages": unmarked, "images": ["0.png", "1.png"]})
    assert [e.images for e in both] == [("0.png", "1.png")] * 2


@pytest.mark.parametrize(
    ("asked", "question"),
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What is it?\n<image>", "What is it?"),  # half of LLaVA-Instruct
        ("<image>\n<image>\nWhich?", "Which?"),
        ("Which?\n<image>\n<image>", "Which?"),
        ("Is <image> it?", "Is <image> it?"),
        ("Is it <image>", "Is it <image>"),
        ("<image>\nor <image>?", "<image>\nor <image>?"),
    ],
)
def test_images_of_the_first_question_are_in_front_or_between_its_words(
    root: Path, asked: str, question: str
):
    images = ["0.png", "1.png"][: asked.count("<image>")]
    (example,) = dialogue(root, {"messages": turns(asked, "A cup."), "images": images})
    assert seen([example]) == [(question, ("A cup.",), tuple(images))]


def test_later_images_keep_their_places_in_the_history(root: Path):
    """Few-shot examples; an image of an answer belongs to the end of its question."""
    messages = turns(
        "<image>It?", "A cup.", "<image>It?", "A <image> dog.", "<image> It?", "A hat."
    )
    messages.insert(2, {"role": "system", "content": "Now <image> this."})
    images = [f"{i}.png" for i in range(3)] + ["0.png", "1.png"]
    *_, last = dialogue(root, {"messages": messages, "images": images})
    assert last.history == (("It?", "A cup."), ("<image><image>It?<image>", "A  dog."))
    assert (last.question, last.images) == ("<image> It?", tuple(images))
    assert last.context == "Now  this."


def test_parts_keep_their_order(root: Path):
    def asked(*parts: str) -> str:
        content = [
            {"type": "image", "image": part} if part.endswith(".png") else
            {"type": "text", "text": part}
            for part in parts
        ]  # fmt: skip
        reply = {"role": "assistant", "content": "A cup."}
        messages = [{"role": "user", "content": content}, reply]
        (example,) = dialogue(root, {"messages": messages}, form="openai_messages")
        assert example.images == tuple(part for part in parts if part.endswith(".png"))
        return example.question

    assert asked("Is", "0.png", "like", "1.png") == "Is <image> like\n<image>"
    assert asked("Is", "0.png", "like", "1.png", "?") == "Is <image> like <image>?"
    assert asked("0.png", "1.png", "Which?") == asked("Which?", "0.png", "1.png") == "Which?"


def test_answers_before_the_first_image_are_counted_and_stay_in_the_history(root: Path):
    messages = turns("Hello.", "Hi.", "<image>What is it?", "A cup.")
    with pytest.warns(UserWarning, match=r"skipped: data\.json:record 0, messages 1$"):
        (example,) = dialogue(root, {"messages": messages, "images": ["0.png"]})
    assert example.history == (("Hello.", "Hi."),)
    assert example.images == ("0.png",)


def test_parts_name_their_images_or_take_the_next(root: Path):
    """LLaMA-Factory's newer form (``value``), TRL's parts without a path, and xtuner's marks."""
    text = {"type": "text", "value": "What is it?"}
    asked = [{"type": "image_url", "value": "0.png"}, text]
    reply = {"role": "assistant", "content": [{"type": "text", "value": "A cup."}]}
    more = [{"type": "text", "text": "<IMG_CONTEXT>\nAnd?"}, {"type": "image", "image": "1.png"}]
    later = [{"role": "user", "content": more}, reply]
    first, second = dialogue(
        root, {"messages": [{"role": "user", "content": asked}, reply, *later]}
    )
    assert (first.question, first.answers, first.images) == ("What is it?", ("A cup.",), ("0.png",))
    assert (second.question, second.images) == ("And?\n<image>", ("0.png", "1.png"))
    waiting = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    record = {"messages": [{"role": "user", "content": waiting}, reply], "images": ["2.png"]}
    (example,) = dialogue(root, record, form="openai_messages")
    assert example.images == ("2.png",)


def test_images_inside_the_text(root: Path):
    """Qwen-VL: ``Picture 1: <img>path</img>``, and dialogues without an image between."""
    names = ("user", "assistant")
    asked = "Picture 1: <img>0.png</img>\nPicture 2: <img>1.png</img>\nWhich is a cup?"
    blind = {"id": "a", "conversations": turns("Hi", "Hello.", names=names)}
    shown = {"id": "b", "conversations": [
        {"from": "user", "value": asked}, {"from": "assistant", "value": "The first."}
    ]}  # fmt: skip
    with pytest.warns(UserWarning, match=r"mine: answers without an image before them: 1, skipped"):
        examples = dialogue(root, blind, shown, form="llava_json")
    assert seen(examples) == [("Which is a cup?", ("The first.",), ("0.png", "1.png"))]
    web = {"conversations": turns("<img>https://a.b/c.png</img>What?", "A cup.")}
    with pytest.raises(
        ValueError, match=r"record 0, conversations 0: image 'https.*on the network"
    ):
        dialogue(root, web)


def test_question_and_answer_in_one_object(root: Path):
    """ms-swift's ``query`` with a history, Alpaca's names, xtuner's and ms-swift's pairs."""
    query = {
        "system": "Be kind.",
        "query": "Which colour?",
        "response": "Red.",
        "images": ["0.png"],
    }
    first, second = dialogue(root, query | {"history": [["<image>What is it?", "A cup."]]})
    assert (first.question, first.answers, first.history) == ("What is it?", ("A cup.",), ())
    assert (second.question, second.answers) == ("Which colour?", ("Red.",))
    assert second.history == (("What is it?", "A cup."),)
    assert {(e.images, e.context) for e in (first, second)} == {(("0.png",), "Be kind.")}
    alpaca = {
        "instruction": "Answer.",
        "input": "What is it?",
        "output": "A cup.",
        "image": "0.png",
    }
    assert seen(dialogue(root, alpaca)) == [("Answer.\nWhat is it?", ("A cup.",), ("0.png",))]
    for ask, answer in (("input", "output"), ("human", "assistant")):
        pairs = [
            {ask: "<image>\nWhat is it?", answer: "A cup."},
            {ask: "Why?", answer: "A handle."},
        ]
        pairs[0]["system"] = "Be kind."
        examples = dialogue(root, {"conversation": pairs, "image": "0.png"})
        assert [e.question for e in examples] == ["What is it?", "Why?"]
        assert [e.context for e in examples] == ["Be kind."] * 2
        assert examples[1].history == (("What is it?", "A cup."),)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_reaches_the_prompt(root: Path, name: str):
    turn = turns("<image>What is it?", "A cup.", names=("human", "gpt"))
    (example,) = dialogue(root, {name: "Be brief.", "image": "0.png", "conversations": turn})
    assert render_prompt(example).prompt == "Context: Be brief. What is it?"
    assert render_prompt(example).turns == Dialogue("What is it?", system="Be brief.")
    (root / "data.json").unlink()
    row = {"image": "0.png", "query": "What is it?", "response": "A cup.", name: "Be brief."}
    write_json_lines(root / "rows.jsonl", row)
    (example,) = read_custom(root, "table")
    assert (example.task, example.answers) == ("instruct", ("A cup.",))
    assert render_prompt(example).prompt == "Context: Be brief. What is it?"
    assert render_prompt(example).turns == Dialogue("What is it?", system="Be brief.")


def test_videos_are_four_of_their_frames(root: Path):
    """LLaMA-Factory's ``videos``, lmms-finetune's ``video`` beside an image, xtuner's parts."""
    pytest.importorskip("av")
    write_video(root / "v" / "a.mp4", [RED] * 4 + [BLUE] * 4)
    write_video(root / "v" / "b.avi", [BLUE] * 2)
    clip = tuple(f"extracted/v/a.mp4/{i:06d}.jpg" for i in (1, 3, 5, 7))
    short = tuple(f"extracted/v/b.avi/{i:06d}.jpg" for i in (0, 1))
    messages = turns("<video>What moves?", "A ball.")
    (example,) = dialogue(root, {"messages": messages, "videos": ["v/a.mp4"]})
    assert seen([example]) == [("What moves?", ("A ball.",), clip)]
    assert all((root / name).is_file() for name in clip)
    talk = turns(
        "<video><video>What?", "Balls.", "<image>And here?", "A cup.", names=("human", "gpt")
    )
    record = {"video": ["v/a.mp4", "v/b.avi"], "image": "0.png", "conversations": talk}
    first, second = dialogue(root, record)
    assert (first.images, second.images) == (clip + short, (*clip, *short, "0.png"))
    part = {"type": "video_url", "video_url": "v/b.avi"}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    (example,) = dialogue(root, {"messages": [asked, {"role": "assistant", "content": "A ball."}]})
    assert example.images == short
    (root / "data.json").unlink()
    write_json_lines(
        root / "rows.jsonl", {"video": "v/b.avi", "question": "What?", "answer": "ball"}
    )
    source = custom_source(CustomSet("mine", "table"))
    dataset = prepare("mine", root, "train", root / "prepared", source=source)
    assert dataset[0].images == short
    assert not check_dataset(dataset, max_images=4).left_out
    write_json_lines(root / "rows.jsonl", {"video": "extracted/v/b.avi", "caption": "a ball"})
    assert read_custom(root, "table")[0].images == short  # a folder of frames


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": turns("<image>What?", "A cup.")},
            "have 1 <image> and the record has 0 images",
        ),
        (
            {"messages": turns("<image>What?", "A cup."), "images": ["0.png", "1.png"]},
            "1 <image> and the record has 2 images; expected one for each",
        ),
        ({"messages": turns("<video>What?", "A cup."), "image": "0.png"}, "1 <video> .* 0 videos"),
        ({"messages": turns("What?", "A."), "videos": ["x.mp4"]}, "video 'x.mp4' does not exist"),
        ({"messages": turns("What?", "A."), "videos": ["e.mp4"]}, r"e\.mp4: cannot be decoded"),
        ({"messages": turns("What?", "A."), "video": "empty"}, "'empty' has no frame"),
        ({"messages": turns("What?", "A."), "audios": ["a.mp3"]}, "field 'audios'.* no audio"),
        ({"messages": turns("<audio>What?", "A.")}, "field 'content'.*<audio>.*not read"),
        ({"query": "What?", "image": "0.png"}, "field 'response' is missing"),
        ({"query": "What?", "response": "A.", "history": ["b"]}, "field 'history' is"),
        (
            {"query": "What?", "response": "A.", "history": [[1, "b"]]},
            "history 0: field 'query' is 1",
        ),
        ({"conversation": [{"input": "a"}]}, "conversation 0: field 'response' is missing"),
    ],
)
def test_wrong_dialogues_are_refused_by_place(root: Path, record: Any, message: str):
    pytest.importorskip("av")
    (root / "e.mp4").write_bytes(b"no video")
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"data\.json:record 0.*{message}"):
        dialogue(root, record)


def test_a_video_without_pyav_names_the_extra(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (root / "a.mp4").write_bytes(b"a video")
    messages = turns("<video>What moves?", "A ball.")
    with pytest.raises(ValueError, match=r"record 0: video .*pip install 'instructblip\[video\]'"):
        dialogue(root, {"messages": messages, "videos": ["a.mp4"]})


def test_json_lines_that_are_named_json(root: Path):
    rows = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(2)]
    path = root / "rows.json"
    path.write_text("\n" + "\n".join(map(json.dumps, rows)))
    for lines in (rows, rows[:1]):
        path.write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        assert [e.images[0] for e in read_custom(root, "table")] == ["0.png", "1.png"][: len(lines)]
    path.write_text(json.dumps({"a": rows[0], "b": rows[1]}))  # records by name, as before
    assert [e.id for e in read_custom(root, "table")] == ["a", "b"]
    path.write_text(json.dumps(rows[0]) + "\n" + '{"image": "1.png"')
    with pytest.raises(ValueError, match=r"rows\.json:line 2: is not JSON"):
        read_custom(root, "table")


def test_raw_bytes_in_parquet(root: Path):
    data = [(root / f"{i}.png").read_bytes() for i in range(2)]
    table = pa.table({"image": data, "caption": ["A cup.", "A dog."]})
    pq.write_table(table, root / "rows.parquet")
    examples = read_custom(root, "table")
    assert [(root / e.images[0]).read_bytes() for e in examples] == data
    pq.write_table(pa.table({"images": [data], "caption": ["Both."]}), root / "rows.parquet")
    (example,) = read_custom(root, "table")
    assert [(root / name).read_bytes() for name in example.images] == data


def test_dialogues_in_parquet(root: Path):
    """Structs have all fields of all rows: those that a row lacks are null."""
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": content},
            ],
            "images": [{"bytes": (root / f"{i}.png").read_bytes(), "path": None}],
        }
        for i, content in enumerate([[{"type": "text", "text": "A cup."}]] * 2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "train.parquet")
    examples = read_custom(root, "sharegpt", path="train.parquet")
    assert [(e.question, e.answers) for e in examples] == [("What is it?", ("A cup.",))] * 2
    assert [(root / e.images[0]).read_bytes() for e in examples] == [
        (root / f"{i}.png").read_bytes() for i in range(2)
    ]


def test_several_images_in_a_cell(root: Path):
    (root / "[1].png").write_bytes((root / "1.png").read_bytes())
    (root / "1|2.png").write_bytes((root / "2.png").read_bytes())
    cells = ["0.png|1.png", "0.png | 1.png", '"[""0.png"", ""1.png""]"', "[1].png", "1|2.png"]
    (root / "rows.csv").write_text(
        "image,caption\n" + "".join(f"{cell},A cup.\n" for cell in cells)
    )
    images = [e.images for e in read_custom(root, "table")]
    assert images == [("0.png", "1.png")] * 3 + [("[1].png",), ("1|2.png",)]
    (root / "rows.csv").write_text("image,caption\n0.png|,A cup.\n")
    with pytest.raises(ValueError, match=r"rows\.csv:line 2: image name '' is empty"):
        read_custom(root, "table")


@pytest.mark.parametrize("answer", ["answer", "caption", "text"])
@pytest.mark.parametrize(
    ("heading", "value"),
    [("aufgabe", "Wie viele?"), ("ask", "colour"), ("User question", "count"), ("问题", "颜色")],
)
def test_a_question_under_any_heading_is_no_caption(
    root: Path, answer: str, heading: str, value: str
):
    (root / "rows.csv").write_text(f"image,{heading},{answer}\n0.png,{value},3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"line 2: '{answer}' would be learnt.*'{heading}'"):
        read_custom(root, "table")
    (example,) = read_custom(root, "table", columns=(("question", heading),))
    assert example.question == value
    (root / "rows.csv").write_text(f"image,task,mask_color,{answer}\n0.png,caption,red,3\n")
    assert read_custom(root, "table")[0].task == "caption"


@pytest.mark.parametrize(
    ("field", "value"), [("history", [["a", "b"]]), ("messages", [{}]), ("input", "What?")]
)
def test_a_table_refuses_fields_of_dialogues(root: Path, field: str, value: Any):
    row = {"image": "0.png", "instruction": "Say it.", "response": "A cup.", field: value}
    write_json_lines(root / "rows.jsonl", row)
    with pytest.raises(ValueError, match=rf"line 1: field '{field}'.*format: sharegpt. reads it"):
        read_custom(root, "table")
    write_json_lines(root / "rows.jsonl", {"image": "0.png", "video": "a.mp4", "caption": "A cup."})
    with pytest.raises(ValueError, match=r"line 1: field 'video'.*no video beside an image"):
        read_custom(root, "table")


STAMPS = {
    "0": "A frog.\nde.utf8=Ein Frosch.\nzh_CN.utf8=青蛙。\nzh_TW.utf8=蛙。\n",
    "1": "A dog.\nde.utf8=Ein Hund.\n",
    "2": "A cup.\n",
}


def test_captions_in_several_languages(root: Path):
    for name, text in STAMPS.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    with pytest.warns(
        UserWarning,
        match=r"\(also de, zh_CN, zh_TW\): those in 'en' are read; data\.sets\.mine\.lang",
    ):
        examples = read_custom(root, "imagefolder")
    assert [e.answers for e in examples] == [("A frog.",), ("A dog.",), ("A cup.",)]
    (root / "2.txt").write_text("en_GB.utf8=A mug.\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="'en' are read"):
        assert read_folder(root).examples[2].answers == ("A mug.",)
    with pytest.warns(UserWarning, match=r"also de, en_GB.*'zh' are read, and 2 images have none"):
        (example,) = read_custom(root, "imagefolder", language="zh")
    assert (example.images, example.answers) == (("0.png",), ("青蛙。",))
    with pytest.warns(UserWarning, match=r"data\.sets\.own\.language=zh or en chooses"):
        assert len(read_folder(root, "zh")) == 1


def test_absolute_paths_below_the_image_root(root: Path):
    """ms-swift recommends them."""
    messages = turns("<image>What is it?", "A cup.")
    (example,) = dialogue(root, {"messages": messages, "images": [str(root / "0.png")]})
    assert example.images == ("0.png",)
    for elsewhere in (root.parent / "0.png", f"{root}/../0.png", f"{root}x/0.png", f"{root}/"):
        with pytest.raises(ValueError, match=r"record 0: image name .* leaves the image root"):
            dialogue(root, {"messages": messages, "images": [str(elsewhere)]})


def test_short_and_long_answers_of_dialogues_have_their_own_tasks(tmp_path: Path) -> None:
    """Alone they are told apart as in a table; a turn of a longer dialogue is no short answer."""
    write_picture(tmp_path / "0.png")
    long = "there is a red circle at the top left. " * 3

    def record(*texts: str) -> dict[str, Any]:
        roles = ("user", "assistant") * (len(texts) // 2)
        turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        return {"messages": turns, "images": ["0.png"]}

    rows = [record("<image>shape?", "circle"), record("<image>describe it.", long)]
    rows += [record("<image>shape?", "circle", "colour?", "red")]
    rows += [{"query": "shape?", "response": "circle", "images": ["0.png"]}]
    write_json(tmp_path / "a.json", rows)
    tasks = ["vqa", "instruct", "instruct", "instruct", "instruct"]
    assert [e.task for e in read_custom(tmp_path, "sharegpt")] == tasks
    assert {e.task for e in read_custom(tmp_path, "sharegpt", task="caption")} == {"caption"}
    table = [{"image": "0.png", "question": "?", "answer": a} for a in ("circle", long)]
    write_json(tmp_path / "b.json", table)
    assert [e.task for e in read_custom(tmp_path, "table", path="b.json")] == tasks[:2]


def test_paths_of_the_folder_images_may_begin_with_its_name(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "3.png")
    write_picture(tmp_path / "images" / "images" / "4.png")
    rows = [{"image": name, "answer": "x"} for name in ("3.png", "images/3.png", "images/4.png")]
    write_json(tmp_path / "a.json", rows)
    names = [e.images for e in read_custom(tmp_path, "table", images="images")]
    assert names == [("3.png",), ("3.png",), ("images/4.png",)]
