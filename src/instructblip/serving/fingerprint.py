"""What names a saved model in results: a hash that changes whenever its answers could."""

import hashlib
from pathlib import Path

from instructblip.model.weights import WEIGHT_FILES

_HASH_WHOLE = 1 << 28
"""Weights up to this many bytes are hashed whole; of larger ones size and date must do."""


def fingerprint(directory: Path, instruction_aware: bool) -> str:
    """Name and hash of a model directory: its config, its weights, and how it is read."""
    digest = hashlib.sha256(b"aware" if instruction_aware else b"plain")
    files = [directory / "config.json", *(directory / name for name in WEIGHT_FILES)]
    files += sorted(directory.glob("model-*.safetensors")) + sorted(directory.glob("tokenizer*"))
    for file in files:
        if not file.is_file():
            continue
        digest.update(file.name.encode())
        status = file.stat()
        if status.st_size <= _HASH_WHOLE:
            digest.update(file.read_bytes())
        else:
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
