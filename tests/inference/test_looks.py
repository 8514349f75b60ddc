"""Where the queries look, as pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instructblip.cli import main as cli
from instructblip.inference.engine import Engine
from instructblip.inference.looks import draw_looks, heat_map, lines
from tests.testing import write_model, write_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("instructblip"), "instructblip")


def test_heat_maps_are_bright_where_the_query_looks() -> None:
    attention = torch.zeros(4, 4)
    attention[1, 1] = 1
    bright = heat_map(Image.new("RGB", (30, 20), "grey"), attention, side=40).convert("L")
    assert bright.getpixel((15, 15)) > bright.getpixel((35, 35))  # type: ignore[operator]


def test_one_panel_for_the_image_and_one_for_each_instruction(folder: Path, tmp_path: Path) -> None:
    engine, image = Engine.from_pretrained(folder), write_picture(tmp_path / "a.png")
    asked = ["what is this?", "costs $5 or $6? <b>" + " long" * 60]
    answers = draw_looks(engine, image, asked, tmp_path / "looks.png")
    assert answers == [engine.answer(image, text) for text in asked]
    drawn = np.asarray(Image.open(tmp_path / "looks.png").convert("L"))
    one = draw_looks(engine, Image.open(image), asked[:1], tmp_path / "one.png")
    assert one == answers[:1]
    width = Image.open(tmp_path / "one.png").width
    assert drawn.shape[1] == pytest.approx(1.5 * width, rel=0.02)
    assert drawn.std() > 10
    with pytest.raises(ValueError, match="at least one instruction"):
        draw_looks(engine, image, [], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_lines_fit_a_panel() -> None:
    assert lines("") == ""
    assert lines("what color is the only heart of this image, please?").count("\n") == 1
    chinese = lines("第二行第四列是什么颜色的形状？请用中文回答这个比较长的问题，谢谢你。")
    assert max(map(len, chinese.splitlines())) <= 21
    assert lines("the word 红心 " * 99).endswith("[...]")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = write_picture(tmp_path / "a.png"), tmp_path / "looks.svg"
    asked = ["look", str(image), "what is this?", "--model", str(folder), "--out"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, str(out)])
    assert ended.value.code == 0
    assert out.read_text().rstrip().endswith("</svg>")
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, str(tmp_path / "a.txt")])
    assert ended.value.code
    assert "expected a file that ends in .png" in capsys.readouterr().err
