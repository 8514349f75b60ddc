"""The starter as ONNX: onnxruntime, and a page in headless Chromium, answer as the engine."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from instructblip.data.images import ImageTransform
from instructblip.data.tokens import load_tokenizer
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.directory import model_directory
from instructblip.release import onnx as release_onnx
from instructblip.release import web
from runs.screenshots import browser_page

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "node_modules/onnxruntime-web"))
CODE = Path(web.__file__).with_name("page.js")
QUESTIONS = [
    "what color is the circle?",
    "How many shapes?",
    "Describe the image.",
    "left or right?",
]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("onnx") / "starter"
    release_onnx.export_onnx("starter", out)
    return out


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("starter", device="cpu", decoding={"num_beams": 1})


def test_onnxruntime_answers_as_the_engine(graphs: Path, engine: Engine, png: list[Path]) -> None:
    model = release_onnx.OnnxModel(graphs)
    for image in png:
        for text in QUESTIONS:
            steps = list(model.generate(image, text))
            ids = [token for token, _ in steps]
            assert model.tokens.decode(ids) == engine.answer(image, text)
            sample = engine.samples(image, text)
            assert ids == engine.respond(sample, engine.decoding)[0]
            first = engine.read(sample)[0].logits.numpy()
            np.testing.assert_allclose(steps[0][1], first, atol=1e-4, rtol=0)


def test_weights_in_8_bits(graphs: Path, engine: Engine, png: list[Path], tmp_path: Path) -> None:
    small = tmp_path / "int8"
    shutil.copytree(graphs, small)
    for part in release_onnx.PARTS:
        file = small / f"{part}.onnx"
        before = file.stat().st_size
        release_onnx._store_in_8_bits(file)
        assert file.stat().st_size < before / 3
    model = release_onnx.OnnxModel(small)
    assert model.answer(png[0], QUESTIONS[0]) == engine.answer(png[0], QUESTIONS[0])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_answers_offline(
    graphs: Path, engine: Engine, png: list[Path], tmp_path: Path
) -> None:
    files = [RUNTIME / "dist" / name for name in web.RUNTIME]
    if not all(file.is_file() for file in files):
        pytest.skip("no onnxruntime-web: its folder is in the variable ONNXRUNTIME_WEB")
    small = tmp_path / "int8"
    shutil.copytree(graphs, small)
    for part in release_onnx.PARTS:
        release_onnx._store_in_8_bits(small / f"{part}.onnx")
    file = tmp_path / "index.html"
    file.write_text(web.page(small, files, "starter"), encoding="utf-8")
    assert file.stat().st_size < 20e6
    with browser_page("en-GB") as page:
        page.unroute_all()
        page.context.set_offline(True)
        page.goto(file.as_uri())
        page.get_by_text("Ready after").wait_for()
        for image in png[:2]:
            page.set_input_files("#image", image)
            for text in QUESTIONS[:2]:
                page.fill("#question", text)
                page.click("#ask:not([disabled])")
                page.locator("#ask:not([disabled])").wait_for()
                assert page.locator("#answer").inner_text() == engine.answer(image, text)
                print(page.locator("#state").inner_text())
        bad = tmp_path / "bad.png"
        bad.write_text("no image")
        page.set_input_files("#image", bad)
        page.get_by_text("not an image").wait_for()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_without_simd(tmp_path: Path) -> None:
    text = (CODE.with_name("page.html")).read_text(encoding="utf-8")
    file = tmp_path / "index.html"
    file.write_text(text.replace("__RUNNER__", CODE.read_text(encoding="utf-8")), encoding="utf-8")
    with browser_page("en-GB") as page:
        page.unroute_all()
        page.add_init_script("WebAssembly.validate = () => false")
        page.goto(file.as_uri())
        page.get_by_text("This browser has no WebAssembly SIMD").wait_for()


@pytest.fixture
def node(tmp_path: Path) -> Callable[[str, Any], Any]:
    """Runs a function of page.js on a value, both as JSON."""
    if NODE is None:
        pytest.skip("no node on this machine")

    def run(body: str, value: Any) -> Any:
        file = tmp_path / "value.json"
        file.write_text(json.dumps(value), encoding="utf-8")
        script = f"const page = require({json.dumps(str(CODE))});"
        script += f"const value = JSON.parse(require('fs').readFileSync({json.dumps(str(file))}));"
        script += f"console.log(JSON.stringify({body}))"
        return json.loads(subprocess.check_output([NODE, "-e", script], encoding="utf-8"))

    return run


TEXTS = [
    "",
    "what color is the circle?",
    "  Two  spaces, and\ttabs\nlines  ",
    "it's the dog's; we'll, I'd, you've - 3.14 & 42%",
    "Café ÅNGSTRÖM straße ΣΊΣΥΦΟΣ İstanbul",
    "图片里有什么? 三个圆。 かな カナ 한국어",
    "emoji 😀 zero\u200bwidth nbsp\u00a0x \ufeff bom",
    "</s> [CLS] <image-like> \x00\x01 $^`|~+=<>",
    "x" * 150,
    "supercalifragilistic antidisestablishmentarianism",
]


@pytest.mark.parametrize("beside", ["", "qformer_tokenizer"])
def test_tokenizers_in_javascript(node: Callable[[str, Any], Any], beside: str) -> None:
    folder = model_directory("starter") / beside
    tokenizer: Any = load_tokenizer(folder)
    file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    web.check_tokenizer(folder / "tokenizer.json")
    options = {"add_special_tokens": False, "split_special_tokens": True}
    expected = [tokenizer(text, **options)["input_ids"] for text in TEXTS]
    value = {"file": file, "texts": TEXTS}
    run = "value.texts.map(page.tokenizer(value.file).encode)"
    assert node(run, value) == expected
    if not beside:
        value["texts"] = expected
        decoded = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
        assert node(run.replace("encode", "decode"), value) == decoded


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(97, 61), (64, 64), (20, 300)])
def test_pixels_in_javascript(
    node: Callable[[str, Any], Any], resample: Any, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    transform = ImageTransform(image_size=64, resample=resample)
    value = {
        "rgb": pixels.flatten().tolist(),
        "size": size,
        "image": {"size": 64, "mean": transform.mean, "std": transform.std, "resample": resample},
    }
    run = "Array.from(page.pixelValues(value.rgb, ...value.size, value.image))"
    got = np.array(node(run, value), dtype=np.float32)
    assert (got == transform(Image.fromarray(pixels)).numpy().flatten()).all()


def test_what_cannot_be_exported_is_reported_first(tmp_path: Path) -> None:
    t5 = tmp_path / "t5"
    t5.mkdir()
    config = json.loads((model_directory("starter") / "config.json").read_text())
    config["text_config"] = {"model_type": "t5"}
    (t5 / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="an encoder-decoder such as T5, is not exported"):
        release_onnx.export_onnx(t5, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="npm pack onnxruntime-web"):
        web.export_web("starter", tmp_path / "out", tmp_path)
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(ValueError, match="no code for a tokenizer of this kind"):
        web.check_tokenizer(other)
    assert not (tmp_path / "out").exists()


def test_an_operation_that_onnxruntime_lacks(graphs: Path, tmp_path: Path) -> None:
    import onnx

    broken = tmp_path / "broken"
    shutil.copytree(graphs, broken)
    model = onnx.load(broken / "queries.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, broken / "queries.onnx")
    with pytest.raises(ValueError, match=r"cannot run .*NoSuchOperator"):
        release_onnx.OnnxModel(broken)
