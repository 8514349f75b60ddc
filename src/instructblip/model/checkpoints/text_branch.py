"""The text branch of the Q-Former, which reads the instruction and which a BLIP-2 does not have.

It consists of word and position embeddings and the text feed-forwards, and comes from a file in the
BLIP-2's directory, from a Blip2ForImageTextRetrieval, or from BERT.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from instructblip.core.files import replacing
from instructblip.model.checkpoints.weights import read_weights, write_weights
from instructblip.model.qformer import QFormer

TEXT_BRANCH_FILE = "text_branch.safetensors"
TEXT_BRANCH = re.compile(
    r"embeddings\.(word|position)_embeddings\.weight"
    r"|encoder\.layer\.\d+\.(intermediate|output)\.(dense|LayerNorm)\.(weight|bias)"
)
"""Parameter names of the text branch inside the Q-Former."""


def in_text_branch(name: str) -> bool:
    """Whether a tensor of the model belongs to the text branch."""
    prefix, _, rest = name.partition(".")
    return prefix == "qformer" and TEXT_BRANCH.fullmatch(rest) is not None


def find_text_branch(directory: Path, text_branch: str | Path | None) -> dict[str, Tensor]:
    """The text branch for a BLIP-2 directory, by names ``qformer.*``; empty for "random"."""
    if text_branch == "random":
        return {}
    source = directory / TEXT_BRANCH_FILE if text_branch is None else Path(text_branch)
    if not source.exists():
        raise ValueError(
            f"{directory} is a BLIP-2, whose Q-Former has no text branch, and {source} does not "
            "exist. Give text_branch= one of: a Blip2ForImageTextRetrieval directory, a BERT "
            f"directory, a {TEXT_BRANCH_FILE} of this project, or 'random' to train it from "
            "scratch; or load with instruction_aware=False."
        )
    if source.is_dir() and (source / TEXT_BRANCH_FILE).is_file():
        source = source / TEXT_BRANCH_FILE
    branch = read_text_branch(source)
    if not branch:
        raise ValueError(
            f"{source} holds no text branch: expected word and position embeddings and text "
            "feed-forwards under the names of this project, Blip2ForImageTextRetrieval or BERT"
        )
    return branch


def read_text_branch(source: Path) -> dict[str, Tensor]:
    """Tensors of a text branch by names ``qformer.*``, from any of the three formats.

    BERT's vocabulary gets one more row for the [DEC] token that BLIP-2's tokenizer adds, the mean
    of the others: instruction tuning does not read it.
    """
    weights = read_weights(source)
    is_bert = any("token_type_embeddings" in name for name in weights)
    branch = {}
    for name, value in weights.items():
        name = name.removeprefix("bert." if is_bert else "qformer.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if TEXT_BRANCH.fullmatch(name):
            branch[f"qformer.{name}"] = value
    words = "qformer.embeddings.word_embeddings.weight"
    if is_bert and words in branch:
        mean = branch[words].float().mean(0, keepdim=True).to(branch[words].dtype)
        branch[words] = torch.cat([branch[words], mean])
    return branch


def save_text_branch(qformer: QFormer, file: str | Path) -> None:
    """Write the text branch alone, to stand beside a BLIP-2 as ``text_branch.safetensors``."""
    branch = {n: v for n, v in qformer.state_dict().items() if TEXT_BRANCH.fullmatch(n)}
    if not branch:
        raise ValueError("the Q-Former has no text branch to save: it is not instruction-aware")
    with replacing(Path(file)) as temporary:
        write_weights(branch, temporary)
