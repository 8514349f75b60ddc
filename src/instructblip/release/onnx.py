"""Write a model as three ONNX graphs, and run them with onnxruntime.

A directory has image.onnx, queries.onnx and language.onnx (`model/graphs.py`), the tokenizers, and
onnx.json with all that a runner in any language needs besides. Only `write_onnx` needs torch's
exporter; decoding is greedy.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from instructblip.core.example import IMAGE_MARK
from instructblip.core.files import read_json, replacing_directory, write_json
from instructblip.data.images import ImageTransform
from instructblip.data.reading.decode import to_rgb
from instructblip.data.reading.images import load_image
from instructblip.data.templates import Rendered
from instructblip.data.tokens import Tokens
from instructblip.inference.engine import Engine
from instructblip.model import lora
from instructblip.model.checkpoints.directory import check_output, model_directory, read_config
from instructblip.model.graphs import check_language, parts_with_inputs

Weights = Literal["fp32", "int8"]

PARTS = ("image", "queries", "language")
SETTINGS = "onnx.json"
SMALLEST = 1024
"""Values of a table that is stored in 8 bits; smaller ones stay as they are."""


def check_packages() -> None:
    """Raise ValueError where a package of the extra ``export`` is missing."""
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
        import onnxscript  # pyright: ignore[reportMissingImports]

        del onnx, onnxruntime, onnxscript
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'instructblip[export]'") from error


def export_onnx(model: str | Path, out: Path, weights: Weights = "fp32") -> None:
    """Write ``model``, as in `export_model`, to the new directory ``out``.

    ``int8`` stores each row of a table of weights as 8-bit integers and a scale; onnxruntime makes
    fp32 of them when it loads the graphs. Raises ValueError, before anything is written, for a
    language model that is not exported yet, and for an operation that ONNX or onnxruntime lacks.
    """
    check_output(out)
    check_language(read_config(model).language)
    check_packages()
    engine = Engine.from_pretrained(model, device="cpu", dtype=torch.float32)
    with replacing_directory(out) as directory:
        write_onnx(engine, directory, weights)
        shutil.copy(model_directory(model) / "config.json", directory / "config.json")
        OnnxModel(directory)


def write_onnx(engine: Engine, directory: Path, weights: Weights) -> None:
    """The files of ``engine``'s model; its adapters are merged and it cannot answer afterwards."""
    lora.merge_lora(engine.model)
    parts = parts_with_inputs(engine.model.eval())
    for name, (part, inputs, sizes) in parts.items():
        past = [f"{kind}_{i}" for i in range(len(inputs.get("past", ()))) for kind in _KINDS]
        reads = [each for each in inputs if each != "past"] + [f"past_{each}" for each in past]
        file = directory / f"{name}.onnx"
        try:
            with warnings.catch_warnings(), _no_log(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    part.eval(),
                    kwargs=inputs,
                    dynamic_shapes=sizes,
                    input_names=reads,
                    output_names=[_OUTPUTS[name], *past],
                    dynamo=True,
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(
                f"the {name} part has an operation that ONNX cannot express: "
                f"{_reason(error)}; export the model as transformers instead"
            ) from error
        assert program is not None
        program.save(file, external_data=False)  # beyond 2 GB the weights are beside it
        if weights == "int8":
            _store_in_8_bits(file)
    engine.tokens.save_pretrained(directory)
    transform = engine.images.transform
    transform.save_pretrained(directory)
    language = parts["language"][1]["past"]
    settings = {
        "weights": weights,
        "instruction_aware": engine.model.config.instruction_aware,
        "cache": [[list(tensor.shape) for tensor in pair] for pair in language],
        **engine.tokens.layout(),
        "ends": list(engine.ends),
        "max_new_tokens": engine.decoding.max_new_tokens,
        "min_new_tokens": engine.decoding.min_new_tokens,
        "repetition_penalty": engine.decoding.repetition_penalty,
        "image": {
            "size": transform.image_size,
            "mean": transform.mean,
            "std": transform.std,
            "resample": transform.resample,
            "crop_pct": transform.crop_pct,
        },
    }
    write_json(directory / SETTINGS, settings)


_KINDS = ("key", "value")
_OUTPUTS = {"image": "features", "queries": "queries", "language": "logits"}


@contextmanager
def _no_log() -> Iterator[None]:
    """Without the exporter's lines about packages and operations that no model here has."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The innermost reason of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:600]


def _store_in_8_bits(file: Path) -> None:
    """Replace the tables of a graph by integers of 8 bits with a scale for each row, or for each
    column where a MatMul reads them."""
    import onnx  # pyright: ignore[reportMissingImports]
    from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

    model = onnx.load(file)
    graph = model.graph
    columns = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    kept, made, nodes = [], [], []
    for table in graph.initializer:
        values = numpy_helper.to_array(table)
        if values.dtype != np.float32 or values.ndim < 2 or values.size < SMALLEST:
            kept.append(table)
            continue
        axis = values.ndim - 1 if table.name in columns else 0
        others = tuple(i for i in range(values.ndim) if i != axis)
        scale = np.maximum(np.abs(values).max(others), 1e-12).astype(np.float32) / 127
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        whole = np.rint(values / scale.reshape(shape)).astype(np.int8)
        names = [f"{table.name}_int8", f"{table.name}_scale"]
        made += [numpy_helper.from_array(x, n) for x, n in zip((whole, scale), names, strict=True)]
        nodes.append(onnx.helper.make_node("DequantizeLinear", names, [table.name], axis=axis))
    stored = [*kept, *made]
    of_graph = [*nodes, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(stored)
    graph.node.extend(of_graph)
    beside = file.with_name(file.name + ".data")
    onnx.save(model, file, save_as_external_data=beside.exists(), location=beside.name)


class OnnxModel:
    """A directory of `export_onnx`, run by onnxruntime on the CPU.

    Raises ValueError where onnxruntime has no operator for a graph.
    """

    def __init__(self, directory: str | Path) -> None:
        check_packages()
        import onnxruntime  # pyright: ignore[reportMissingImports]

        self.directory = Path(directory)
        self.settings = read_json(self.directory / SETTINGS)
        self.transform = ImageTransform.from_pretrained(self.directory)
        limits = {
            f"max_{name}": self.settings[name]["longest"]
            for name in ("prompt", "instruction")
            if name in self.settings
        }
        self.tokens = Tokens.from_pretrained(self.directory, **limits)
        options = onnxruntime.SessionOptions()
        # weights in 8 bits become fp32 once, while loading, instead of in each run
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.sessions: dict[str, Any] = {}
        for name in PARTS:
            file = str(self.directory / f"{name}.onnx")
            try:
                self.sessions[name] = onnxruntime.InferenceSession(file, options)
            except Exception as error:  # its errors have no common class of their own
                raise ValueError(
                    f"onnxruntime {onnxruntime.__version__} cannot run {file}: {_reason(error)}"
                ) from error

    def answer(
        self, image: Image.Image | str | Path, text: str, max_new_tokens: int | None = None
    ) -> str:
        """The greedy answer about one image, as `Engine.answer` with ``num_beams=1`` gives it."""
        return self.tokens.decode([id_ for id_, _ in self.generate(image, text, max_new_tokens)])

    def generate(
        self, image: Image.Image | str | Path, text: str, max_new_tokens: int | None = None
    ) -> Iterator[tuple[int, Float[np.ndarray, " W"]]]:
        """Yield each token of the answer with the logits that it comes from. Raises ValueError for
        a text that names places of images."""
        if IMAGE_MARK in text:
            raise ValueError(f"the image is in front of the text: leave out {IMAGE_MARK}")
        window = self.transform.window
        opened = to_rgb(image, window) if isinstance(image, Image.Image) else None
        pixels = self.transform(opened or load_image(image, window=window))  # type: ignore[arg-type]
        tokenized = self.tokens.tokenize(Rendered.of(text), 1)
        (features,) = self.sessions["image"].run(None, {"pixel_values": pixels[None].numpy()})
        reads = {"features": features}
        if self.settings["instruction_aware"]:
            reads["qformer_ids"] = np.array([tokenized.qformer_ids])
        (queries,) = self.sessions["queries"].run(None, reads)
        cache = [
            np.zeros((*shape[:2], 0, shape[3]), np.float32)
            for pair in self.settings["cache"]
            for shape in pair
        ]
        language = self.sessions["language"]
        names = [each.name for each in language.get_inputs()]
        ids, given = tokenized.prompt_ids, list[int]()
        for _ in range(max_new_tokens or self.settings["max_new_tokens"]):
            inputs = (queries, np.array([ids]), *cache)
            (logits,), *cache = language.run(None, dict(zip(names, inputs, strict=True)))
            scores = logits.copy()
            seen, penalty = list(set(given)), self.settings["repetition_penalty"]
            scores[seen] = np.where(
                scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty
            )
            if len(given) < self.settings["min_new_tokens"]:
                scores[self.settings["ends"]] = -np.inf
            token = int(scores.argmax())
            if token in self.settings["ends"]:
                return
            yield token, logits
            given.append(token)
            ids, queries = [token], queries[:, :0]
