"""Memory and hours of the recipes for one GPU, modelled: nothing here runs on a GPU.

    python -m benchmarks.forecast

Memory is what `instructblip memory` predicts. Hours follow from the floating point operations of
a step, counted in the model's own code, and from three assumptions: the card reaches ``REACHED`` of
its bf16 rate, the kernels of a micro batch take ``LAUNCH`` seconds to start whatever its size, and
``WORKERS`` processes decode ``IMAGES`` images a second each. Validations, checkpoints and the check
of the data come on top.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.side_by_side import layer_sizes
from instructblip.core.batch import Batch
from instructblip.experiment.memory import predict_memory, walk
from instructblip.model.align import Align
from instructblip.model.config import EncoderConfig, InstructBlipConfig, QFormerConfig, VisionConfig
from instructblip.model.encoders import encoder_config
from instructblip.model.instructblip import InstructBlip
from instructblip.model.stage1 import Stage1
from instructblip.recipe.load import load_recipe

CARDS = {"24 GiB": (165e12, 1), "80 GiB": (312e12, 4)}
"""bf16 operations a second (RTX 4090, A100), and by how much ``accumulate`` is divided there."""
REACHED, LAUNCH = 0.3, 0.1
WORKERS, IMAGES = 8, 220
TOKENS = 20
"""Mean tokens of an instruction, a prompt and a response."""

SIGLIP2 = VisionConfig(
    **layer_sizes(12, 768, 12, 3072),
    patch_size=16,
    hidden_act="gelu_pytorch_tanh",
    class_token=False,
)
DINOV2 = {"model_type": "dinov2", **layer_sizes(12, 768, 12, 3072), "patch_size": 14}
TIED = {"tie_word_embeddings": True}
QWEN3 = {
    **{"model_type": "qwen3", "vocab_size": 151_936, **layer_sizes(28, 1024, 16, 3072), **TIED},
    **{"num_key_value_heads": 8, "head_dim": 128},
}
SMOLLM2 = {
    **{"model_type": "llama", "vocab_size": 49_152, **layer_sizes(32, 960, 15, 2560), **TIED},
    **{"num_key_value_heads": 5},
}
LLAMA3 = {
    **{"model_type": "llama", "vocab_size": 128_256, **layer_sizes(16, 2048, 32, 8192), **TIED},
    **{"num_key_value_heads": 8},
}
TINY = {"model_type": "llama", "vocab_size": 99, **layer_sizes(1, 64, 1, 64)}
"""Stands for the language model in the stages that do not run it."""


def config_of(vision: VisionConfig | EncoderConfig, language: dict[str, Any]) -> InstructBlipConfig:
    qformer = QFormerConfig(encoder_hidden_size=vision.hidden_size)
    return InstructBlipConfig(vision=vision, qformer=qformer, language=language)


def batch_of(config: InstructBlipConfig, samples: int) -> Batch:
    ids = torch.randint(4, 90, (samples, TOKENS))
    text = {f"{name}_ids": ids for name in ("qformer", "prompt", "response")}
    text |= {f"{name}_mask": torch.ones_like(ids) for name in ("qformer", "prompt", "response")}
    size = config.vision.image_size
    pixels = torch.randn(samples, 3, size, size)
    return Batch(pixel_values=pixels, image_index=torch.arange(samples)[:, None], **text)


def operations(config: InstructBlipConfig, samples: int = 2) -> dict[str, float]:
    """Stage -> floating point operations of a sample, forward and backward."""
    counts = {}

    def count(stage: str, loss: Any) -> None:
        with FlopCounterMode(display=False) as counted:
            loss().backward()
        counts[stage] = counted.get_total_flops() / samples

    small = config_of(config.vision, TINY)
    for stage, kind in {"1": Stage1, "align": Align}.items():
        module = kind(InstructBlip(small).set_trainable(("qformer",)).train())
        batch = batch_of(small, samples)
        count(stage, lambda module=module, batch=batch: module.loss(batch).loss_sum)
    with FakeTensorMode():
        model = InstructBlip(config).set_trainable(("qformer",)).train()
        count("2", lambda: walk(model, samples, (0, TOKENS, TOKENS)).sum())
        count("tune", lambda: walk(model, samples, (TOKENS, TOKENS, TOKENS)).sum())
    return counts


def main() -> None:
    dinov2 = encoder_config(DINOV2, 224)
    pairs = {
        "siglip2_qwen3": config_of(SIGLIP2, QWEN3),
        "siglip2_smollm2": config_of(SIGLIP2, SMOLLM2),
        "dinov2_llama3": config_of(dinov2, LLAMA3),
    }
    columns = [f"{card} card: GiB | hours" for card in CARDS]
    print("| pair | stage | GFLOP a sample | samples |", " | ".join(columns), "|")
    for pair, config in pairs.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config.to_transformers()))
            for stage, flops in operations(config).items():
                name = pair if stage == "tune" else "pretrain_one_gpu"
                name = "pretrain_align" if stage == "align" else name
                line(pair, stage, flops, name, folder)


def line(pair: str, stage: str, flops: float, name: str, folder: str) -> None:
    start = [f"model.start={folder}", "training.device=cuda"]
    training = load_recipe(name).training
    samples = training.steps * training.batch_size
    cells = [pair, stage, f"{flops / 1e9:,.0f}", f"{samples:,}"]
    for rate, factor in CARDS.values():
        parts = max(1, training.accumulate // factor)
        memory = ""
        if stage in ("2", "tune"):  # the other stages have losses that `memory` does not follow
            recipe = load_recipe(name, [*start, f"training.accumulate={parts}"])
            memory = f"{predict_memory(recipe).peak / 2**30:.1f}"
        seconds = training.steps * max(
            training.batch_size * flops / (rate * REACHED),
            parts * LAUNCH,
            training.batch_size / (WORKERS * IMAGES),
        )
        cells += [memory, f"{seconds / 3600:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
