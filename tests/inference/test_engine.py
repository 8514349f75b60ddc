"""The engine on a tiny random model: one path for answering, ranking and evaluation."""

import math
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
from instructblip.core.example import Example
from instructblip.data.chat_format import CHAT_FILE, chat_note
from instructblip.data.templates import render_prompt
from instructblip.data.tokens import Tokens
from instructblip.evaluation.calibration import Calibration, CandidateMap
from instructblip.evaluation.evaluate import evaluate
from instructblip.inference.chat import instruction_of
from instructblip.inference.details import pieces_of
from instructblip.inference.engine import Engine
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.decoding import GREEDY, Decoding
from instructblip.model.inference import rank_candidates, score_tokens
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


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["instructblip", "blip2"])
def test_details_have_the_log_probability_of_the_answer(
    kind: str, beams: int, tmp_path: Path, image_files: list[Path]
) -> None:
    engine = Engine.from_pretrained(write_model(tmp_path, kind), device="cpu", batch_size=3)
    plain = engine.answer(image_files, QUESTION, num_beams=beams, max_new_tokens=6)
    detailed = engine.answer(image_files, QUESTION, num_beams=beams, max_new_tokens=6, details=True)
    samples = engine.samples(image_files, QUESTION)
    rows = engine.respond(samples, engine.decoding.override(num_beams=beams, max_new_tokens=6))
    assert [answer.text for answer in detailed] == plain
    for sample, ids, answer in zip(samples, rows, detailed, strict=True):
        assert "".join(token.text for token in answer.tokens).strip() == answer.text
        assert answer.log_prob == pytest.approx(sum(t.log_prob for t in answer.tokens))
        assert (answer.confidence, answer.blind_log_prob) == (None, None)
        ended = answer.finish_reason == "stop"
        assert ended == (len(ids) < 6)
        whole = [[*ids, engine.tokens.eos_id]] if ended else [[*ids, 0]]
        batch = engine._collate([sample])
        (score,) = rank_candidates(engine.model, batch, [whole], include_end=ended)
        assert answer.log_prob == pytest.approx(float(score), abs=1e-4)
    single = engine.answer(
        image_files[1], QUESTION, num_beams=beams, max_new_tokens=6, details=True
    )
    assert single.log_prob == pytest.approx(detailed[1].log_prob, abs=1e-4)


def test_the_texts_of_the_likeliest_tokens_take_one_call_each(
    engine: Engine, image_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [token for token in range(5, 45) if token != engine.tokens.eos_id]
    samples, decode, calls = engine.samples(image_files[0], QUESTION), engine.tokens.decode, []
    monkeypatch.setattr(Tokens, "decode", lambda _, ids: calls.append(ids) or decode(ids))
    (known,) = engine.detail(samples, [ids], [True], likeliest=3)
    assert len(calls) < 6 * len(ids)
    whole = [[*ids, engine.tokens.eos_id]]
    (scored,) = score_tokens(engine.model, engine._collate(samples), whole, 3)
    name = engine.tokens.language.convert_ids_to_tokens
    for n, (token, score) in enumerate(zip(known.tokens, scored, strict=True)):
        added = [pieces_of(decode, [*ids[:n], one])[-1] or name(one) for one, _ in score.likeliest]
        assert [text for text, _ in token.likeliest] == added


def test_the_log_probability_is_that_of_ranking_the_text(tmp_path: Path) -> None:
    engine = Engine.from_pretrained("starter", device="cpu")
    image = write_picture(tmp_path / "a.png", (64, 64))
    for question in ("Question: is there a red cross? Short answer:", "A short image description."):
        answer = engine.answer(image, question, details=True)
        assert answer.finish_reason == "stop"
        assert "".join(token.text for token in answer.tokens) == answer.text
        ranked = engine.rank(image, question, [answer.text])[0]
        assert answer.log_prob == pytest.approx(ranked, abs=1e-4)


def test_a_blind_likelihood_is_the_mean_over_other_images(
    engine: Engine, image_files: list[Path]
) -> None:
    first, *others = image_files
    answer = engine.answer(first, QUESTION, details=True, blind=others, num_beams=1)
    ids = engine.respond(engine.samples(first, QUESTION), engine.decoding.override(num_beams=1))[0]
    ended = [answer.finish_reason == "stop"]
    about = [engine.detail(engine.samples(one, QUESTION), [ids], ended)[0] for one in others]
    mean = sum(math.exp(each.log_prob) for each in about) / len(about)
    assert answer.blind_log_prob == pytest.approx(math.log(mean), abs=1e-4)
    assert answer.blind_log_prob != pytest.approx(answer.log_prob, abs=1e-4)
    with pytest.raises(ValueError, match="blind images change the details only"):
        engine.answer(first, QUESTION, blind=others)


def test_candidates_have_probabilities_once_calibrated(
    engine: Engine, image_files: list[Path]
) -> None:
    names = ["red", "blue", "cat"]
    scores = engine.rank(image_files[0], QUESTION, names)
    plain = engine.rank(image_files[0], QUESTION, names, details=True)
    assert [c.log_likelihood for c in plain] == scores
    assert sum(c.probability for c in plain) == pytest.approx(1)
    with pytest.raises(ValueError, match="no calibration of candidates: run `instructblip calibr"):
        engine.answer_set(image_files[0], QUESTION, names)
    fitted = CandidateMap(
        samples=100, temperature=50.0, misfits=(0.2,) * 89 + (1.2,) * 11, abstain_below=None
    )
    known = Calibration(model="any", sets={"toy val": 100}, candidates=fitted)
    calibrated = Engine(engine.model, engine.tokens, engine.images, calibration=known)
    chances = [
        c.probability for c in calibrated.rank(image_files[0], QUESTION, names, details=True)
    ]
    weights = [math.exp(score / 50) for score in scores]
    assert chances == pytest.approx([w / sum(weights) for w in weights])
    order = sorted(range(3), key=lambda i: -chances[i])
    wide = calibrated.answer_set(image_files[0], QUESTION, names, coverage=0.9)
    assert wide == [names[i] for i in order if chances[i] >= math.exp(-1.2)]
    assert calibrated.answer_set(image_files[0], QUESTION, names, 0.5) == [names[order[0]]]
    assert len(calibrated.answer_set(image_files[0], QUESTION, names, coverage=0.999)) == 3
    with pytest.raises(ValueError, match="coverage must be between 0 and 1"):
        calibrated.answer_set(image_files[0], QUESTION, names, coverage=90.0)
    assert calibrated.with_images(engine.images).calibration is known


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
