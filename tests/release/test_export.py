"""An exported model gives the same answers in transformers."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from instructblip.evaluation.evaluate import evaluate
from instructblip.inference.embedder import Embedder
from instructblip.inference.engine import Engine
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.checkpoints.transformers import TEXT_BRANCH_FILE
from instructblip.model.instructblip import InstructBlip
from instructblip.model.retrieval import Heads, similarity, write_heads
from instructblip.release.export import export_model
from tests.evaluation.fakes import FakeEngine, benchmark, colour_questions
from tests.testing import QUESTION, add_heads, write_model, write_picture


def test_transformers_model_and_processor_answer_as_the_engine(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "instructblip", rows=261)  # one more for <image>
    export_model(source, tmp_path / "out")
    engine = Engine.from_pretrained(tmp_path / "out", device="cpu")
    processor = InstructBlipProcessor.from_pretrained(tmp_path / "out")
    model = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    file = write_picture(tmp_path / "a.png", seed=3)
    image = Image.open(file).convert("RGB")
    inputs = processor(images=image, text=QUESTION, return_tensors="pt")
    pixels = engine.images.transform(image)
    sample = engine.sample(("a",), (pixels,), QUESTION)
    placeholders = model.config.num_query_tokens
    assert inputs["input_ids"][0].tolist() == [260] * placeholders + sample.prompt_ids
    assert inputs["qformer_input_ids"][0].tolist() == sample.qformer_ids
    torch.testing.assert_close(inputs["pixel_values"][0], pixels, rtol=0, atol=1e-5)
    ids = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=6)[0]
    answer = engine.tokens.decode(ids[len(inputs["input_ids"][0]) :].tolist())
    greedy = {"num_beams": 1, "max_new_tokens": 6, "repetition_penalty": 1.0}
    assert answer == engine.answer(file, QUESTION, **greedy)


TEXTS = ["what colour is the cat?", "a small red circle", "blue"]


def test_an_exported_search_scores_in_transformers_as_here(tmp_path: Path) -> None:
    source = add_heads(write_model(tmp_path / "source", "instructblip"))
    export_model(source, tmp_path / "out", "retrieval")
    ours, again = (
        Embedder.from_pretrained(tmp_path / name, device="cpu") for name in ("source", "out")
    )
    model, info = Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = Blip2Processor.from_pretrained(tmp_path / "out")
    images = [Image.open(write_picture(tmp_path / f"{i}.png", seed=i)) for i in range(3)]
    given = processor(images=images, text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        cosine = model.eval()(**given).logits_per_image
        fits = model(**given, use_image_text_matching_head=True).logits_per_image.softmax(1)[:, 1]
    for embedder in (ours, again):
        scores = similarity(embedder.embed(images=images), embedder.embed(texts=TEXTS))
        assert (scores - cosine).abs().max() < 1e-5
        assert (embedder.match(images, TEXTS) - fits).abs().max() < 1e-5
    assert cosine.std() > 0.01
    assert fits.std() > 0.01
    assert "Blip2ForImageTextRetrieval" in (tmp_path / "out" / "README.md").read_text()


def test_heads_that_do_not_match_are_not_exported(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "instructblip")
    with pytest.raises(ValueError, match="no retrieval heads"):
        export_model(source, tmp_path / "out", "retrieval")
    heads = Heads(20, 8)
    del heads.match_head
    write_heads(heads, InstructBlip.from_pretrained(source), source)
    with pytest.raises(ValueError, match="the heads of the stage retrieval do not"):
        export_model(source, tmp_path / "out", "retrieval")
    assert not (tmp_path / "out").exists()


def test_results_of_another_model_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "instructblip")
    engine = FakeEngine(fingerprint=fingerprint(source, True))
    result = evaluate(engine, benchmark(), colour_questions())
    other = evaluate(FakeEngine(), benchmark(), colour_questions())
    with pytest.raises(ValueError, match="results of toy are another model's"):
        export_model(source, tmp_path / "out", results=[other])
    assert not (tmp_path / "out").exists()
    export_model(source, tmp_path / "out", results=[result])
    assert "| toy | 100.0 [" in (tmp_path / "out" / "README.md").read_text()


def test_a_fingerprint_covers_all_that_answers_depend_on(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "instructblip")
    fingerprints = {fingerprint(source, True), fingerprint(source, False)}
    for name in ("preprocessor_config.json", "qformer_tokenizer/tokenizer.json", "config.json"):
        file = source / name
        assert file.is_file(), name
        file.write_text(file.read_text() + " ")
        fingerprints.add(fingerprint(source, True))
    assert len(fingerprints) == 5


def test_a_blip2_keeps_the_text_branch_beside_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "blip2")
    (source / TEXT_BRANCH_FILE).write_bytes(b"as it was")
    export_model(source, tmp_path / "out")
    assert (tmp_path / "out" / TEXT_BRANCH_FILE).read_bytes() == b"as it was"
