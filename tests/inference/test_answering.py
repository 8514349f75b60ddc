"""Answering from the command line, in batches, piece by piece and over several turns."""

import csv
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from instructblip.cli import main as cli
from instructblip.core.terminal import escape
from instructblip.inference.batch import (
    answer_requests,
    read_requests,
    write_answers,
)
from instructblip.inference.chat import (
    Conversation,
    instruction_of,
    run_chat,
)
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import OTHERS, open_images, open_others
from instructblip.inference.streaming import TextStream
from instructblip.model.decoding import Decoding
from tests.testing import QUESTION, write_model, write_picture, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("instructblip"), "instructblip")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("image_files")
    return [write_picture(root / f"{i}.png", seed=i) for i in range(5)]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--debug"])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


@pytest.mark.parametrize("beams", [1, 2])
def test_streamed_pieces_are_the_answer(
    engine: Engine, image_files: list[Path], beams: int
) -> None:
    decoding: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 12}
    for file in image_files:
        pieces = list(engine.stream(file, QUESTION, **decoding))
        assert "".join(pieces) == engine.answer(file, QUESTION, **decoding)
    assert (len(pieces) > 2) == (beams == 1)


def test_a_stream_can_be_closed(engine: Engine, image_files: list[Path]) -> None:
    stream = engine.stream(image_files[0], QUESTION, num_beams=1, max_new_tokens=40)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.answer(image_files[0], QUESTION, num_beams=1, max_new_tokens=40).startswith(first)
    with pytest.raises(ValueError, match="unknown decoding setting"):
        list(engine.stream(image_files[0], QUESTION, beams=3))


class Bytes:
    """Decodes like a byte-level tokenizer: half a character is a replacement character."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace").strip()


def test_no_half_characters_and_nothing_after_the_end() -> None:
    ids = list("né 中 文".encode())
    stream = TextStream(Bytes(), ends=(0,))
    pieces = [stream.add(i) for i in [*ids, 0, 65, 66]]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.rest(ids) == "né 中 文"
    assert pieces[-3:] == ["", "", ""]


def test_the_papers_decoding_is_the_default(folder: Path) -> None:
    engine = Engine.from_pretrained(folder, device="cpu")
    assert engine.decoding == Decoding(num_beams=2, max_new_tokens=4, repetition_penalty=1.5)


def test_command_answers_one_image(
    folder: Path, image_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder), "--instruction", QUESTION]
    code, out, _ = call(capsys, "answer", "--image", str(image_files[0]), *options)
    assert code == 0
    expected = Engine.from_pretrained(folder, device="cpu").answer(image_files[0], QUESTION)
    assert out == escape(expected) + "\n"
    _, longer, _ = call(
        capsys, "answer", "--image", str(image_files[0]), *options, "--max-new-tokens", "9"
    )
    assert len(longer) > len(out)
    with pytest.raises(ValueError, match="either --image IMAGE or --batch"):
        cli.main(["answer", "--debug"])


def test_command_answers_a_folder_and_a_jsonl_like_one_by_one(
    folder: Path, image_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine.from_pretrained(folder, device="cpu")
    alone = [engine.answer(p, QUESTION) for p in image_files]
    out = tmp_path / "deep" / "answers.jsonl"
    options = ["--model", str(folder), "--out", str(out), "--instruction", QUESTION]
    code, printed, _ = call(capsys, "answer", "--batch", str(image_files[0].parent), *options)
    assert code == 0
    assert "5 answers in" in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["answer"] for r in records] == alone
    assert records[1]["image"] == "1.png"

    requests = image_files[0].parent / "requests.jsonl"
    lines: list[dict[str, Any]] = [
        {"image": "1.png", "id": 7},
        {"image": ["0.png", "1.png"], "instruction": "what?"},
        {"image": "absent.png"},
    ]
    requests.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, printed, _ = call(capsys, "answer", "--batch", str(requests), *options)
    assert code == 1
    assert "2 answers" in printed
    assert "1 with an error" in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records[0] == {"image": "1.png", "id": 7, "instruction": QUESTION, "answer": alone[1]}
    assert records[1]["answer"] == engine.answer([[image_files[0], image_files[1]]], "what?")[0]
    assert "absent.png does not exist" in records[2]["error"]
    requests.unlink()


def test_command_writes_a_csv_and_texts_beside_the_images(
    folder: Path, image_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine.from_pretrained(folder, device="cpu")
    images = shutil.copytree(image_files[0].parent, tmp_path / "images")
    (images / "3.png").write_bytes(b"no image")
    out = tmp_path / "answers.csv"
    command = ["answer", "--batch", str(images), "--instruction", QUESTION, "--out", str(out)]
    command += ["--txt", "--model", str(folder)]
    code, printed, _ = call(capsys, *command)
    assert code == 1
    assert "4 answers in" in printed
    with out.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "instruction", "answer", "error"]
    for row, path in zip(rows, image_files, strict=True):
        text = images / f"{path.stem}.txt"
        if path.stem == "3":
            assert row["error"]
            assert not text.exists()
            continue
        answer = engine.answer(path, QUESTION)
        assert (row["image"], row["answer"]) == (path.name, answer)
        assert text.read_text() == " ".join(answer.split()) + "\n"

    with pytest.raises(ValueError, match=r"0\.txt exists, as do 3 others of 5: move them away"):
        cli.main([*command[:-1], "absent", "--debug"])  # before the model is read
    requests = images / "requests.jsonl"
    lines = [{"image": ["3.png", "4.png"], "id": 7}, {"image": "3.png", "tags": {"a": "é"}}]
    requests.write_text("\n".join(map(json.dumps, lines)))
    command[2] = str(requests)
    with pytest.raises(ValueError, match=r"2 requests would share .*3\.txt"):
        cli.main([*command, "--debug"])
    code, _, _ = call(capsys, *(word for word in command if word != "--txt"))
    with out.open(encoding="utf-8-sig", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["image"], first["id"], first["tags"]) == ('["3.png", "4.png"]', "7", "")
    assert (second["id"], second["tags"]) == ("", '{"a": "é"}')
    with pytest.raises(ValueError, match="--txt writes beside the images of --batch"):
        cli.main(["answer", "--image", "a.png", "--txt", "--instruction", "x", "--debug"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"image": 3}', "line 2: 'image' is 3"),
        ('{"image": "a.png"}', "line 2: no 'instruction'"),
        ('{"image": "../a.png", "instruction": "x"}', r"\.\./a\.png"),
    ],
)
def test_bad_requests_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"image": "a.png", "instruction": "x"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_requests(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        read_requests(tmp_path / "empty", "what?")
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        read_requests(tmp_path / "absent", "what?")


def test_requests_with_byte_order_mark_and_other_separators(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    line = json.dumps({"image": "a.png", "instruction": "one\u2028two"}, ensure_ascii=False)
    file.write_text(f"\ufeff{line}\r\n{line}\n", encoding="utf-8")
    assert [r.instruction for r in read_requests(file)] == ["one\u2028two"] * 2
    file.write_bytes(f'{line}\n{{"image": "é.png"}}'.encode("latin-1", errors="replace"))
    with pytest.raises(ValueError, match=r"requests\.jsonl, line 2: not UTF-8"):
        read_requests(file)


def test_a_file_of_earlier_answers_is_answered_again(
    engine: Engine, image_files: list[Path], tmp_path: Path
) -> None:
    file = image_files[0].parent / "retry.jsonl"
    line = {
        "image": "0.png",
        "instruction": QUESTION,
        "error": "was busy",
        "answer": "old",
        "id": 3,
    }
    file.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'image': 'absent.png'})}")
    ((good, bad),) = answer_requests(engine, read_requests(file))
    file.unlink()
    assert set(good) == {"image", "instruction", "id", "answer"}
    assert good["answer"] == engine.answer(image_files[0], QUESTION)
    assert set(bad) == {"image", "instruction", "id", "error"}
    assert "absent.png does not exist" in bad["error"]


def test_a_path_that_cannot_be_written_is_reported_before_the_model_is_read(
    image_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["answer", "--batch", str(image_files[0].parent), "--instruction", QUESTION]
    command += ["--model", "absent"]
    code, _, err = call(capsys, *command, "--out", str(tmp_path))
    assert code == 2
    assert f"'{tmp_path}' is a directory" in err
    with pytest.raises(FileExistsError, match=r"0\.png"):
        cli.main([*command, "--out", str(image_files[0] / "answers.jsonl"), "--debug"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-beams 0", "num_beams must be a whole number from 1 to 100; got 0"),
        ("--top-p 2", "top_p must be a number above 0 and up to 1; got 2"),
        ("--length-penalty nan", "length_penalty must be a number from -10 to 10; got nan"),
        ("--temperature -1", "temperature must be a number from 0.001 to 2; got -1"),
        ("--temperature 0 --top-p 0.9", "temperature must be a number from 0.001 to 2; got 0"),
        (
            "--min-new-tokens 50 --max-new-tokens 10",
            "min_new_tokens 50 is above max_new_tokens 10",
        ),
        ("--instruction=", "--instruction is empty"),
        ("--image .", r"\. is a folder"),
    ],
)
def test_wrong_options_are_reported_before_the_model_is_read(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cli.main(["answer", "--image", ".", "--instruction", "a", *arguments.split(), "--debug"])


def test_a_truncated_prompt_raises_a_warning(tmp_path: Path, image_files: list[Path]) -> None:
    engine = Engine.from_pretrained(write_model(tmp_path / "blip2", "blip2"), device="cpu")
    with pytest.warns(UserWarning, match="more than 128 tokens: it lost its beginning"):
        engine.answer(image_files[0], "what? " * 130)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a prompt")
        engine.answer(image_files[0], "what?")


def test_a_question_that_is_no_utf8_is_answered(engine: Engine, image_files: list[Path]) -> None:
    lines = iter(["what\udcff?", "/quit"])
    conversation = Conversation(image_files[:1])
    run_chat(engine, conversation, lambda: next(lines), lambda _: None, max_new_tokens=3)
    assert [question for question, _ in conversation.turns] == ["what??"]


def test_a_batch_of_bad_images_only(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    ((record,),) = answer_requests(engine, read_requests(tmp_path, "what?"))
    assert "cannot be decoded" in record["error"]


def test_chat_remembers_turns_and_images(engine: Engine, image_files: list[Path]) -> None:
    shown: list[str] = []
    lines = iter(
        f"what?;/image {image_files[0]} {image_files[1]};what?;/nonsense;and red?;"
        "/reset;what?;/image;/image nowhere.png;/help;".split(";")
    )

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    conversation = Conversation()
    run_chat(engine, conversation, read, shown.append, num_beams=1, max_new_tokens=6)
    text = "".join(shown)
    frames = [[image_files[0], image_files[1]]]
    decoding: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 6}
    (first,) = engine.answer(frames, "what?", **decoding)
    asked = f"Dialog history: Question: what? Answer: {first}. and red?"
    (second,) = engine.answer(frames, asked, **decoding)
    expected_parts = ["no image yet", first, "no command /nonsense", second, first]
    expected_parts += ["/image needs a path", "nowhere.png does not exist", "Commands:"]
    place = 0
    for expected in expected_parts:
        place = text.index(expected, place)
    assert conversation.turns == [("what?", first)]


def test_a_video_is_four_of_its_frames(engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = tmp_path / "a clip.mp4"
    write_video(clip, [(250, 20, 20)] * 20 + [(20, 20, 250)] * 20)
    frames = open_images([clip])
    reds = [image.getpixel((30, 20))[0] for image in frames]  # type: ignore[union-attr]
    assert [red > 128 for red in reds] == [True, True, False, False]
    decoding: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 6}
    (expected,) = engine.answer([frames], QUESTION, **decoding)
    ((record,),) = answer_requests(engine, read_requests(tmp_path, QUESTION), **decoding)
    assert record["answer"] == expected
    lines = iter([f"/image '{clip}'", QUESTION, "/quit"])
    shown: list[str] = []
    run_chat(engine, Conversation(), lambda: next(lines), shown.append, **decoding)
    assert expected in "".join(shown)
    clip.write_bytes(b"no video")
    ((record,),) = answer_requests(engine, read_requests(tmp_path, QUESTION))
    assert "a clip.mp4: cannot be decoded" in record["error"]


def test_history_is_written_as_in_the_data() -> None:
    assert instruction_of("What?", []).prompt == "What?"
    assert "Answer: red" in instruction_of("What?", [("Which colour?", "red")]).prompt


class Echo(Engine):
    """Answers with the instruction."""

    def __init__(self) -> None:
        self.batch_size = 4

    def answer(self, images: Any, instructions: Any, **decoding: Any) -> list[str]:
        return instructions


FORMULAS = [
    '=HYPERLINK("https://evil.example","a")',
    "@SUM(1)",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    " =1+1",
    "\t=1",
    "\ufeff=1",
    "＝1+1",
]
HARMLESS = ["-5", "+1,000.5", "12 %", "a cup = red", "'quoted'", "a\n=1"]


def test_a_csv_has_no_formula(image_files: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    image = str(Path(shutil.copy(image_files[0], tmp_path)).name)
    lines = [
        {"image": image, "instruction": text, "=A1": text, "n": -5} for text in FORMULAS + HARMLESS
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "answers.csv"
    assert write_answers(Echo(), read_requests(file), out) == 0
    with out.open(encoding="utf-8-sig", newline="") as table:
        header, *rows = csv.reader(table)
    assert header == ["image", "instruction", "'=A1", "n", "answer", "error"]
    for (_, *texts, number, answer, _), text in zip(rows, FORMULAS + HARMLESS, strict=True):
        shown = f"'{text}" if text in FORMULAS else text
        assert [*texts, number, answer] == [shown, shown, "-5", shown]

    write_answers(Echo(), read_requests(file), tmp_path / "answers.jsonl")
    read = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in read] == FORMULAS + HARMLESS


def test_a_folder_stands_for_some_of_its_images(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "notes.txt").write_text("no image")
    several = [Path(str(path)).name for path in open_others([tmp_path])]
    assert several == ["00.png", "03.png", "06.png", "09.png", "12.png", "15.png", "18.png"]
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (8, 8)).save(few / "a.jpg")
    assert open_others([few, tmp_path / "05.png"]) == [few / "a.jpg", tmp_path / "05.png"]
    assert len(several) <= OTHERS
    (few / "a.jpg").unlink()
    with pytest.raises(ValueError, match="few holds no images"):
        open_others([few])
