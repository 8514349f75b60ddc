"""What a checkpoint holds, by its config and the names and shapes in its files."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from instructblip.core.files import read_json
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.checkpoints.lavis import from_lavis, is_lavis
from instructblip.model.checkpoints.transformers import (
    TEXT_BRANCH,
    TEXT_BRANCH_FILE,
    by_our_names,
)
from instructblip.model.checkpoints.weights import (
    CHANGED_FILE,
    START_FILE,
    read_nested,
    read_weights,
    start_of,
)
from instructblip.model.config import EncoderConfig, InstructBlipConfig, VisionConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import part_of

TIED = re.compile(r"language_model\.(lm_head|(.*\.)?embed_tokens)\.weight")
"""Names of matrices that a language model may store under another name only."""

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Inspection:
    """``parts`` counts parameters by part, ``trainable`` those that the paper trains."""

    path: Path
    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    parts: Counter[str] = field(default_factory=Counter)
    trainable: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Lines to print."""
        lines = [f"{self.path}: {self.kind}", *(f"  {k}: {v}" for k, v in self.facts.items())]
        lines += [f"  {part:26} {count:>15,}" for part, count in self.parts.items()]
        lines.append(f"  {'all':26} {self.parts.total():>15,}")
        lines.append(f"  {'trainable by default':26} {self.trainable:>15,}")
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines += [f"  {title}: {name}" for name in names[:20]]
            lines += [f"  and {len(names) - 20} more {title}"] if len(names) > 20 else []
        return "\n".join(lines)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Inspect a model or run directory, "starter", "small", or a file of the official code.

    Of a directory with safetensors the names and shapes alone are read. Raises FileNotFoundError or
    ValueError for anything else.
    """
    if Path(path).is_file():
        return _of_lavis(Path(path))
    directory = model_directory(path)
    values = read_json(directory / "config.json")
    config = InstructBlipConfig.from_transformers(values)
    with torch.device("meta"):
        model = InstructBlip(config)
    report = Inspection(
        directory,
        "InstructBLIP" if config.instruction_aware else "BLIP-2",
        {
            "image encoder": _encoder(config.vision),
            "language model": str(config.language.get("model_type")),
            "images": f"{config.vision.image_size} x {config.vision.image_size}",
            "query tokens": str(config.num_query_tokens),
            "text branch file": str((directory / TEXT_BRANCH_FILE).is_file()),
            "tokenizers": ", ".join(_tokenizers(directory)) or "none",
        },
    )
    given = by_our_names(_shapes(directory))
    if not config.instruction_aware:  # what a run started from may have one
        given = {name: shape for name, shape in given.items() if not TEXT_BRANCH.fullmatch(name)}
    for name, parameter in model.named_parameters():
        report.parts[part_of(name)] += parameter.numel()
    report.trainable = sum(p.numel() for _, p in model.trainable_parameters())
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    absent = [name for name in expected if name not in given and not TIED.fullmatch(name)]
    report.missing = [f"{name} {list(expected[name])}" for name in absent]
    report.unexpected = [
        f"{n} {list(s)}" + (f", expected {list(expected[n])}" if n in expected else "")
        for n, s in given.items()
        if expected.get(n) != s
    ]
    return report


def _encoder(config: VisionConfig | EncoderConfig) -> str:
    kind = "ViT" if isinstance(config, VisionConfig) else config.encoder["model_type"]
    return f"{kind}, {config.num_tokens} tokens, {config.grid} x {config.grid} of them a grid"


def _of_lavis(file: Path) -> Inspection:
    weights = read_nested(file, "model")
    if not is_lavis(weights):
        raise ValueError(
            f"{file} is not a checkpoint of the official code; it holds {[*weights][:3]}"
        )
    ours = from_lavis(weights)
    known = {n: v for n, v in ours.items() if n.startswith(KNOWN)}
    report = Inspection(file, "LAVIS checkpoint", {"tensors": str(len(weights))})
    for name, value in known.items():
        part = part_of(name)
        report.parts[part] += value.numel()
        report.trainable += value.numel() * (part not in ("vision_tower", "language_model"))
    present = {name.split(".")[0] for name in known if not name.startswith(NORM)}
    report.missing = [part for part in KNOWN if part.strip(".") not in present]
    report.unexpected = [name for name in ours if name not in known]
    return report


NORM = "vision_model.post_layernorm."
KNOWN = ("query_tokens", "qformer.", "language_projection.", "vision_model.", "language_model.")


def _tokenizers(directory: Path) -> list[str]:
    places = {"language": directory, "Q-Former": directory / "qformer_tokenizer"}
    return [name for name, place in places.items() if any(place.glob("tokenizer*"))]


def _shapes(directory: Path) -> Shapes:
    """Names and shapes of all tensors; of safetensors only the headers are read."""
    if (directory / START_FILE).is_file():
        return _shapes(start_of(directory)) | _shapes_of([directory / CHANGED_FILE])
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        return {name: tuple(value.shape) for name, value in read_weights(directory).items()}
    return _shapes_of(files)


def _shapes_of(files: list[Path]) -> Shapes:
    shapes: Shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes
