"""BLIP-2's two stages of pre-training for a new pair of image encoder and language model, a cheap
one between them, and one that makes any model a search engine."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from instructblip.core import distributed
from instructblip.core.files import read_json
from instructblip.data.templates import Rendered
from instructblip.data.tokens import TokenizedTexts, Tokens
from instructblip.experiment.build import Variant, build
from instructblip.experiment.model import load_model
from instructblip.model.align import Align
from instructblip.model.checkpoints.transformers import TEXT_BRANCH_FILE, read_text_branch
from instructblip.model.checkpoints.weights import write_weights
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.retrieval import Heads, write_heads
from instructblip.model.stage1 import RetrievalStage, Stage1
from instructblip.model.trainable import ALIASES
from instructblip.recipe.schema import Recipe
from instructblip.training.run_directory import claim
from instructblip.training.train import TrainResult

Stage = Literal[1, "align", 2, "retrieval"]
CONTRASTS = {1: Stage1, "align": Align, "retrieval": RetrievalStage}
"""Stages whose losses contrast the images of a micro batch."""


@dataclass(frozen=True)
class CaptionTokens(Tokens):
    """The Q-Former reads the caption itself; there is no instruction."""

    def tokenize(self, rendered: Rendered, num_images: int = 0) -> TokenizedTexts:
        caption = Rendered(rendered.response, rendered.prompt, rendered.response)
        return Tokens.tokenize(self, caption, num_images)


@dataclass(frozen=True)
class Pretraining(Variant):
    """Stage 1 trains the Q-Former against captions, align against the language model's word
    embeddings, stage 2 through the language model. Retrieval trains the contrast's heads and
    a copy of the Q-Former for them, and leaves the model as it is."""

    stage: Stage
    instructs = False  # the language model continues captions
    reads_benchmarks = False  # the last weights are the result

    def refuse(self, recipe: Recipe) -> None:
        training = recipe.training
        adapters = (recipe.model.lora, recipe.model.qformer_lora)
        if training.trainable != ("qformer",) or any(adapters):
            raise ValueError(
                "all stages train the Q-Former alone, and the recipe asks for training.trainable "
                f"{list(training.trainable)}, model.lora {adapters[0]} and model.qformer_lora "
                f"{adapters[1]}: leave them out"
            )
        by_tokens = training.tokens_per_micro_batch is not None and training.accumulate == 1
        if self.stage in CONTRASTS and by_tokens:
            raise ValueError(
                f"stage {self.stage} contrasts the images of a micro batch, and "
                "training.tokens_per_micro_batch would change how many these are: leave it out"
            )
        if self.stage in CONTRASTS and training.micro_batch_size(distributed.world_size()) == 1:
            raise ValueError(
                f"stage {self.stage} contrasts images, and each micro batch holds one sample: "
                "raise training.batch_size or lower training.accumulate"
            )

    def validates(self, recipe: Recipe) -> bool:
        return False

    def tokens(self, tokens: Tokens) -> Tokens:
        if self.stage in ("align", 2):  # the Q-Former reads no text
            return replace(tokens, qformer=None)
        settings = {each.name: getattr(tokens, each.name) for each in fields(tokens) if each.init}
        return CaptionTokens(**settings)

    def instructblip(self, recipe: Recipe) -> InstructBlip:
        if self.stage in (1, "retrieval"):
            return load_model(recipe)
        if self.stage == 2:  # it trains a BLIP-2, whose Q-Former has no text branch
            aware = recipe.model.model_copy(update={"instruction_aware": False})
            recipe = recipe.model_copy(update={"model": aware})
        # the text embeddings, which neither stage reads, would only decay
        parts = tuple(p for p in ALIASES["qformer"] if p != "qformer_text_embeddings")
        return load_model(recipe, parts)

    def model(self, recipe: Recipe, instructblip: InstructBlip) -> nn.Module:
        return CONTRASTS[self.stage](instructblip) if self.stage in CONTRASTS else instructblip

    def export(self, instructblip: InstructBlip, model: Any) -> Callable[[Path], object]:
        if self.stage == 2:
            return lambda path: save_blip2(instructblip, path)
        if self.stage == "align":
            return super().export(instructblip, model)
        start = None if self.stage == 1 else instructblip.assets
        return lambda path: save_with_heads(instructblip, model, path, start)


def save_blip2(model: InstructBlip, path: Path) -> None:
    """Write a BLIP-2, and beside it the text branch of the directory that it was loaded from, with
    which instruction tuning continues."""
    model.save_pretrained(path, whole=False)
    assert model.assets is not None, "stage 2 starts from a directory"
    start = InstructBlipConfig.from_transformers(read_json(model.assets / "config.json"))
    if start.instruction_aware:  # the text branch of a BLIP-2 is a file, which is copied
        write_weights(read_text_branch(model.assets), path / TEXT_BRANCH_FILE)


def save_with_heads(
    model: InstructBlip, heads: Heads, path: Path, unchanged: Path | None = None
) -> None:
    """Write a model, or the ``unchanged`` one that the run started from, with heads beside it."""
    written = model if unchanged is None else InstructBlip.from_pretrained(unchanged)
    written.save_pretrained(path, whole=False)
    write_heads(heads, model, path)


def pretrain(recipe: Recipe, stage: Stage, out: Path, resume: bool = False) -> TrainResult:
    """Run a stage on the captions of the recipe's data sets into the run directory ``out``.

    Raises ValueError for a recipe that would train anything else, for unchecked data, and
    if another process trains in ``out``.
    """
    with distributed.process_group(), claim(out):
        return build(recipe, Pretraining(stage), out, resume).train(out, resume)
