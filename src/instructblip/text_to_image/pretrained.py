"""Save and load: an InstructBLIP directory with a folder ``text_to_image`` inside.

The folder holds what text to image adds, and the hash of the Q-Former that it was trained with: a
decoder reads the tokens of one Q-Former only.
"""

import hashlib
import json
from pathlib import Path

import torch
from pydantic import ValidationError

from instructblip.core.files import read_json, replacing_directory
from instructblip.core.problems import problems
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.checkpoints.transformers import load_weights
from instructblip.model.checkpoints.weights import read_weights, write_weights
from instructblip.model.instructblip import InstructBlip
from instructblip.text_to_image.config import TextToImageConfig
from instructblip.text_to_image.model import TextToImage

FOLDER = "text_to_image"


def save_pretrained(model: TextToImage, path: str | Path) -> None:
    """Write the InstructBLIP and, inside its directory, what text to image adds."""
    with replacing_directory(Path(path)) as directory:
        model.instructblip.save_pretrained(directory)
        save_addition(model, directory / FOLDER)


def save_addition(model: TextToImage, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write what text to image adds to the InstructBLIP, with floats as ``dtype``.

    The config names a decoder from a diffusers directory; its weights are written only once they
    differ from those of that directory.
    """
    config = model.config.model_copy(update={"qformer": qformer_hash(model.instructblip)})
    left_out = "decoder.vae." if model.decoder_changed else "decoder."
    weights = {
        name: p.detach().to(dtype)
        for name, p in model.state_dict().items()
        if name.startswith(("conditioner.", "decoder.")) and not name.startswith(left_out)
    }
    with replacing_directory(folder) as directory:
        text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        write_weights(weights, directory / "model.safetensors")


def holds_decoder(directory: Path) -> bool:
    """Whether a model directory has the folder that text to image adds."""
    return (directory / FOLDER / "config.json").is_file()


def from_pretrained(path: str | Path, instructblip: InstructBlip | None = None) -> TextToImage:
    """Load a directory that ``save_pretrained`` wrote, a run directory, or "starter", in fp32.

    ``instructblip`` is used instead of loading a second one. Raises FileNotFoundError where there
    is no decoder, ValueError where it was trained with another Q-Former or of another width.
    """
    directory = model_directory(path)
    folder = directory / FOLDER
    if not holds_decoder(directory):
        raise FileNotFoundError(
            f"{directory} cannot draw: it has no folder {FOLDER}/. Train a decoder for it with "
            "`instructblip train draw model.start=...`, or draw with the starter"
        )
    try:
        config = TextToImageConfig.model_validate(read_json(folder / "config.json"))
    except ValidationError as error:
        raise ValueError(f"{folder / 'config.json'}: {problems(error)}") from None
    if instructblip is None:
        instructblip = InstructBlip.from_pretrained(directory, instruction_aware=True)
    actual = qformer_hash(instructblip)
    if config.qformer not in (None, actual):
        raise ValueError(
            f"the decoder in {folder} was trained with another Q-Former ({config.qformer}) than "
            f"the one in {directory} ({actual}): train it again with `instructblip train draw "
            f"model.start={directory}`"
        )
    weights = {n: p.float() for n, p in read_weights(folder / "model.safetensors").items()}
    conditioner, decoder = (
        {n.removeprefix(prefix): p for n, p in weights.items() if n.startswith(prefix)}
        for prefix in ("conditioner.", "decoder.")
    )
    model = TextToImage(instructblip, config, decoder_changed=bool(decoder))
    norm, width = conditioner.get("connector.norm.weight"), model.decoder.condition_width
    if norm is not None and len(norm) != width:
        raise ValueError(
            f"the connector in {folder} gives a condition of width {len(norm)}, the decoder reads "
            f"{width}: the two were not trained together. Give decoder.path the directory that it "
            "was trained with, or train a connector for this one"
        )
    load_weights(model.conditioner, conditioner, folder)
    if config.decoder.kind == "diffusers":  # what the folder lacks is the directory's
        decoder = {**model.decoder.state_dict(), **decoder}
    load_weights(model.decoder, decoder, folder)
    return model.eval()


def qformer_hash(instructblip: InstructBlip) -> str:
    """Hash of the weights that drawing reads: the Q-Former and the last LayerNorm of the ViT."""
    digest = hashlib.sha256()
    parts = (("qformer", instructblip.qformer), ("norm", instructblip.vision_model.post_layernorm))
    for prefix, module in parts:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{prefix}.{name}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
