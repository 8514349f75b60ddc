"""BLIP-2's two stages of pre-training for a new pair of image encoder and language model."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import nn

from instructblip.core import distributed
from instructblip.data.templates import Rendered
from instructblip.data.tokens import TokenizedTexts, Tokens
from instructblip.experiment.build import Variant, build, load_model
from instructblip.model.instructblip import InstructBlip
from instructblip.model.stage1 import Stage1
from instructblip.model.trainable import ALIASES
from instructblip.recipe.schema import Recipe
from instructblip.training.train import TrainResult


@dataclass(frozen=True)
class CaptionTokens(Tokens):
    """Stage 1: the Q-Former reads the caption itself; there is no instruction."""

    def tokenize(self, rendered: Rendered, num_images: int = 0) -> TokenizedTexts:
        caption = Rendered(rendered.response, rendered.prompt, rendered.response)
        return Tokens.tokenize(self, caption, num_images)


@dataclass(frozen=True)
class Pretraining(Variant):
    """Stage 1 trains the Q-Former against captions, stage 2 through the language model."""

    stage: int
    reads_benchmarks = False  # the last weights are the result

    def refuse(self, recipe: Recipe) -> None:
        training = recipe.training
        if training.trainable != ("qformer",) or recipe.model.lora is not None:
            raise ValueError(
                "both stages train the Q-Former alone, and the recipe asks for training.trainable "
                f"{list(training.trainable)} and model.lora {recipe.model.lora}: leave both out"
            )
        if self.stage == 1 and training.micro_batch_size(distributed.world_size()) == 1:
            raise ValueError(
                "stage 1 contrasts images, and each micro batch holds one sample: raise "
                "training.batch_size or lower training.accumulate"
            )

    def validates(self, recipe: Recipe) -> bool:
        return False

    def tokens(self, tokens: Tokens) -> Tokens:
        if self.stage == 2:  # the Q-Former reads no text; the language model writes the caption
            return replace(tokens, qformer=None)
        settings = {each.name: getattr(tokens, each.name) for each in fields(tokens) if each.init}
        return CaptionTokens(**settings)

    def instructblip(self, recipe: Recipe) -> InstructBlip:
        if self.stage == 1:
            return load_model(recipe)
        # the text embeddings, which stage 2 does not read, would only decay
        parts = tuple(p for p in ALIASES["qformer"] if p != "qformer_text_embeddings")
        return load_model(recipe, parts)

    def model(self, recipe: Recipe, instructblip: InstructBlip) -> nn.Module:
        return Stage1(instructblip) if self.stage == 1 else instructblip


def pretrain(recipe: Recipe, stage: int, out: Path, resume: bool = False) -> TrainResult:
    """Run stage 1 or 2 on the captions of the recipe's data sets into the run directory ``out``.

    Raises ValueError for a recipe that would train anything else and for unchecked data.
    """
    with distributed.process_group():
        return build(recipe, Pretraining(stage), out, resume).train(out, resume)
