"""Write a model as one HTML file that answers in a browser, without a server or a network.

The page has the graphs of `release/onnx.py`, onnxruntime-web, and our tokenizers and image filter
in JavaScript (page.js).
"""

import base64
import gzip
import html
import json
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from instructblip.core.files import read_json, replacing_directory
from instructblip.core.pages import STYLE, title_of
from instructblip.data.chat_format import read_chat_template
from instructblip.model.checkpoints.directory import check_output, model_directory
from instructblip.recipe.world import PageExample, examples_of, world_of
from instructblip.release.onnx import PARTS, SETTINGS, Weights, export_onnx

PAGE = "index.html"
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
HOW = "npm pack onnxruntime-web && tar xzf onnxruntime-web-*.tgz, then --runtime package"
MOST = 1 << 28
"""Bytes of the graphs in a page: browsers read no longer string."""


def export_web(
    model: str | Path, out: Path, runtime: Path | None = None, weights: Weights = "int8"
) -> None:
    """Write ``index.html`` for ``model``, and licence texts, to the new directory ``out``.

    ``runtime`` is the unpacked npm package onnxruntime-web (None: node_modules/onnxruntime-web).
    Raises ValueError or FileNotFoundError, before the model is read, for what is missing and for a
    tokenizer or a chat format that the page has no code for.
    """
    check_output(out)
    package = runtime or Path("node_modules/onnxruntime-web")
    files = [package / "dist" / name for name in RUNTIME]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"no {absent[0]}: the page needs onnxruntime-web; get it with {HOW}"
        )
    source = model_directory(model)
    if read_chat_template(source) is not None:
        raise ValueError("the page has no chat formats yet; export with --to onnx instead")
    with tempfile.TemporaryDirectory() as folder:
        graphs = Path(folder) / "onnx"
        beside = source / "qformer_tokenizer"
        for tokenizer in (source, *([beside] if beside.is_dir() else [])):
            check_tokenizer(tokenizer / "tokenizer.json")
        export_onnx(model, graphs, weights)
        size = sum((graphs / f"{part}.onnx").stat().st_size for part in PARTS)
        if size > MOST or list(graphs.glob("*.data")):
            raise ValueError(
                f"the graphs have {size:,} bytes and a page holds {MOST:,} at most; try "
                "--weights int8, or --to onnx"
            )
        title = title_of(model)
        text = page(graphs, files, title, examples_of(world_of(title, source)))
    with replacing_directory(out) as directory:
        (directory / PAGE).write_text(text, encoding="utf-8")
        version = read_json(package / "package.json")
        licence = f"{version['license']}: {version['repository']['url']}"
        notice = f"onnxruntime-web {version['version']} is in {PAGE}; its licence is {licence}"
        (directory / "NOTICE.txt").write_text(notice + "\n", encoding="utf-8")
        for name in ("LICENSE", "LICENSE.txt"):
            if (package / name).is_file():
                shutil.copy(package / name, directory / "onnxruntime-web-LICENSE.txt")


def check_tokenizer(file: Path) -> None:
    """Raise ValueError for a tokenizer of a kind that page.js does not have."""
    if not file.is_file():
        raise ValueError(f"the page reads tokenizers from tokenizer.json, and there is no {file}")
    tokenizer = read_json(file)
    model = tokenizer["model"]
    kinds = [(tokenizer.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer")]
    found = f"{model.get('type')} with {kinds[0]} and {kinds[1]}"
    if model.get("type") == "BPE":
        plain = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        others = any(model.get(name) for name in (*plain, "dropout", "ignore_merges"))
        known = kinds[0] in (None, "Lowercase") and kinds[1] == "ByteLevel" and not others
        known = known and tokenizer["pre_tokenizer"].get("use_regex", True)
        known = known and (tokenizer.get("decoder") or {}).get("type") == "ByteLevel"
    else:
        known = found == "WordPiece with BertNormalizer and BertPreTokenizer"
    if not known:
        raise ValueError(
            f"{file}: the page has no code for a tokenizer of this kind ({found}); expected "
            "byte-level BPE or BERT's WordPiece; export with --to onnx instead"
        )


def page(graphs: Path, runtime: list[Path], title: str, examples: list[PageExample]) -> str:
    """The HTML of a directory of `export_onnx`."""
    code, wasm = map(_packed, runtime)
    files: dict[str, Any] = {
        "settings": read_json(graphs / SETTINGS),
        "language": read_json(graphs / "tokenizer.json"),
    }
    if files["settings"]["instruction_aware"]:
        files["qformer"] = read_json(graphs / "qformer_tokenizer" / "tokenizer.json")
    data = {
        "runtime": code,
        "wasm": wasm,
        "graphs": {part: _packed(graphs / f"{part}.onnx") for part in PARTS},
        "files": files,
    }
    ours = Path(__file__)
    labels = yaml.safe_load(ours.with_name("page.yaml").read_text(encoding="utf-8"))
    parts = {
        "TITLE": html.escape(title),
        "STYLE": STYLE.read_text(encoding="utf-8"),
        "TEXTS": _json({"labels": labels, "examples": [asdict(each) for each in examples]}),
        "DATA": _json(data),
        "RUNNER": ours.with_name("page.js").read_text(encoding="utf-8"),
    }
    text = ours.with_name("page.html").read_text(encoding="utf-8")
    return re.sub(r"__([A-Z]+)__", lambda part: parts[part[1]], text)


def _json(value: Any) -> str:
    """JSON that ends no HTML element."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _packed(file: Path) -> str:
    return base64.b64encode(gzip.compress(file.read_bytes(), 9, mtime=0)).decode()
