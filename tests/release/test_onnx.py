"""The starter as ONNX: onnxruntime, and a page in headless Chromium, answer as the engine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from instructblip.data.images import ImageTransform
from instructblip.data.tokens import load_tokenizer
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.directory import model_directory
from instructblip.recipe.world import examples_of
from instructblip.release import onnx as release_onnx
from instructblip.release import web
from runs.screenshots import browser_page

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "node_modules/onnxruntime-web"))
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
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


@needs_browser
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
    text = web.page(small, files, "starter", examples_of("starter"))
    file.write_text(text, encoding="utf-8")
    assert file.stat().st_size < 20e6
    with opened(file) as page:
        page.get_by_text("Ready after").wait_for()
        for image in png[:2]:
            page.set_input_files("#image", image)
            for text in QUESTIONS[:2]:
                page.fill("#question", text)
                page.click("#ask:not([disabled])")
                page.locator("#ask:not([disabled])").wait_for()
                assert page.locator("#answer").inner_text() == engine.answer(image, text)
                print(page.locator("#state").inner_text())


RUNTIME_OF_TESTS = """
export const env = { wasm: {} };
export class Tensor {
  constructor(type, data, dims) { Object.assign(this, { type, data, dims }); }
}
async function run({ pixel_values, features, queries, ids }) {
  if (pixel_values) return { features: pixel_values };
  if (features) return { queries: new Tensor("float32", [], [1, 1, 1]) };
  const logits = new Float32Array(%(words)d);
  logits[ids.data.length > 1 ? %(word)d : %(end)d] = 1;
  return { logits: { data: logits } };
}
export const InferenceSession = { create: async (graph) => {
  if (graph.length === 0) throw new Error("no memory.");
  return { run };
} };
"""
"""onnxruntime-web as far as the page uses it: each answer is one word."""


@pytest.fixture
def small_page(tmp_path: Path) -> Callable[..., Path]:
    """A page whose model answers "red" to everything, without packages beyond `dev`."""
    directory = tmp_path / "graphs"
    shutil.copytree(model_directory("starter") / "qformer_tokenizer", directory)
    tokenizer: Any = load_tokenizer(model_directory("starter"))
    tokenizer.save_pretrained(directory)
    image = {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "resample": "bilinear"}
    settings = {"instruction_aware": False, "cache": [], "max_new_tokens": 3, "image": image}
    settings |= {"prompt": {"prefix": [], "suffix": [], "longest": 8}, "min_new_tokens": 0}
    settings |= {"repetition_penalty": 1, "ends": [tokenizer.eos_token_id]}
    (directory / release_onnx.SETTINGS).write_text(json.dumps(settings))
    runtime = [tmp_path / name for name in web.RUNTIME]
    (word,) = tokenizer(" red", add_special_tokens=False)["input_ids"]
    figures = {"words": len(tokenizer), "word": word, "end": tokenizer.eos_token_id}
    runtime[0].write_text(RUNTIME_OF_TESTS % figures)
    runtime[1].write_bytes(b"")

    def write(graph: bytes = b"graph", title: str = "mine") -> Path:
        for part in release_onnx.PARTS:
            (directory / f"{part}.onnx").write_bytes(graph)
        file = tmp_path / "index.html"
        text = web.page(directory, runtime, title, examples_of("starter"))
        file.write_text(text, encoding="utf-8")
        return file

    return write


@contextmanager
def opened(file: Path, locale: str = "en-GB", before: str = "", **options: Any) -> Iterator[Page]:
    """The page without a network; fails where the browser reports an error."""
    with browser_page(locale, **options) as page:
        page.unroute_all()
        page.context.set_offline(True)
        errors: list[str] = []
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.add_init_script(before)
        page.goto(file.as_uri())
        yield page
        assert errors == []


@needs_browser
def test_the_page_asks_about_an_example_and_a_file(
    small_page: Callable[..., Path], tmp_path: Path
) -> None:
    title = "<img src=x onerror='document.body.dataset.ran=1'>"
    with opened(small_page(title=title), viewport={"width": 390, "height": 844}) as page:
        page.get_by_text("Ready after").wait_for()
        assert page.locator("h2").inner_text() == title
        assert "ran" not in page.locator("body").evaluate("body => ({...body.dataset})")
        page.click("#ask")
        page.get_by_text("A picture and a question are needed").wait_for()
        page.evaluate("find('examples').children[1].click(); find('form').requestSubmit()")
        page.get_by_text("red", exact=True).wait_for()
        assert "what color is the circle?" in page.input_value("#question")
        page.click("#ask")
        page.get_by_text("red", exact=True).wait_for()
        page.locator("#state", has_text=" s").wait_for()
        page.fill("#question", "what is this? " * 20)
        page.click("#ask")
        page.get_by_text("its beginning was not read").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        bad = tmp_path / "bad.png"
        bad.write_text("no image")
        page.set_input_files("#image", bad)
        page.get_by_text("no picture that the browser can show").wait_for()
        large = tmp_path / "large.png"
        Image.new("RGB", (6000, 4000)).save(large)
        page.set_input_files("#image", large)
        page.click("#ask")
        page.get_by_text("red", exact=True).wait_for()
        page.get_by_text("large.png").wait_for()
        page.evaluate("showing")
        assert page.evaluate("canvas.width * canvas.height") <= 2**24
        page.click("#remove")
        assert page.locator("#shown").is_hidden()


@needs_browser
def test_the_page_in_chinese(small_page: Callable[..., Path]) -> None:
    with opened(small_page(), locale="zh-CN") as page:
        page.get_by_text("加载用时").wait_for()
        page.click("#ask")
        page.get_by_text("需要图片和问题").wait_for()
        page.click("#language")
        page.get_by_text("A picture and a question are needed").wait_for()
        page.get_by_text("Ready after").wait_for()


@needs_browser
def test_nothing_leaves_the_page(small_page: Callable[..., Path], tmp_path: Path) -> None:
    with browser_page("en-GB") as page:
        page.goto(small_page().as_uri())
        for code in ("fetch('data:,x')", "import('data:text/javascript,1')"):
            refused = page.evaluate(f"{code}.then(() => false, () => true)")
            assert refused, code


@needs_browser
@pytest.mark.parametrize(
    ("before", "graph", "message"),
    [
        ("WebAssembly.validate = () => false", b"graph", "This browser has no WebAssembly SIMD"),
        ("", b"", "The model cannot run here: no memory. Close other tabs"),
    ],
)
def test_a_model_that_cannot_run(
    small_page: Callable[..., Path], before: str, graph: bytes, message: str
) -> None:
    with opened(small_page(graph), before=before) as page:
        page.get_by_text(message).wait_for()
        assert page.locator("#ask").is_disabled()
        assert page.locator("#ask").inner_text() == "Ask"


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


def test_the_command_writes_a_page(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    (tmp_path / "package/dist").mkdir(parents=True)
    for name in web.RUNTIME:
        (tmp_path / "package/dist" / name).touch()
    facts = {"version": "1.2", "license": "MIT", "repository": {"url": "URL"}}
    (tmp_path / "package/package.json").write_text(json.dumps(facts))
    words = ["export", "starter", "page", "--to", "web", "--runtime", "package"]
    command = [sys.executable, "-m", "instructblip", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("Open page/index.html in a browser")
    assert "how many shapes are there?" in (tmp_path / "page/index.html").read_text()
    assert "onnxruntime-web 1.2 is in index.html" in (tmp_path / "page/NOTICE.txt").read_text()


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
