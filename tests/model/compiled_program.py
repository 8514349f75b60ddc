"""Compiled layers beside plain ones, in a process whose functions no check of shapes wraps.

Each argument is KIND:BACKEND:BATCHES, where a kind is a language model and options, such as
``llama+lora+int8``. Prints one line of JSON for each.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo as dynamo

sys.path.insert(0, str(Path(__file__).parents[2]))
from instructblip.core.batch import Batch  # before `tests`, which wraps modules imported later
from instructblip.model.compiled import compiled
from instructblip.model.config import InstructBlipConfig, LoraConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import checkpoint_layers
from instructblip.model.language.quantize import quantize_linears
from instructblip.model.lora import add_lora, lora_layers
from tests.parity.tiny import LANGUAGES, VOCAB

LAYERS = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
BLOOM = {"model_type": "bloom", "hidden_size": 24, "n_head": 2, "pad_token_id": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def model_of(language: str) -> InstructBlip:
    """One layer of each kind, without dropout."""
    values: dict[str, Any] = {**LANGUAGES, "bloom": BLOOM}[language]
    one = {"num_layers": 1, "dropout_rate": 0.0} if language == "t5" else {"num_hidden_layers": 1}
    torch.manual_seed(0)
    config = {
        "model_type": "instructblip",
        "vision_config": {**LAYERS, "image_size": 16, "patch_size": 8},
        "qformer_config": {**LAYERS, **NO_DROPOUT, "vocab_size": 40, "encoder_hidden_size": 16},
        "text_config": {**values, **one, "vocab_size": VOCAB},
        "num_query_tokens": 3,
    }
    return InstructBlip(InstructBlipConfig.from_transformers(config))


def prepare(model: InstructBlip, options: list[str]) -> InstructBlip:
    """The model as a recipe with these options has it."""
    language = model.language_model
    if "lora" in options:
        add_lora(language, LoraConfig(rank=2))
        for adapter in lora_layers(language).values():
            torch.nn.init.normal_(adapter.B)
    model.set_trainable(("qformer", "lora") if "lora" in options else ("qformer",))
    if "int8" in options:
        quantize_linears(language, "int8")
    if "checkpoint" in options:
        checkpoint_layers(language)
    return model.train()


def batch_of(seed: int) -> Batch:
    """Two to five samples, each text of two to nine tokens."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    samples = draw.randint(2, 5)
    texts: dict[str, Any] = {}
    for name in ("qformer", "prompt", "response"):
        lengths = torch.tensor([draw.randint(2, 9) for _ in range(samples)])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        texts[f"{name}_ids"] = torch.randint(4, 40, mask.shape, generator=generator) * mask
        texts[f"{name}_mask"] = mask
    pixels = torch.randn(samples, 3, 16, 16, generator=generator)
    return Batch(pixel_values=pixels, image_index=torch.arange(samples)[:, None], **texts)


def step(model: InstructBlip, batch: Batch) -> list[torch.Tensor]:
    """The mean loss and its gradients."""
    output = model.loss(batch)
    loss = output.loss_sum / output.num_tokens
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [loss.detach(), *gradients]


def compare(kind: str, backend: str, batches: int) -> dict[str, Any]:
    """The greatest difference in the first 20 batches, and the graphs after the first and the last
    batch."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled.cache_clear()
    (language, *options), compile_plainly = kind.split("+"), torch.compile
    torch.compile = lambda run, **settings: compile_plainly(run, backend=backend, **settings)
    plain = prepare(model_of(language), options)
    twin = prepare(model_of(language).compile_layers(), options)
    twin.load_state_dict(plain.state_dict())
    apart, graphs = 0.0, []
    for seed in range(batches):
        batch = batch_of(seed)
        got = step(twin, batch)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
        if seed < 20:
            pairs = zip(got, step(plain, batch), strict=True)
            apart = max(apart, *((a - b).abs().max().item() for a, b in pairs))
    torch.compile = compile_plainly
    return {"apart": apart, "first": graphs[0], "last": graphs[-1]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:]:
        kind, backend, batches = case.split(":")
        print(json.dumps(compare(kind, backend, int(batches))), flush=True)
