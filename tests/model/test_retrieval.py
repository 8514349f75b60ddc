"""Retrieval: parity with transformers' Blip2ForImageTextRetrieval, and heads that stay with a model
however it is trained further."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from instructblip.data.images import ImageTransform
from instructblip.experiment.pretrain import pretrain
from instructblip.experiment.train import train
from instructblip.inference.embedder import Embedder
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.transformers import RETRIEVAL_FILE
from instructblip.recipe.load import load_recipe
from instructblip.scenes.official import write_scenes
from tests.parity.tiny import tiny_config
from tests.testing import wordpiece, write_model

TEXTS = ["what colour is the cat?", "a small red circle", "how many dogs", "blue"]


def images(count: int = 4, side: int = 16) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 255, (count, side, side, 3), generator=generator)
    return [Image.fromarray(value.to(torch.uint8).numpy()) for value in values]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of transformers' Blip2ForImageTextRetrieval with random weights."""
    torch.manual_seed(0)
    arguments = tiny_config()
    arguments["qformer_config"] |= {
        "vocab_size": 90,
        "max_position_embeddings": 64,
        "use_qformer_text_input": True,
    }
    del arguments["image_token_index"]
    model = Blip2ForImageTextRetrieval(Blip2Config(**arguments, image_text_hidden_size=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.15)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    ImageTransform(image_size=16).save_pretrained(folder)
    return folder


def test_similarity_and_matching_equal_transformers(theirs: Path) -> None:
    model = Blip2ForImageTextRetrieval.from_pretrained(theirs).eval()
    ours = Embedder.from_pretrained(theirs, device="cpu")
    shown = images()
    pixels = torch.stack([ours.pixels(image) for image in shown])
    ids, mask = ours.ids(TEXTS)
    assert not mask.all(), "a text has to be padded"
    with torch.no_grad():
        cosine = model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits_per_image
        logits = model(
            pixel_values=pixels,
            input_ids=ids,
            attention_mask=mask,
            use_image_text_matching_head=True,
        ).logits_per_image
    embedded, texts = ours.embed(images=shown), ours.embed(texts=TEXTS)
    assert embedded.shape == (4, 3, 8)
    assert torch.allclose(embedded.norm(dim=-1), torch.ones(4, 3))
    scores = torch.einsum("iqe,je->ijq", embedded, texts).amax(2)
    assert (scores - cosine).abs().max() < 1e-5
    assert (ours.match(shown, TEXTS) - logits.softmax(1)[:, 1]).abs().max() < 1e-5
    assert logits.softmax(1)[:, 1].std() > 0.01, "random weights must make a difference"


def test_an_embedding_follows_the_instruction(theirs: Path) -> None:
    ours = Embedder.from_pretrained(theirs, device="cpu")
    plain, asked, other = (
        ours.embed(images=images(2), instruction=text) for text in (None, "the cat", "the dog")
    )
    assert not torch.allclose(plain, asked, atol=1e-3)
    assert not torch.allclose(asked, other, atol=1e-3)


def test_what_cannot_be_embedded_is_refused(theirs: Path, tmp_path: Path) -> None:
    ours = Embedder.from_pretrained(theirs, device="cpu")
    with pytest.raises(ValueError, match="either images or texts"):
        ours.embed()
    with pytest.raises(ValueError, match="a text is empty"):
        ours.embed(texts=["a", " "])
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        ours.match(images(2), ["a", "b", "c"])
    model = write_model(tmp_path / "model", "instructblip")
    remedy = r"no retrieval heads .*instructblip pretrain retrieval_scenes --stage retrieval"
    with pytest.raises(ValueError, match=remedy):
        Embedder.from_pretrained(model)
    with pytest.raises(ValueError, match=r"^starter has .*model\.start=starter`"):
        Embedder.from_pretrained("starter")
    with pytest.raises(ValueError, match=remedy):
        Engine.from_pretrained(model, device="cpu").embed(texts="a")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of two steps on a corner of Scenes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("retrieval")
    write_scenes(folder / "scenes", seed=0, scale=0.02)
    settings = [f"data.root={folder / 'scenes'}", "training.steps=2", "training.batch_size=6"]
    settings += ["training.warmup_steps=1", "training.save_every=2", "data.max_instruction=40"]
    settings += ["training.learning_rate=0.01", "evaluation.validation=[]"]
    return [*settings, f"model.start={write_model(folder / 'start', 'blip2')}"]


def embedded(path: Path) -> torch.Tensor:
    embedder = Embedder.from_pretrained(path, device="cpu")
    shown = images(2)
    parts = [embedder.embed(images=shown), embedder.embed(texts=TEXTS)]
    return torch.cat([*(part.flatten() for part in parts), embedder.match(shown, TEXTS[:2])])


def test_retrieval_of_stage_1_stays_as_it_was_however_the_model_is_trained(
    short: list[str], tmp_path: Path
) -> None:
    pretrain(
        load_recipe("pretrain_scenes", [*short, "model.text_branch=random"]), 1, tmp_path / "one"
    )
    first = embedded(tmp_path / "one")
    assert set(load_file(tmp_path / "one" / "last" / RETRIEVAL_FILE)) == {
        *(f"{head}.{part}" for head in ("vision_projection", "text_projection", "itm_head")
          for part in ("weight", "bias")),
        "temp",
    }  # fmt: skip
    engine = Engine.from_pretrained(tmp_path / "one", device="cpu")
    assert torch.equal(engine.embed(texts=TEXTS).flatten(), first[-2 - len(TEXTS) * 256 : -2])
    start = f"model.start={tmp_path / 'one'}"
    pretrain(load_recipe("pretrain_scenes", [*short[:-1], start]), 2, tmp_path / "two")
    assert torch.equal(embedded(tmp_path / "two"), first)
    start = f"model.start={tmp_path / 'two'}"
    train(
        load_recipe("scenes", [*short[:-1], start, "evaluation.benchmarks=[]"]), tmp_path / "tuned"
    )
    assert torch.equal(embedded(tmp_path / "tuned"), first)


def test_the_stage_of_retrieval_leaves_the_model_as_it_is(short: list[str], tmp_path: Path) -> None:
    recipe = load_recipe("retrieval_scenes", [*short, "model.text_branch=random"])
    pretrain(recipe, "retrieval", tmp_path / "run")
    start, last = Path(short[-1].partition("=")[2]), tmp_path / "run" / "last"
    before, after = (load_file(path / "model.safetensors") for path in (start, last))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    embedder = Embedder.from_pretrained(tmp_path / "run", device="cpu")
    assert embedder.embed(images=images(2)).isfinite().all()
    assert embedder.embed(texts=TEXTS).isfinite().all()
    with pytest.raises(ValueError, match=r"embed and do not match.*--stage 1"):
        embedder.match(images(1), TEXTS)
