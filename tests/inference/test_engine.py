"""The engine on a tiny random model: one path for answering, ranking and evaluation."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import instructblip
from instructblip.core.batch import Example
from instructblip.data.chat_format import CHAT_FILE, chat_note
from instructblip.data.templates import render_prompt
from instructblip.data.tokens import Tokens
from instructblip.evaluation.evaluate import evaluate
from instructblip.inference.chat import instruction_of
from instructblip.inference.engine import Engine
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.decoding import GREEDY, Decoding
from tests.data.test_chat_format import chat_tokens
from tests.evaluation.fakes import ListDataset, benchmark
from tests.testing import QUESTION, write_model, write_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("instructblip"), "instructblip")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("image_files")
    return [write_picture(root / f"{i}.png", seed=i) for i in range(4)]


def test_one_gives_one_and_lists_give_lists(engine: Engine, image_files: list[Path]) -> None:
    one = engine.answer(image_files[0], QUESTION)
    assert isinstance(one, str)
    assert engine.answer(image_files[:1], [QUESTION]) == [one]
    assert engine.answer(str(image_files[0]), [QUESTION] * 2) == [one, one]
    many = engine.answer(image_files, QUESTION)
    assert many[0] == one
    assert len(many) == 4
    assert len(set(many)) > 1, "the tiny model does not read the image"
    with Image.open(image_files[0]) as image:
        assert engine.answer(image, QUESTION) == one


def test_answers_do_not_depend_on_the_batch(engine: Engine, image_files: list[Path]) -> None:
    questions = [QUESTION, "what?", f"{QUESTION} the red cat is blue?", "the cat", QUESTION]
    images = [*image_files, image_files[0]]
    together = engine.answer(images, questions)
    alone = [engine.answer(i, q) for i, q in zip(images, questions, strict=True)]
    assert together == alone
    assert together[0] == together[4]


def test_frames_make_a_video(engine: Engine, image_files: list[Path]) -> None:
    video = engine.answer([image_files[:4]], QUESTION)
    mixed = engine.answer([image_files[:4], [image_files[0]], image_files[:2]], QUESTION)
    assert mixed[0] == video[0]
    assert mixed[1] == engine.answer(image_files[0], QUESTION)
    assert mixed[2:] == engine.answer([image_files[:2]], QUESTION)
    assert len(engine.rank(image_files[:2], QUESTION, ["red"])) == 1


def test_images_between_words(engine: Engine, image_files: list[Path]) -> None:
    def scores(text: str, *images: Path) -> list[float]:
        return engine.rank(list(images), text, ["red", "a cat"])

    first, second = image_files[:2]
    text = "is <image> the red <image> cat?"
    assert scores(text, first, second) != pytest.approx(scores(text, second, first))
    assert scores(text, first, second) != pytest.approx(scores("is the red cat?", first, second))
    front = scores("is the red cat?", first, second)
    assert scores("<image><image>is the red cat?", first, second) == front
    with pytest.raises(ValueError, match="2 <image> and there are 1 images"):
        engine.answer(Path("missing.png"), text)


def test_stored_settings_are_the_defaults(engine: Engine, image_files: list[Path]) -> None:
    assert engine.decoding == Decoding(num_beams=2, max_new_tokens=4)
    default = engine.answer(image_files, QUESTION)
    assert default == engine.answer(image_files, QUESTION, num_beams=2, max_new_tokens=4)
    longer = engine.answer(image_files, QUESTION, max_new_tokens=12)
    assert max(map(len, longer)) > max(map(len, default))
    answered = engine.answer(image_files[0], QUESTION, temperature=None, max_new_tokens=None)
    assert answered == engine.answer(image_files[0], QUESTION, temperature=0.0)
    with pytest.raises(
        ValueError, match=r"num_beams must be a whole number from 1 to 100; got '3'"
    ):
        engine.answer(image_files[0], QUESTION, num_beams="3")
    with pytest.raises(ValueError, match=r"must be a whole number from 1 to 100; got 2.5"):
        engine.answer(image_files[0], QUESTION, num_beams=2.5)
    with pytest.raises(ValueError, match="unknown decoding setting beams: did you mean num_beams"):
        engine.answer(image_files, QUESTION, beams=2)


def test_rank_sums_over_tokens_and_end(engine: Engine, image_files: list[Path]) -> None:
    scores = engine.rank(image_files[0], QUESTION, ["red", "blue", "red cat"])
    alone = [engine.rank(image_files[0], QUESTION, [c])[0] for c in ("red", "blue", "red cat")]
    assert scores == pytest.approx(alone, abs=1e-4)
    assert all(score < 0 for score in scores)
    tokens = len(engine.tokens.response("red"))
    mean = engine.rank(image_files[0], QUESTION, ["red"], normalization="mean")[0]
    assert scores[0] == pytest.approx(mean * tokens, abs=1e-4)


def test_evaluation_gives_the_same_answers(engine: Engine, image_files: list[Path]) -> None:
    example = Example(
        dataset="toy",
        split="val",
        id="0",
        images=(image_files[0].name,),
        task="vqa",
        question="what is red?",
        answers=("red",),
        choices=("red", "blue"),
    )
    examples = [replace(example, id=str(i), images=(p.name,)) for i, p in enumerate(image_files)]
    dataset = ListDataset(examples, image_root=image_files[0].parent)
    answered = evaluate(engine, benchmark(), dataset, batch_size=2, progress=False)
    greedy = {"num_beams": 1, "repetition_penalty": 1.0}
    expected = engine.answer(image_files, QUESTION, max_new_tokens=5, **greedy)
    assert [p["prediction"] for p in answered.predictions] == expected
    ranked = evaluate(engine, benchmark(mode="rank", decoding={}), dataset, progress=False)
    for prediction, file in zip(ranked.predictions, image_files, strict=True):
        scores = engine.rank(file, QUESTION, ["red", "blue"])
        assert prediction["log_likelihoods"] == pytest.approx(scores, abs=1e-4)


def test_a_blip2_reads_no_instruction_in_its_qformer(
    tmp_path: Path, image_files: list[Path]
) -> None:
    engine = Engine.from_pretrained(write_model(tmp_path, "blip2"), device="cpu")
    assert engine.tokens.qformer is None
    assert isinstance(engine.answer(image_files[0], QUESTION), str)


def test_a_model_in_chat_format(tmp_path: Path, image_files: list[Path]) -> None:
    folder = write_model(tmp_path, "instructblip", rows=280)
    chat = chat_tokens()
    chat.language.save_pretrained(folder)
    plain = Engine.from_pretrained(folder, device="cpu")
    assert plain.tokens.chat_template is None, "a directory without a record stays as it is"
    (folder / CHAT_FILE).write_text(chat_note(chat.chat_template))
    engine = Engine.from_pretrained(folder, device="cpu")
    assert engine.fingerprint != plain.fingerprint
    assert engine.ends == (259, chat.eos_id)
    asked = instruction_of("and red?", [("what is it?", "a cat")], "be brief")
    (sample,) = engine.samples(image_files[0], [asked])
    assert sample.prompt_ids == chat.tokenize(asked, 1).prompt_ids
    assert engine.lost_tokens(asked) == 0
    # Evaluation has the same prompt for a dialogue.
    example = Example(
        dataset="mine",
        split="test",
        id="a",
        images=(str(image_files[0]),),
        task="dialogue",
        question="and red?",
        context="be brief",
        history=(("what is it?", "a cat"),),
        extra={"system": True},
    )
    (again,) = engine._example_samples([example], [render_prompt(example, "{question}")], Path())
    assert again.prompt_ids == sample.prompt_ids
    assert again.image_places == sample.image_places != ()
    # An answer ends at the end token of the format, which the model's settings do not know.
    (whole,) = engine.respond([sample], GREEDY.override(max_new_tokens=6))
    assert len(whole) > 2
    assert engine.tokens._chat is not None
    ending = replace(engine.tokens._chat, end_id=whole[2])
    object.__setattr__(engine.tokens, "_chat", ending)
    (cut,) = engine.respond([sample], GREEDY.override(max_new_tokens=6))
    assert cut == whole[: whole.index(whole[2])]


def test_a_model_without_an_end_token_ends_at_the_tokenizers(
    engine: Engine, image_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (sample,) = engine.samples(image_files[0], [QUESTION])
    six = GREEDY.override(max_new_tokens=6)
    (whole,) = engine.respond([sample], six)
    assert len(whole) == 6
    monkeypatch.setattr(engine.model.language_model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(Tokens, "eos_id", property(lambda _: whole[2]))
    assert engine.respond([sample], six) == [whole[: whole.index(whole[2])]]


def test_an_aware_model_needs_its_qformer_tokenizer(engine: Engine) -> None:
    with pytest.raises(ValueError, match="qformer_tokenizer"):
        Engine(engine.model, replace(engine.tokens, qformer=None), engine.images)


def test_fingerprint_follows_the_weights(folder: Path, engine: Engine, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    assert fingerprint(other, True) == engine.fingerprint
    weights = load_file(other / "model.safetensors")
    weights["query_tokens"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert fingerprint(other, True) != engine.fingerprint
    assert Engine.from_pretrained(folder, device="cpu").fingerprint == engine.fingerprint
    plain = Engine.from_pretrained(folder, device="cpu", instruction_aware=False)
    assert plain.fingerprint != engine.fingerprint


def test_bad_images_and_counts_are_named(
    engine: Engine, image_files: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="4 images and 2 instructions"):
        engine.answer(image_files, [QUESTION] * 2)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        engine.answer(tmp_path / "missing.png", QUESTION)
    (tmp_path / "cut.png").write_bytes(image_files[0].read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut\.png"):
        engine.answer(tmp_path / "cut.png", QUESTION)
    with pytest.raises(ValueError, match="without frames"):
        engine.answer([[]], QUESTION)


def test_importing_the_package_does_not_import_torch(folder: Path) -> None:
    code = "import sys, instructblip; sys.exit('torch' in sys.modules)"
    source = str(Path(instructblip.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert instructblip.Engine is Engine
    assert set(instructblip.__all__) <= set(dir(instructblip))
    assert isinstance(instructblip.load(folder, device="cpu"), Engine)
    with pytest.raises(AttributeError, match="no attribute 'engine2'"):
        instructblip.engine2  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
