"""Language models in GGUF, llama.cpp's format: sizes, weights and tokenizer in one file.

The weights are dequantized to fp32 under the names of transformers. llama.cpp turns the rows of
Llama's queries and keys from two halves of each head, as transformers rotates them, into pairs;
here they are turned back. Needs the extra ``gguf``; the format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

TYPES = ("F32", "F16", "Q8_0", "Q4_1")
"""Types of tensors that are read."""

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
"""``general.architecture``, which is transformers' model_type -> whether queries and keys are
turned."""

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": lambda: _split(rf"{SHORT}|{WORDS}|\p{{N}}{{1,3}}|{REST}"),
    "qwen2": lambda: _split(rf"{SHORT}|{WORDS}|\p{{N}}|{REST}"),
}
"""``tokenizer.ggml.pre`` -> how a text is cut into words before its bytes are merged."""

CONTROL, USER_DEFINED = 3, 4
"""Of ``tokenizer.ggml.token_type``: tokens that are no text, and whole words of the model."""


class Gguf(NamedTuple):
    """An opened file: its metadata by key, and its tensors as gguf's reader returns them."""

    path: Path
    values: Any
    tensors: list[Any]

    def get(self, key: str, default: Any = None) -> Any:
        field = self.values.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        if key not in self.values:
            raise ValueError(f"{self.path} has no {key}; convert the model to GGUF again")
        return self.get(key)

    @property
    def architecture(self) -> str:
        return str(self.need("general.architecture"))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or the only one in a directory without other weights.

    Raises ValueError for a directory with several.
    """
    if path.suffix == ".gguf":
        return path
    if any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*.bin*")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds {len(files)} GGUF files, {names}: give the path of one")
    return files[0] if files else None


def open_gguf(path: Path) -> Gguf:
    """Open a file; no tensor is read yet.

    Raises FileNotFoundError, and ValueError without the package gguf, for a damaged file, and for
    an architecture or types of tensors that are not read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a GGUF file")
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} is a GGUF file, and {error.name} is missing: pip install 'instructblip[gguf]'"
        ) from error
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no GGUF ({error}); download it again") from error
    opened = Gguf(path, reader.fields, list(reader.tensors))
    if opened.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path} holds the architecture {opened.architecture!r}; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    others = sorted({t.tensor_type.name for t in opened.tensors} - {*TYPES})
    if others:
        raise ValueError(
            f"{path} holds tensors of type {', '.join(others)}; expected {', '.join(TYPES)}: "
            "download the model in one of these"
        )
    return opened


def gguf_config(path: Path) -> dict[str, Any]:
    """The values that transformers' ``config.json`` of the language model would have."""
    opened = open_gguf(path)
    kind = opened.architecture
    shapes = {tensor.name: [int(n) for n in tensor.shape[::-1]] for tensor in opened.tensors}
    scaling = opened.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in shapes:
        raise ValueError(
            f"{path} scales its rotary positions ({scaling}), which is not read from a GGUF: give "
            "the model's transformers directory"
        )
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path} has no token_embd.weight; convert the model to GGUF again")
    rows, width = shapes["token_embd.weight"]
    heads = opened.need(f"{kind}.attention.head_count")
    config = {
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": opened.need(f"{kind}.feed_forward_length"),
        "num_hidden_layers": opened.need(f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": opened.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": opened.get(f"{kind}.attention.key_length", width // heads),
        "max_position_embeddings": opened.need(f"{kind}.context_length"),
        "rms_norm_eps": _decimal(opened.need(f"{kind}.attention.layer_norm_rms_epsilon")),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _decimal(opened.get(f"{kind}.rope.freq_base", 10000.0)),
        },
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if kind != "qwen2":  # Qwen2 always has them
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = opened.get(f"tokenizer.ggml.{key}_token_id")
    return config


def gguf_weights(path: Path) -> dict[str, Tensor]:
    """All weights in fp32 by transformers' names. Raises ValueError for an unknown tensor."""
    from gguf import dequantize

    opened = open_gguf(path)
    kind = opened.architecture
    heads = opened.need(f"{kind}.attention.head_count")
    groups = opened.get(f"{kind}.attention.head_count_kv", heads)
    weights = {}
    for tensor in opened.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        value = torch.from_numpy(values).reshape([int(n) for n in tensor.shape[::-1]])
        name = OUTSIDE.get(tensor.name)
        if part := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name):
            layer, module, which = part.groups()
            if module in LAYER:
                name = f"model.layers.{layer}.{LAYER[module]}.{which}"
            if ARCHITECTURES[kind] and module in ("attn_q", "attn_k"):
                value = _halves(value, heads if module == "attn_q" else groups)
        if name is None:
            raise ValueError(
                f"{path} has a tensor {tensor.name}, which a {kind} of transformers has not; give "
                "the model's transformers directory"
            )
        weights[name] = value.contiguous()
    return weights


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in the file's metadata, with its special tokens and chat template.

    Raises ValueError for one that is no byte-level BPE, or that cuts words in an unknown way.
    """
    opened = open_gguf(path)
    model, pre = opened.need("tokenizer.ggml.model"), opened.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in PRE:
        raise ValueError(
            f"{path} has the tokenizer {model!r} with pre-tokenizer {pre!r}; expected 'gpt2' (byte-"
            f"level BPE) with one of {', '.join(PRE)}: give the model's transformers directory"
        )
    words, merges = opened.need("tokenizer.ggml.tokens"), opened.need("tokenizer.ggml.merges")
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [tuple(merge.split(" ")) for merge in merges],
            ignore_merges=pre == "llama-bpe",  # a word that is a token needs no merges
        )
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = opened.get("tokenizer.ggml.token_type", [])
    for kind in (CONTROL, USER_DEFINED):
        added = [w for w, each in zip(words, kinds, strict=False) if each == kind]
        tokenizer.add_tokens(
            [AddedToken(w, special=kind == CONTROL, normalized=False) for w in added]
        )
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: opened.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    special = {f"{name}_token": words[i] for name, i in ids.items() if i is not None}
    before = opened.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    after = opened.get("tokenizer.ggml.add_eos_token", False)
    around = [
        special[n] if wanted else ""
        for n, wanted in zip(("bos_token", "eos_token"), (before, after), strict=True)
    ]
    if any(around):
        tokenizer.post_processor = TemplateProcessing(
            single=" ".join(filter(None, (around[0], "$A", around[1]))),
            special_tokens=[(word, words.index(word)) for word in {*around} - {""}],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=opened.get("tokenizer.chat_template"),
        model_max_length=opened.need(f"{opened.architecture}.context_length"),
        **special,
    )


def _split(pattern: str) -> Any:
    """Words by a pattern, then their bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _halves(value: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (0, n/2), (1, n/2 + 1), ... back to their order 0 ... n-1."""
    pairs = value.unflatten(0, (heads, -1, 2))  # [heads, n/2, 2, ...]
    return pairs.transpose(1, 2).reshape(value.shape)


def _decimal(value: float) -> float:
    """The shortest decimal that is the same number in fp32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
