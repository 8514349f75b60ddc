"""GGUF: a language model written as llama.cpp writes it, and what comes back."""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from instructblip.core.gguf import LAYER, OUTSIDE, gguf_config, gguf_tokenizer, gguf_weights
from instructblip.data.tokens import load_tokenizer
from instructblip.model.checkpoints.weights import read_weights
from instructblip.model.language.adapters import build_language_model, read_language_config

WORDS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġr", "ed", "Ġred", "<|end|>", "<tool>"]
END = WORDS.index("<|end|>")
IDS = torch.randint(len(WORDS), (2, 9), generator=torch.Generator().manual_seed(0))
TEMPLATE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


def tiny(kind: str = "llama", **more: Any) -> Any:
    """A random language model with wide norms and biases, so that each tensor matters."""
    values = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "vocab_size": len(WORDS),
        "tie_word_embeddings": True,
        **more,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def write_gguf(path: Path, model: Any, dtype: str = "F32", **changes: Any) -> Path:
    """Write a model as llama.cpp's converter does; ``changes`` replace keys of the metadata."""
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    keys: dict[str, Any] = {
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.key_length": 8,
        "tokenizer.ggml.bos_token_id": END,
        "tokenizer.ggml.eos_token_id": END,
    }
    texts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", **changes}
    for key, value in keys.items():
        writer.add_uint32(key, value)
    for key, value in texts.items():
        writer.add_string(key, value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{kind}.rope.freq_base", 50000.0)
    writer.add_token_list(WORDS)
    writer.add_token_types([{"<|end|>": 3, "<tool>": 4}.get(word, 1) for word in WORDS])
    writer.add_token_merges(["Ġ r", "e d", "Ġr ed"])
    writer.add_chat_template(TEMPLATE)
    theirs = {ours: name for name, ours in OUTSIDE.items()}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.startswith("model.layers."):
            _, _, layer, *module, which = name.split(".")
            short = {ours: name for name, ours in LAYER.items()}[".".join(module)]
            if kind == "llama" and short in ("attn_q", "attn_k"):
                heads = 4 if short == "attn_q" else 2
                split = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
                array = split.swapaxes(1, 2).reshape(array.shape)
            name = f"blk.{layer}.{short}.{which}"
        else:
            name = theirs[name]
        if array.ndim == 1 or dtype == "F32":
            writer.add_tensor(name, np.ascontiguousarray(array))
        elif dtype == "F16":
            writer.add_tensor(name, array.astype(np.float16))
        else:
            packed = gguf.quantize(np.ascontiguousarray(array), Type[dtype])
            writer.add_tensor(name, packed, raw_dtype=Type[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path: Path) -> Any:
    model = build_language_model(read_language_config(path))
    weights = read_weights(path)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "model",
    [
        tiny(),
        tiny(attention_bias=True, tie_word_embeddings=False),
        tiny("qwen2"),
        tiny("qwen3"),
    ],
    ids=["llama", "llama, biases and a head", "qwen2", "qwen3"],
)
def test_the_logits_are_those_of_the_original(model: Any, tmp_path: Path) -> None:
    torch.testing.assert_close(
        logits(loaded(write_gguf(tmp_path / "a.gguf", model))), logits(model)
    )


def test_fp16_is_exact(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
    read = gguf_weights(write_gguf(tmp_path / "a.gguf", model, "F16"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in read.items())


@pytest.mark.parametrize(("dtype", "levels"), [("Q8_0", 254), ("Q4_1", 15)])
def test_quantized_weights_are_off_by_half_a_step(dtype: str, levels: int, tmp_path: Path) -> None:
    model = tiny()
    read = gguf_weights(write_gguf(tmp_path / "a.gguf", model, dtype))
    for name, value in read.items():
        given = model.state_dict()[name]
        if given.ndim == 1:
            assert torch.equal(value, given)
            continue
        blocks = given.unflatten(1, (-1, 32))  # each has its own scale
        symmetric = 2 * blocks.abs().amax(-1)
        span = symmetric if dtype == "Q8_0" else blocks.amax(-1) - blocks.amin(-1)
        step = (span / levels).repeat_interleave(32, 1)
        # scale and least value are stored in fp16, which rounds by 2^-11
        rounding = 2**-10 * given.abs().amax()
        assert ((value - given).abs() <= 0.5 * step + rounding).all(), name
        assert (value - given).abs().max() > 0.25 * step.max()


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(write_gguf(tmp_path / "a.gguf", tiny()).parent)
    assert tokenizer("a red 12")["input_ids"] == [
        WORDS.index(piece) for piece in ("a", "Ġred", "Ġ", "1", "2")
    ]
    assert tokenizer("<|end|>red<tool>")["input_ids"] == [
        WORDS.index(piece) for piece in ("<|end|>", "r", "ed", "<tool>")
    ]
    assert tokenizer.decode([WORDS.index("Ġred"), END], skip_special_tokens=True) == " red"
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|end|>")
    chat = [{"role": "user", "content": "red"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "red<|end|>"


def test_pre_tokenizers_cut_digits_as_their_models_do(tmp_path: Path) -> None:
    cuts = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        path = write_gguf(tmp_path / f"{pre}.gguf", tiny(), **{"tokenizer.ggml.pre": pre})
        backend: Tokenizer = gguf_tokenizer(path).backend_tokenizer
        cut = backend.pre_tokenizer.pre_tokenize_str("It's 12345\n")
        cuts[pre] = [piece for piece, _ in cut]
    assert cuts == {
        "gpt-2": ["It", "'s", "Ġ12345", "Ċ"],
        "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ċ"],
        "llama-bpe": ["It", "'s", "Ġ", "123", "45", "Ċ"],
        "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ċ"],
    }
    llama: Any = gguf_tokenizer(tmp_path / "llama-bpe.gguf")
    assert llama("red")["input_ids"][0] == END, "Llama 3 begins with its start token"


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        ("Q5_0", {}, r"type Q5_0; expected F32, F16, Q8_0, Q4_1"),
        ("F32", {"tokenizer.ggml.pre": "tekken"}, r"pre-tokenizer 'tekken'; expected .*smollm"),
        ("F32", {"tokenizer.ggml.model": "llama"}, r"tokenizer 'llama'"),
        ("F32", {"llama.rope.scaling.type": "yarn"}, r"rotary positions \(yarn\)"),
    ],
)
def test_what_is_not_read_is_named(
    dtype: str, changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny(), dtype, **changes)
    with pytest.raises(ValueError, match=message) as error:
        (gguf_config(path), gguf_tokenizer(path))
    assert "\n" not in str(error.value)


def test_files_that_are_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf does not exist"):
        gguf_config(tmp_path / "none.gguf")
    path = write_gguf(tmp_path / "a.gguf", tiny())
    content = path.read_bytes()
    for name, part in (
        ("b", b"x" * 200),
        ("c", content[:100]),
        ("d", content[: len(content) // 2]),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(part)
        with pytest.raises(ValueError, match=r"damaged or no GGUF.*download it again"):
            gguf_config(tmp_path / f"{name}.gguf")
    with pytest.raises(ValueError, match=r"holds 4 GGUF files, a\.gguf, b\.gguf"):
        read_language_config(tmp_path)
    mamba = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    mamba.write_header_to_file()
    mamba.write_kv_data_to_file()
    mamba.close()
    with pytest.raises(ValueError, match=r"architecture 'mamba'; expected one of llama"):
        gguf_config(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'instructblip\[gguf\]'"):
        gguf_config(path)
