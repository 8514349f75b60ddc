"""What the words of an answer come from, on tiny models whose answer depends on one place."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from torch import Tensor

from instructblip.cli import main as cli
from instructblip.cli.models import Method as CommandMethod
from instructblip.data.images import ImageTransform
from instructblip.data.samples import ImageReader
from instructblip.data.tokens import Tokens
from instructblip.inference.engine import Engine
from instructblip.inference.explain import measured
from instructblip.model.config import InstructBlipConfig, QFormerConfig, VisionConfig
from instructblip.model.explain import Method, recorded_attention, windows
from instructblip.model.inference import cross_attention
from instructblip.model.instructblip import InstructBlip
from tests.parity.tiny import LANGUAGES
from tests.testing import (
    QUESTION,
    byte_level,
    llama_like,
    t5_like,
    wordpiece,
    write_model,
    write_picture,
)

METHODS = get_args(Method)
SIDE = 32
GRID = 4


def tiny_engine(kind: str = "llama", place: int | None = 6, rows: int = 90) -> Engine:
    """A random model with images of 32 x 32 pixels on a grid of 4 x 4.

    With a ``place`` the features are those of its mean colour there and zeros elsewhere, and all
    cross-attention goes there.
    """
    text: dict[str, object] = LANGUAGES[kind] | {"vocab_size": rows}
    config = InstructBlipConfig(
        vision=VisionConfig(
            image_size=SIDE, patch_size=SIDE // GRID, hidden_size=16, intermediate_size=30,
            num_hidden_layers=2, num_attention_heads=2,
        ),
        qformer=QFormerConfig(
            vocab_size=90, hidden_size=20, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=26, max_position_embeddings=64, encoder_hidden_size=16,
        ),
        language=text,
        num_query_tokens=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = InstructBlip(config)
    for name, parameter in model.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.15 if norm else 0.4)
    if place is not None:
        _let_depend(model, place)
    decoder = kind == "llama"
    tokenizer = llama_like() if decoder else t5_like()
    tokens = Tokens(language=tokenizer, qformer=wordpiece(), decoder_only=decoder)
    return Engine(model, tokens, ImageReader(ImageTransform(image_size=SIDE)), batch_size=8)


def _let_depend(model: InstructBlip, place: int) -> None:
    def encode_image(pixel_values: Tensor) -> Tensor:
        size, (row, column) = SIDE // GRID, divmod(place, GRID)
        rows, columns = slice(row * size, (row + 1) * size), slice(column * size, None)
        colours = pixel_values[:, :, rows, columns][..., :size].mean((2, 3))  # [N, 3]
        features = torch.zeros(len(colours), 1 + GRID**2, 16)
        features[:, 1 + place, :3] = colours
        features[:, 1 + place, 3] = 4.0
        return features

    model.encode_image = encode_image  # type: ignore[method-assign]
    torch.nn.init.zeros_(model.vision_model.post_layernorm.bias)
    for layer in model.qformer.encoder.layer:
        if layer.crossattention is not None:
            attention = layer.crossattention.attention
            for parameter in (*attention.query.parameters(), *attention.key.parameters()):
                torch.nn.init.zeros_(parameter)
            attention.query.bias.data.fill_(3.0)
            attention.key.weight.data[:, 3] = 1.0


def coloured(place: int = 6, colour: str = "red") -> Image.Image:
    """Grey, with a square of a colour at a place of the grid, and another elsewhere."""
    image, size = Image.new("RGB", (SIDE, SIDE), "grey"), SIDE // GRID
    for where, paint in ((place, colour), (9, "blue")):
        row, column = divmod(where, GRID)
        image.paste(paint, (column * size, row * size, (column + 1) * size, (row + 1) * size))
    return image


def spoken_for(engine: Engine) -> str:
    """The answer that the coloured place makes likelier, compared with a grey one."""
    answers = ["red", "blue"]
    seen = engine.rank(coloured(), QUESTION, answers)
    grey = engine.rank(coloured(colour="grey"), QUESTION, answers)
    gains = [a - b for a, b in zip(seen, grey, strict=True)]
    assert max(map(abs, gains)) > 1e-3, "the model does not read the place"
    return answers[gains.index(max(gains))]


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_the_place_that_the_answer_depends_on(kind: str, method: Method) -> None:
    engine = tiny_engine(kind)
    explained = engine.explain(coloured(), QUESTION, spoken_for(engine), method)
    assert explained.maps.shape == (len(explained.words), GRID, GRID)
    for each in (explained.whole, *explained.maps):
        assert each.argmax() == 6
        assert each.max() > 0
    assert explained.whole[1, 2] > explained.whole[2, 1]  # where the other square is
    assert explained.method == method


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_words_of_an_answer(kind: str) -> None:
    engine = tiny_engine(kind)
    explained = engine.explain(coloured(), QUESTION, "red cat, blue", "features")
    assert explained.answer == "red cat, blue"
    assert explained.words == ("red", "cat,", "blue")
    whole = engine.rank(coloured(), QUESTION, ["red cat, blue", "red cat,", "red"])
    ends = [engine.explain(coloured(), QUESTION, text) for text in ("red cat, blue", "red")]
    assert sum(ends[0].scores) > whole[0]  # which has the end token too
    assert ends[0].scores[0] == pytest.approx(ends[1].scores[0], abs=1e-4)
    pieces = len(engine.tokens.response("red cat, blue")) - 1
    assert pieces > 3, "words of one token each"
    tokens = Tokens(language=byte_level(), qformer=wordpiece())
    chinese = Engine(tiny_engine(rows=260).model, tokens, engine.images)
    assert chinese.explain(coloured(), QUESTION, "红心 ok", "features").words == ("红", "心", "ok")


def test_without_an_answer_it_is_the_models_own() -> None:
    engine = tiny_engine()
    own = engine.explain(coloured(), QUESTION)
    assert own.answer == engine.answer(coloured(), QUESTION)
    given = engine.explain(coloured(), QUESTION, own.answer)
    torch.testing.assert_close(own.maps, given.maps)


@pytest.mark.parametrize("method", METHODS)
def test_a_map_for_each_image(method: Method) -> None:
    engine = tiny_engine()
    first, second = coloured(), coloured(colour="yellow")
    text = f"is <image> red or <image>? {QUESTION}"
    both = engine.explain([first, second], text, "red cat", method)
    assert isinstance(both, list)
    assert [each.maps.shape for each in both] == [(2, GRID, GRID)] * 2
    swapped = engine.explain([second, first], text, "red cat", method)
    assert isinstance(swapped, list)
    assert not torch.allclose(both[0].maps, swapped[0].maps, atol=1e-7) or method == "attention"
    same = engine.explain([first, first], text, "red cat", method)
    assert isinstance(same, list)
    assert len(same) == 2


def test_it_does_not_depend_on_the_batch() -> None:
    engine = tiny_engine(place=None)
    small = Engine(engine.model, engine.tokens, engine.images, batch_size=3)
    for method in METHODS:
        one, other = (e.explain(coloured(), QUESTION, "red cat", method) for e in (engine, small))
        torch.testing.assert_close(one.maps, other.maps, atol=1e-6, rtol=1e-5)


def test_the_model_stays_as_it_is() -> None:
    engine = tiny_engine(place=None)
    model = engine.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = engine.rank(coloured(), QUESTION, ["red"])
    modes = [module.training for module in model.modules()]
    for method in METHODS:
        engine.explain(coloured(), QUESTION, "red", method)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert "hidden_states" not in vars(model.qformer)
    assert engine.rank(coloured(), QUESTION, ["red"]) == asked
    with pytest.raises(RuntimeError, match="inside"), recorded_attention(model):
        raise RuntimeError("inside")
    assert not any("attend" in vars(module) for module in model.modules())


def test_recorded_weights_are_those_that_the_model_uses() -> None:
    engine = tiny_engine(place=None)
    batch = engine._collate(engine.samples(coloured(), QUESTION))
    with torch.no_grad(), recorded_attention(engine.model.eval()) as weights:
        plain = engine.model.encode_queries(batch)
    torch.testing.assert_close(plain, engine.model.encode_queries(batch), atol=1e-5, rtol=1e-4)
    last = weights[2, "cross"].mean(1)  # [F, Q, P]
    torch.testing.assert_close(last, cross_attention(engine.model, batch)[0])


def test_windows_cover_every_place_as_often() -> None:
    for grid, count in ((1, 1), (2, 4), (4, 16), (8, 34), (10, 48), (16, 48), (24, 41)):
        masks = windows(grid)
        assert len(masks) == count
        assert masks.flatten(1).any(1).all()
        assert len(set(masks.sum(0).flatten().tolist())) == 1
        if 4 < grid <= 10:  # no two places have the same windows
            assert len(masks.flatten(1).T.unique(dim=0)) == grid**2


def test_an_empty_answer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="an empty answer has no words to explain"):
            tiny_engine().explain(coloured(), QUESTION, empty)
    image = write_picture(tmp_path / "a.png")
    with pytest.raises(SystemExit):
        cli.main(["explain", str(image), QUESTION, "--answer", " ", "--model", "missing"])
    assert "--answer is empty; give the answer" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get_args(CommandMethod) == METHODS
    folder, image = (
        write_model(tmp_path / "model", "instructblip"),
        write_picture(tmp_path / "a.png"),
    )
    widths = []
    for answer in ("red", "red cat"):
        out = tmp_path / f"{answer}.png"
        asked = ["explain", str(image), QUESTION, "--model", str(folder), "--out", str(out)]
        with pytest.raises(SystemExit) as ended:
            cli.main([*asked, "--answer", answer])
        assert ended.value.code == 0
        widths.append(Image.open(out).width)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-5] == f"{QUESTION} -> red cat"
    assert [line.split(" % ")[1] for line in printed[-4:-2]] == ["red", "cat"]
    assert f"asked about in {measured()['right']:.0f} % of right answers" in printed[-2]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.02)  # 4 panels instead of 2
    with pytest.raises(SystemExit):
        cli.main([*asked[:-1], "a.txt"])
    assert "expected a file that ends in .png" in capsys.readouterr().err
