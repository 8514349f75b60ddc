"""A language model spread over ranks learns as one that is whole."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing, nn

from instructblip.core import distributed
from instructblip.core.batch import Batch
from instructblip.experiment.model import shape_language, shard_language
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from instructblip.training.log import read_metrics, without_timings
from instructblip.training.train import train
from tests.parity.tiny import tiny_batch, tiny_transformers
from tests.training.toy import toy_config

SETTINGS = {
    "batch_size": 4,
    "validate_every": None,
    "save_every": 2,
    "log_every": 1,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "parallel": "fsdp2",
    "tokens_per_micro_batch": 99,
}


class Rows:
    """The ranks' samples of batches of four, which are functions of the step, in micro batches of
    two; of three ranks, which have two samples and one, in micro batches of one."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def iterate(self, step: int):
        while True:
            ranks = distributed.world_size()
            order = [(step * 3 + i) % len(self.batch) for i in range(4)]
            mine = torch.tensor(order[distributed.rank() :: ranks])
            names = [f.removesuffix("_ids") for f in ("qformer_ids", "prompt_ids", "response_ids")]
            micro_batches = []
            for rows in mine.split(1 if ranks == 3 else 2):
                text = {
                    f"{name}_{kind}": getattr(self.batch, f"{name}_{kind}")[rows]
                    for name in names
                    for kind in ("ids", "mask")
                }
                index = self.batch.image_index[rows]
                part = replace(self.batch, image_index=index, datasets=(), ids=(), **text)
                micro_batches.append(part)
            yield micro_batches
            step += 1


def recipe_of(start: Path) -> Recipe:
    return load_recipe(
        "quickstart",
        [
            f"model.start={start}",
            "model.lora={rank: 2}",
            "training.trainable=[qformer, lora]",
            "training.parallel=fsdp2",
            "training.device=cpu",
        ],
    )


def run(start: Path, folder: Path, steps: int, resume: bool = False) -> None:
    recipe = recipe_of(start)
    torch.manual_seed(0)
    model = InstructBlip.from_pretrained(start)
    for module in model.modules():  # each rank would draw its own
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    shape_language(model, recipe)
    shard_language(model, distributed.resolve_device(recipe.training.device))
    frozen = {n: p for n, p in model.language_model.named_parameters() if not p.requires_grad}
    parts = [name for name, p in frozen.items() if distributed.is_sharded(p)]
    assert bool(parts) == (distributed.world_size() > 1)
    assert not any(distributed.is_sharded(p) for p in model.parameters() if p.requires_grad)
    batches = Rows(tiny_batch(model.config))
    config = toy_config(**SETTINGS, steps=steps)
    train(model, batches, None, config, folder, resume=resume, export=model.save_pretrained)


def worker(rank: int, ranks: int, port: int, start: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.process_group("gloo"):
        run(Path(start), Path(folder), steps=4)


@pytest.mark.parametrize(("language", "ranks"), [("llama", 2), ("t5", 2), ("t5", 3)])
def test_ranks_share_a_language_model(tmp_path: Path, language: str, ranks: int):
    """Three divide a step of four samples into two micro batches, one and one."""
    torch.manual_seed(0)
    start, whole, many = (tmp_path / name for name in ("start", "whole", "many"))
    tiny_transformers(language).save_pretrained(start)
    run(start, whole, steps=4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(
        worker, args=(ranks, port, str(start), str(many)), nprocs=ranks, start_method="fork"
    )
    one, two = (
        [without_timings(line) for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, many)
    )
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4]
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-5)
    names = load_file(start / "model.safetensors").keys()
    left, right = (load_file(folder / "last" / "model.safetensors") for folder in (whole, many))
    assert left.keys() == right.keys() == names
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-3, atol=1e-4)
    run(start, many, steps=5, resume=True)  # one rank resumes what others began
    assert read_metrics(many / "metrics.jsonl")[-1]["step"] == 5
