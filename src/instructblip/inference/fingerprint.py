"""Identifies a saved model in results by a hash that changes whenever its answers could."""

import hashlib
from pathlib import Path

from instructblip.core.files import read_json
from instructblip.data.chat_format import CHAT_FILE
from instructblip.data.images import PREPROCESSORS
from instructblip.data.reading.decode import Window
from instructblip.model.checkpoints.transformers import RETRIEVAL_FILE
from instructblip.model.checkpoints.weights import CHANGED_FILE, START_FILE, WEIGHT_FILES
from instructblip.model.placement import Kind

_HASH_WHOLE = 1 << 28
"""Weights up to this many bytes are hashed whole; of larger ones the size and ``_SAMPLES``
evenly spaced pieces of ``_PIECE`` bytes, the first and the last included."""
_SAMPLES, _PIECE = 256, 1 << 16


def fingerprint(
    directory: Path,
    instruction_aware: bool,
    window: Window = "auto",
    quantize: Kind | None = None,
) -> str:
    """Hash of a model directory: its config, weights, tokenizers, image transform and decoding
    settings, whether its Q-Former reads the instruction, a ``window`` above the stored one, and
    whether the language model is quantized."""
    digest = hashlib.sha256(b"aware" if instruction_aware else b"plain")
    if quantize is not None:
        digest.update(quantize.encode())
    if window != "auto":
        digest.update(repr(window).encode())
    files = [directory / "config.json", *(directory / name for name in WEIGHT_FILES)]
    files += [directory / name for name in (*PREPROCESSORS, "generation_config.json", CHAT_FILE)]
    files += [directory / CHANGED_FILE, directory / RETRIEVAL_FILE]
    if (directory / START_FILE).is_file():  # where it is changes no answer
        digest.update(repr(read_json(directory / START_FILE)["sha256"]).encode())
    for pattern in ("model-*.safetensors", "tokenizer*", "qformer_tokenizer/*"):
        files += sorted(directory.glob(pattern))
    for file in files:
        if not file.is_file():
            continue
        digest.update(file.relative_to(directory).as_posix().encode())
        status = file.stat()
        if status.st_size <= _HASH_WHOLE:
            digest.update(file.read_bytes())
        else:
            digest.update(f"{status.st_size}".encode())
            with file.open("rb") as opened:
                for i in range(_SAMPLES):
                    opened.seek(i * (status.st_size - _PIECE) // (_SAMPLES - 1))
                    digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:16]
