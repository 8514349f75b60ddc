"""BLIP-2's two stages for a new pair of image encoder and language model, from a recipe."""

from dataclasses import dataclass
from pathlib import Path

from instructblip.core import distributed
from instructblip.data.templates import Rendered
from instructblip.data.tokens import Tokens
from instructblip.experiment import (
    build as assembly,
)
from instructblip.experiment import (
    checking,
)
from instructblip.experiment import (
    datasets as preparing,
)
from instructblip.experiment import (
    features as caching,
)
from instructblip.model.instructblip import ALIASES
from instructblip.model.stage1 import Stage1
from instructblip.recipe.schema import Recipe
from instructblip.training.train import TrainResult, train


@dataclass(frozen=True)
class CaptionTokens(Tokens):
    """Stage 1: the Q-Former reads the caption itself, there is no instruction."""

    def tokenize(self, rendered: Rendered) -> tuple[list[int], list[int], list[int]]:
        caption = Rendered(rendered.response, rendered.prompt, rendered.response)
        return Tokens.tokenize(self, caption)


@dataclass(frozen=True)
class SilentTokens(Tokens):
    """Stage 2: the Q-Former reads no text, the language model tells the caption."""

    def tokenize(self, rendered: Rendered) -> tuple[list[int], list[int], list[int]]:
        _, prompt_ids, response_ids = Tokens.tokenize(self, rendered)
        return [], prompt_ids, response_ids


def pretrain(recipe: Recipe, stage: int, out: Path, resume: bool = False) -> TrainResult:
    """Stage 1 or 2 on the captions of the recipe's data sets; ``out`` is a run as of `train`.

    Stage 1 trains the Q-Former against captions, stage 2 what the language model reads of it.
    Raises ValueError for a recipe that would train anything else and for data not checked.
    """
    _refuse_other(recipe, stage)
    with distributed.main_first():
        datasets = checking.checked_training(recipe, preparing.prepare_training(recipe))
    model = assembly.make_model(recipe)
    trained = Stage1(model) if stage == 1 else model
    loader = assembly.make_loader(recipe, datasets, model, caching.began_with(out, resume))
    kind = CaptionTokens if stage == 1 else SilentTokens
    given = loader.tokens
    loader.tokens = kind(
        language=given.language,
        qformer=given.qformer,
        decoder_only=given.decoder_only,
        max_instruction=given.max_instruction,
        max_prompt=given.max_prompt,
        max_response=given.max_response,
    )
    if stage == 2:  # what reads no text would only decay
        parts = ALIASES["qformer"]
        model.set_trainable(tuple(p for p in parts if p != "qformer_text_embeddings"))
    return train(
        trained,
        loader,
        None,
        recipe.training,
        out,
        resume=resume,
        export=model.save_pretrained,
        notes={"recipe.yaml": recipe.to_yaml()} | caching.features_note(loader),
    )


def _refuse_other(recipe: Recipe, stage: int) -> None:
    training = recipe.training
    if training.trainable != ("qformer",) or recipe.model.lora is not None:
        raise ValueError(
            "both stages train the Q-Former alone, and the recipe asks for training.trainable "
            f"{list(training.trainable)} and model.lora {recipe.model.lora}: leave both out"
        )
    if stage == 1 and training.micro_batch_size(distributed.world_size()) == 1:
        raise ValueError(
            "stage 1 tells two pictures apart, and each micro batch holds one sample: raise "
            "training.batch_size or lower training.accumulate"
        )
