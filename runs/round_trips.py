"""Round trips of checkpoints, tensor by tensor: which come back with the same bits.

    python -m runs.round_trips

Models of random weights: transformers -> ours -> transformers for each family, and files with the
official names -> ours -> files of the official code. Prints a table; exit code 1 if a bit differs.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from instructblip.model.checkpoints.lavis import export_lavis, import_lavis
from instructblip.model.instructblip import InstructBlip
from tests.model.test_lavis import eva, official, random, write_language
from tests.parity.tiny import tiny_transformers

FAMILIES = [
    ("blip-2", "opt"),
    ("blip-2", "t5"),
    ("instructblip", "llama"),
    ("instructblip", "t5"),
    ("instructblipvideo", "llama"),
]


def through_ours(kind: str, language: str, folder: Path) -> tuple[int, int]:
    """Tensors of a transformers model, and how many are the same after both conversions."""
    first = tiny_transformers(language, kind=kind)
    first.save_pretrained(folder / "theirs")
    InstructBlip.from_pretrained(folder / "theirs").save_pretrained(folder / "ours")
    again = type(first).from_pretrained(folder / "ours")
    return compare(first.state_dict(), again.state_dict())


def lavis(folder: Path) -> tuple[int, int]:
    """The same for a trimmed InstructBLIP file with its image encoder."""
    encoder = {f"visual_encoder.{n}": v for n, v in eva(16, 30, 2, 8, 5, random).items()}
    encoder = {n: v for n, v in encoder.items() if ".head." not in n and ".norm." not in n}
    weights = official(24, 2, 40, 16, 24, 90, random)
    torch.save({"model": weights}, folder / "trimmed.pth")
    torch.save({"model": encoder}, folder / "encoder.pth")
    write_language(folder / "vicuna", "llama")
    ours = import_lavis(folder / "trimmed.pth", folder / "encoder.pth", folder / "vicuna", 2, 2)
    export_lavis(ours, folder / "back.pth", image_encoder=True)
    return compare(
        {**weights, **encoder}, torch.load(folder / "back.pth", weights_only=True)["model"]
    )


def compare(first: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many tensors there were, and how many came back under the same name, bit for bit."""
    same = [n for n, value in first.items() if n in back and torch.equal(value, back[n])]
    return len(first), len(same)


def main() -> None:
    rows = []
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        for kind, language in FAMILIES:
            folder = Path(root) / f"{kind}_{language}"
            folder.mkdir()
            found = through_ours(kind, language, folder)
            rows.append((f"transformers {kind}, {language}", *found))
        folder = Path(root) / "lavis"
        folder.mkdir()
        rows.append(("LAVIS InstructBLIP, llama", *lavis(folder)))
    print("| there and back | tensors | bit-identical |\n|---|---|---|")
    for name, count, same in rows:
        print(f"| {name} | {count} | {same} |")
    sys.exit(any(count != same for _, count, same in rows))


if __name__ == "__main__":
    main()
