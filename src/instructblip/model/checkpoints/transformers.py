"""Start from a BLIP-2 or an InstructBLIP; save what transformers reads.

Names are those of transformers' InstructBLIP. BLIP-2 differs in two things: the Q-Former's first
LayerNorm is called ``qformer.layernorm``, and there is no text branch (word and position
embeddings, text feed-forwards), which reads the instruction. transformers itself loads a BLIP-2
directory as an InstructBLIP with a fresh LayerNorm and a random text branch; here the LayerNorm is
renamed, and the text branch comes from a file, from a Blip2ForImageTextRetrieval or from BERT.
"""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from instructblip.core import distributed
from instructblip.core.files import read_json, replacing, replacing_directory
from instructblip.model import lora
from instructblip.model.checkpoints.directory import model_directory, name_of
from instructblip.model.checkpoints.weights import (
    NoRandomWeights,
    NoStorage,
    read_weights,
    write_changed,
    write_weights,
)
from instructblip.model.config import READERS, InstructBlipConfig
from instructblip.model.language.adapters import untie_head
from instructblip.model.language.quantize import quantized_names
from instructblip.model.qformer import QFormer
from instructblip.model.vision import interpolate_positions

HARMLESS = re.compile(
    r".*\.(position_ids|rotary_emb\.inv_freq|masked_bias)"
    r"|.*\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
"""Buffers and leftovers that older versions of transformers saved and no model reads."""

BLIP2_NORM, NORM = "qformer.layernorm.", "qformer.embeddings.layernorm."

TEXT_BRANCH_FILE = "text_branch.safetensors"
TEXT_BRANCH = re.compile(
    r"qformer\.embeddings\.(word|position)_embeddings\.weight"
    r"|qformer\.encoder\.layer\.\d+\.(intermediate|output)\.(dense|LayerNorm)\.(weight|bias)"
)
"""Parameters that read the instruction: a BLIP-2 does not have them."""

RETRIEVAL_FILE = "retrieval.safetensors"
"""The heads of retrieval, and those of its other weights that differ from the model's."""
READ_BY_RETRIEVAL = re.compile(r"query_tokens|qformer\..*|vision_model\.post_layernorm\..*")
"""Parameters of a model that training moves and retrieval reads."""

ASSETS = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "chat_format.json",
    "qformer_tokenizer",
    "licences",
)
"""What a model directory holds besides config and weights; copied along when the model is saved."""


Model = TypeVar("Model", bound=nn.Module)
Value = TypeVar("Value")


class Pretrained(nn.Module):
    """Reading and writing model directories; ``InstructBlip`` inherits it.

    It stands below the model that it loads: it knows a subclass by its constructor,
    ``cls(config, assets, generation_settings)``, and by its attributes.
    """

    config: InstructBlipConfig
    language_model: Any
    adapted: Any
    assets: Path | None

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | Path,
        instruction_aware: bool | None = None,
        text_branch: str | Path | None = None,
        image_size: int | None = None,
        as_stored: bool = False,
    ) -> Model:
        """Load a model in fp32, in eval mode, with the default trainable set.

        Args:
            path: a BLIP-2 or InstructBLIP directory that transformers or ``save_pretrained``
                wrote, a run directory (its ``best``, else its ``last``), "starter",
                "dense", "small", or "hf://OWNER/NAME".
            instruction_aware: None keeps what the directory holds. True turns a BLIP-2 into an
                InstructBLIP by adding a text branch; False drops the text branch.
            text_branch: where a BLIP-2's text branch comes from: a file of this project, or the
                directory of a Blip2ForImageTextRetrieval or of a BERT. None reads
                ``text_branch.safetensors`` in the directory itself; "random" draws a new one.
            image_size: side in pixels; another one than the stored interpolates the position
                embedding of the image encoder.
            as_stored: leave the weights in their types and in their files, which are mapped, for
                `model.spread.place` to take them from there.

        Raises:
            FileNotFoundError: there is no such directory, or it holds no model.
            ValueError: a file is damaged or does not fit; lists every missing, unexpected or
                mis-shaped tensor.
        """
        directory = model_directory(path)
        config = InstructBlipConfig.from_transformers(read_json(directory / "config.json"))
        settings = directory / "generation_config.json"
        weights = by_our_names(read_weights(directory))
        aware = config.instruction_aware if instruction_aware is None else instruction_aware
        if not aware:
            weights = {name: v for name, v in weights.items() if not _in_text_branch(name)}
        elif not config.instruction_aware:
            weights |= _find_text_branch(directory, text_branch)
        config = _fit_config(config, weights, aware, image_size)
        with contextlib.ExitStack() as modes:
            if text_branch != "random":
                modes.enter_context(NoRandomWeights())
                modes.enter_context(NoStorage())
            model: Any = cls(
                config,
                assets=directory,
                generation_settings=read_json(settings) if settings.is_file() else {},
            )
        if aware and text_branch == "random":
            weights |= {n: v for n, v in model.state_dict().items() if _in_text_branch(n)}
        positions = "vision_model.embeddings.position_embedding"
        if image_size is not None and positions in weights:
            num_tokens = config.vision.num_tokens
            weights[positions] = interpolate_positions(weights[positions], num_tokens)
        load_weights(model, weights, directory, as_stored)
        for part, root in model.adapted.items():
            if (directory / lora.FOLDERS[part]).is_dir():
                lora.load_lora(root, directory / lora.FOLDERS[part])
        return model.set_trainable(("qformer",)).eval()

    def save_pretrained(
        self, path: str | Path, assets: Path | None = None, whole: bool = True
    ) -> None:
        """Write a directory that transformers loads with the same logits, whole or not at all.

        It holds config.json, model.safetensors, and the tokenizers and settings in the directory
        ``assets`` (None: the one that the model was loaded from). A BLIP-2 is written as one; each
        adapter goes into a separate folder; weights that are quantized or sharded over ranks are
        copied from where the model was loaded. Without ``whole`` the weights
        that the model was loaded with are left out where they are many, and ``start.json`` says
        where they are: transformers then refuses the directory. Raises OSError when the disk is
        full; what stood at ``path`` then stays as it was.
        """
        assets = assets or self.assets
        with replacing_directory(Path(path)) as directory:
            if assets is not None:
                _copy_assets(assets, directory, self.config)
            config = self.config.to_transformers()
            dtypes = {str(p.dtype).removeprefix("torch.") for p in self.parameters()}
            config["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (directory / "config.json").write_text(text, encoding="utf-8")
            weights = {n: v for n, v in self.state_dict().items() if ".lora." not in n}
            weights |= self._stored_elsewhere()
            for part, root in self.adapted.items():
                if lora.lora_layers(root):
                    lora.save_lora(root, directory / lora.FOLDERS[part])
            if not self.config.instruction_aware:
                weights = {name.replace(NORM, BLIP2_NORM): v for name, v in weights.items()}
            start = None if whole else self.assets
            if start is None or not write_changed(weights, start, directory):
                write_weights(weights, directory / "model.safetensors")
            if self.assets is not None and (self.assets / RETRIEVAL_FILE).is_file():
                write_retrieval(*read_retrieval(self.assets), directory)

    def _stored_elsewhere(self) -> dict[str, Tensor]:
        """Frozen weights that this process does not hold in full, because they are quantized or
        sharded over ranks, read from the directory that the model was loaded from."""
        weights = self.state_dict()
        names = quantized_names(self) + [n for n, v in weights.items() if distributed.is_sharded(v)]
        if not names:
            return {}
        assert self.assets is not None, "such a model was loaded from a directory"
        stored = read_weights(self.assets)
        return {name: stored[name] for name in names}


def by_our_names(values: dict[str, Value]) -> dict[str, Value]:
    """Tensors of a BLIP-2 or an InstructBLIP by the names of ``InstructBlip``; no leftovers."""
    named = ((name.replace(BLIP2_NORM, NORM), value) for name, value in values.items())
    return {name: value for name, value in named if not HARMLESS.fullmatch(name)}


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], where: Path | str, as_stored: bool = False
) -> None:
    """Copy ``weights`` into ``model``, or with ``as_stored`` make them its parameters; every tensor
    of either side must have its counterpart.

    Of tied tensors one name is enough. Raises one ValueError that lists all that does not fit.
    """
    expected = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, value in expected.items():
        names.setdefault(id(value), []).append(name)
    given = {id(value) for name, value in expected.items() if name in weights}
    problems = [
        f"missing: {name} {_shape(value)}"
        for name, value in expected.items()
        if name not in weights and id(value) not in given
    ]
    problems += [
        f"unexpected: {name} {_shape(value)}"
        for name, value in weights.items()
        if name not in expected
    ]
    problems += [
        f"mis-shaped: {name} got {_shape(weights[name])}, expected {_shape(value)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        shown = "\n  ".join(problems[:40])
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise ValueError(
            f"the weights in {where} do not fit the model that its config.json describes "
            f"({len(problems)} tensors):\n  {shown}{more}\n"
            "Check that config.json and weights belong together and that the download is complete."
        )
    _untie(model, weights, names)
    for name, value in model.state_dict(keep_vars=True).items():
        if name in weights:
            _fill(value, weights[name], as_stored)


@torch.no_grad()
def _fill(target: Tensor, value: Tensor, as_stored: bool) -> None:
    """Give ``target`` a value, wherever it is used."""
    if isinstance(target, nn.Parameter) and (target.is_meta or as_stored):
        if not as_stored:
            value = value.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
        torch.utils.swap_tensors(target, nn.Parameter(value, target.requires_grad))
    else:
        target.copy_(value)


def _untie(model: Any, weights: dict[str, Tensor], names: dict[int, list[str]]) -> None:
    """Separate tensors that the model ties and the file does not (Flan-T5's output head)."""
    for group in names.values():
        present = [weights[name] for name in group if name in weights]
        if all(torch.equal(present[0], other) for other in present[1:]):
            continue
        head = "language_model.lm_head.weight"
        rest = [weights[name] for name in group if name in weights and name != head]
        if head not in group or not all(torch.equal(rest[0], other) for other in rest[1:]):
            raise ValueError(f"the weights differ where the model has one tensor: {group}")
        untie_head(model.language_model)


def _shape(value: Tensor) -> list[int]:
    return list(value.shape)


def _in_text_branch(name: str) -> bool:
    """Whether a tensor of the model belongs to the text branch."""
    return TEXT_BRANCH.fullmatch(name) is not None


def _find_text_branch(directory: Path, text_branch: str | Path | None) -> dict[str, Tensor]:
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
    return read_text_branch(source)


def read_text_branch(source: Path) -> dict[str, Tensor]:
    """Tensors of a text branch by names ``qformer.*``, from any of the three formats.

    BERT's vocabulary gets one more row for the [DEC] token that BLIP-2's tokenizer adds, the mean
    of the others: instruction tuning does not read it. Raises ValueError where there is none.
    """
    weights = read_weights(source)
    is_bert = any("token_type_embeddings" in name for name in weights)
    branch = {}
    for name, value in weights.items():
        name = "qformer." + name.removeprefix("bert." if is_bert else "qformer.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if _in_text_branch(name):
            branch[name] = value
    words = "qformer.embeddings.word_embeddings.weight"
    if is_bert and words in branch:
        mean = branch[words].float().mean(0, keepdim=True).to(branch[words].dtype)
        branch[words] = torch.cat([branch[words], mean])
    if not branch:
        raise ValueError(
            f"{source} holds no text branch: expected word and position embeddings and text "
            "feed-forwards under the names of this project, Blip2ForImageTextRetrieval or BERT"
        )
    return branch


def save_text_branch(qformer: QFormer, file: str | Path) -> None:
    """Write the text branch alone, to stand beside a BLIP-2 as ``text_branch.safetensors``."""
    branch = {n: v for n, v in qformer.state_dict().items() if _in_text_branch(f"qformer.{n}")}
    if not branch:
        raise ValueError("the Q-Former has no text branch to save: it is not instruction-aware")
    with replacing(Path(file)) as temporary:
        write_weights(branch, temporary)


def retrieval_weights(directory: Path) -> dict[str, Tensor]:
    """What retrieval reads of a model directory, with its text branch if it has one."""
    weights = by_our_names(read_weights(directory))
    beside = directory / TEXT_BRANCH_FILE
    if beside.is_file() or "embeddings.word_embeddings.weight" in weights:
        weights = read_text_branch(beside if beside.is_file() else directory) | weights
    return {n: v for n, v in weights.items() if READ_BY_RETRIEVAL.fullmatch(n)}


def read_retrieval(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(heads by transformers' names, weights that retrieval reads) of a model directory.

    Raises ValueError for a model without heads.
    """
    if not (file := directory / RETRIEVAL_FILE).is_file():
        raise ValueError(
            f"{(name := name_of(directory))} has no retrieval heads ({RETRIEVAL_FILE}): "
            f"`instructblip pretrain retrieval_scenes --stage retrieval model.start={name}` trains "
            "them, with your "
            "captions in data.sets, and leaves the model's answers as they are"
        )
    stored = read_weights(file)
    moved = {n: v for n, v in stored.items() if READ_BY_RETRIEVAL.fullmatch(n)}
    heads = {n: v for n, v in stored.items() if n not in moved}
    return heads, retrieval_weights(directory) | moved


def write_retrieval(heads: dict[str, Tensor], weights: dict[str, Tensor], directory: Path) -> None:
    """Write the heads into a model directory, with those ``weights`` that differ from the ones
    there: training a model further leaves its retrieval as it was."""
    there = retrieval_weights(directory)
    moved = {
        name: value
        for name, value in weights.items()
        if name not in there or not torch.equal(value.detach().cpu(), there[name])
    }
    with replacing(directory / RETRIEVAL_FILE) as temporary:
        write_weights(heads | moved, temporary)


def to_retrieval(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of image encoder and Q-Former by the names of transformers'
    Blip2ForImageTextRetrieval, whose tables of words and positions are beside the Q-Former."""
    return {
        re.sub(r"^qformer\.(?=embeddings\.)", "", name.replace(NORM, BLIP2_NORM)): value
        for name, value in weights.items()
    }


def _fit_config(
    config: InstructBlipConfig, weights: dict[str, Tensor], aware: bool, image_size: int | None
) -> InstructBlipConfig:
    """The config of the model to build. A BLIP-2's config says nothing true about its text branch:
    the sizes of the embeddings are those of the branch in ``weights``."""
    qformer, vision = config.qformer, config.vision
    if aware and not config.instruction_aware:
        tables = {"vocab_size": "word", "max_position_embeddings": "position"}
        names = {field: f"qformer.embeddings.{t}_embeddings.weight" for field, t in tables.items()}
        sizes = {field: len(weights[name]) for field, name in names.items() if name in weights}
        qformer = qformer.model_copy(update=sizes)
    if image_size is not None:
        vision = type(vision)(**{**vision.model_dump(), "image_size": image_size})
    return config.model_copy(
        update={"qformer": qformer, "vision": vision, "instruction_aware": aware}
    )


def _copy_assets(source: Path, target: Path, config: InstructBlipConfig) -> None:
    """Tokenizers and settings; what they say of the model follows the model."""
    patterns = ASSETS if config.instruction_aware else (*ASSETS, TEXT_BRANCH_FILE)
    for pattern in patterns:
        for asset in sorted(source.glob(pattern)):
            copy = shutil.copytree if asset.is_dir() else shutil.copyfile
            copy(asset, target / asset.name)
    # transformers' processor puts as many placeholders as this says in front of a prompt
    processor = target / "processor_config.json"
    values = read_json(processor) if processor.is_file() else {}
    values["processor_class"] = READERS[config.kind] + "Processor"
    values["num_query_tokens"] = config.num_query_tokens
    processor.write_text(json.dumps(values), encoding="utf-8")
    side = {"height": config.vision.image_size, "width": config.vision.image_size}
    for file in target.glob("*processor_config.json"):
        values = read_json(file)
        for part in (values, values.get("image_processor", {}), values.get("video_processor", {})):
            part.update({key: side for key in ("size", "crop_size") if key in part})
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
