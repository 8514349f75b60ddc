"""What several test files share: tiny tokenizers and models, and files of data made on the spot."""

import io
import json
import tarfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from instructblip.data.custom.formats import custom_source
from instructblip.data.custom.rows import CustomSet
from instructblip.data.images import ImageTransform
from instructblip.data.prepared.dataset import PreparedDataset
from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading.records import MAX_TEXT
from instructblip.data.tokens import Tokens
from instructblip.model.instructblip import InstructBlip
from instructblip.model.retrieval import Heads, write_heads
from tests.parity.tiny import tiny_config

WORDS = ("question", "short", "answer", "what", "is", "the", "red", "blue", "cat", ":", "?", ".")


def wordpiece() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: [CLS] words [SEP], letters for the rest."""
    letters = [chr(c) for c in range(97, 123)]
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS, *letters, *("##" + c for c in letters)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def llama_like() -> PreTrainedTokenizerFast:
    """Sentence-piece style: words begin with "▁", one in front of the text, <s> first."""
    pieces = ["<unk>", "<s>", "</s>"]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>/:?.,▁ "))
    vocab = {piece: i for i, piece in enumerate([*pieces, *letters, "▁r", "ed", "▁red"])}
    model = models.BPE(
        vocab, [("▁", "r"), ("e", "d"), ("▁r", "ed")], unk_token="<unk>", fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2 style: a space belongs to the word after it, no start token."""
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"Ġr": 256, "ed": 257, "Ġred": 258, "<|end|>": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "r"), ("e", "d"), ("Ġr", "ed")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def t5_like() -> PreTrainedTokenizerFast:
    """As Llama's, but </s> at the end and nothing in front."""
    tokenizer: PreTrainedTokenizerBase = llama_like()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_picture(path: Path, size: tuple[int, int] = (12, 10), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_video(path: Path, colours: list[tuple[int, int, int]]) -> None:
    """A video of 64 x 48 pixels with one frame of each colour. Needs PyAV."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), colour, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_vqa(root: Path, count: int, split: str = "train") -> Path:
    """VQAv2's two files with ``count`` questions, two to a picture, ten answers each."""
    questions, annotations = [], []
    for i in range(count):
        image = i // 2
        write_picture(root / "images" / f"COCO_{split}2014_{image:012d}.jpg", seed=image)
        questions.append({"question_id": i, "image_id": image, "question": f"what is {i}?"})
        answers = ["red"] * 7 + [f"blue {i}"] * 3
        annotations.append(
            {
                "question_id": i,
                "image_id": image,
                "question_type": "what is",
                "answer_type": "other",
                "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(answers)],
            }
        )
    folder = root / "annotations"
    name = f"mscoco_{split}2014"
    write_json(folder / f"v2_OpenEnded_{name}_questions.json", {"questions": questions})
    write_json(folder / f"v2_{name}_annotations.json", {"annotations": annotations})
    return root


def write_json_lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


TURNS = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cup."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "Red."},
]
"""A dialogue about one image, in the form of LLaVA."""

HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    7,
    -1,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "/etc/passwd",
    "../../../etc/passwd",
    "a\u2028b\u2029c\x85d",
    "half \ud800 character",
    "nul\0byte",
    "n" * 300 + ".jpg",
    "x" * (MAX_TEXT + 1),
    [],
    [[]],
    {},
    {"": None},
)
"""Values that a field of an annotation file should not have."""


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The first record of each list, and every field below it."""
    if here:
        yield here
    if isinstance(value, dict):
        for key in list(value)[:12]:
            yield from places(value[key], (*here, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*here, 0))


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at ``place``; without it, for ``...``."""
    value = deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return value


def read_custom(root: Path, form: str, **options: Any) -> list[Any]:
    """The examples of a custom data set, read and not prepared. Raises the first error of a row."""
    examples = list(custom_source(CustomSet("mine", form, **options)).read(root, "train"))
    for example in examples:
        if isinstance(example, ValueError):
            raise example
    return examples


def prepare_vizwiz(
    root: Path, records: list[dict[str, Any]], split: str = "train"
) -> PreparedDataset:
    """A set with one image per record, written unless the test has written it."""
    for i, record in enumerate(records):
        record.setdefault("image", f"{split}{i}.png")
        record.setdefault("question", f"What is {i}?")
        record.setdefault("answers", [{"answer": f"cup {i}"}])
        if not (root / "images" / record["image"]).exists():
            write_picture(root / "images" / record["image"], seed=hash((split, i)) % 1000)
    write_json(root / "annotations" / f"{split}.json", records)
    return prepare("vizwiz", root, split, root / "prepared")


def bad_samples(dataset: PreparedDataset) -> list[dict[str, Any]]:
    text = (dataset.path / "bad_samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


QUESTION = "Question: what is red? Short answer:"


def write_model(folder: Path, kind: str, rows: int = 260) -> Path:
    """A model directory as transformers writes one, with tokenizers and settings."""
    config = tiny_config("llama", vocab_size=rows, eos_token_id=259, bos_token_id=None)
    config["image_token_index"] = rows - 1
    config["qformer_config"] |= {"vocab_size": 90, "max_position_embeddings": 64}
    torch.manual_seed(0)
    if kind == "instructblip":
        model = InstructBlipForConditionalGeneration(InstructBlipConfig(**config))
    else:
        model = Blip2ForConditionalGeneration(Blip2Config(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.15)
    model.save_pretrained(folder)
    Tokens(language=byte_level(), qformer=wordpiece()).save_pretrained(folder)
    ImageTransform(image_size=16).save_pretrained(folder)
    settings = {"num_beams": 2, "max_new_tokens": 4, "max_length": 99, "eos_token_id": 259}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def add_heads(folder: Path) -> Path:
    """Random heads of retrieval beside a model of ``write_model``."""
    torch.manual_seed(1)
    model = InstructBlip.from_pretrained(folder)
    heads = Heads(model.config.qformer.hidden_size, 8)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
    write_heads(heads, model, folder)
    return folder
