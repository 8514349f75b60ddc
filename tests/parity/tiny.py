"""Tiny random transformers models and batches, shared by the tests of the model."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
)

from instructblip.core.batch import Batch

IMAGE_TOKEN = 59
VOCAB = 60
DECODER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 5}  # shorter than the rows of `tiny_batch`
KINDS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **DECODER, "head_dim": 8},
    "mistral": {"model_type": "mistral", **DECODER, **WINDOW},
    "gemma": {"model_type": "gemma", **DECODER, "head_dim": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        **DECODER,
        **WINDOW,
        "head_dim": 8,
        "layer_types": KINDS,
        "query_pre_attn_scalar": 8,
    },
    "smollm3": {"model_type": "smollm3", **DECODER, "no_rope_layers": [1, 0]},
    "phi": {"model_type": "phi", **DECODER, "hidden_size": 32, "partial_rotary_factor": 0.5},
    "phi3": {"model_type": "phi3", **DECODER, "hidden_size": 32, "partial_rotary_factor": 0.5},
}
"""Decoders that differ from Llama in norms, rotation, windows, projections or the residual."""

LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **DECODER},
    "opt": {
        "model_type": "opt",
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        "dropout": 0.1,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 3,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "t5-scaled": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 20,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    **FAMILIES,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vision": {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "hidden_size": 16},
        "qformer": {"num_hidden_layers": 4, "hidden_size": 20, "num_attention_heads": 2},
        "num_query_tokens": 3,
    },
    "one layer, odd sizes": {
        "vision": {"image_size": 21, "patch_size": 7, "num_hidden_layers": 1, "hidden_size": 18},
        "qformer": {"num_hidden_layers": 1, "hidden_size": 15, "num_attention_heads": 3},
        "num_query_tokens": 1,
    },
    "every third layer": {
        "vision": {"image_size": 20, "patch_size": 6, "num_hidden_layers": 3, "hidden_size": 14},
        "qformer": {
            "num_hidden_layers": 5,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "cross_attention_frequency": 3,
        },
        "num_query_tokens": 5,
    },
}


def tiny_config(
    language: str = "llama", shape: str = "small", dropout: float = 0.1, **text: Any
) -> dict[str, Any]:
    """Keyword arguments of transformers' InstructBlipConfig and Blip2Config."""
    sizes = SHAPES[shape]
    return {
        "vision_config": {"intermediate_size": 30, "num_attention_heads": 2, **sizes["vision"]},
        "qformer_config": {
            "vocab_size": 40,
            "intermediate_size": 26,
            "max_position_embeddings": 12,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            **sizes["qformer"],
        },
        "text_config": {"vocab_size": VOCAB, **LANGUAGES[language], **text},
        "num_query_tokens": sizes["num_query_tokens"],
        "image_token_index": IMAGE_TOKEN,
    }


def tiny_transformers(
    language: str = "llama", shape: str = "small", kind: str = "instructblip", seed: int = 0
) -> Any:
    """A transformers model with random weights of a size that makes every part matter.

    Its own initialisation would make all queries equal and the pictures invisible.
    """
    torch.manual_seed(seed)
    arguments = tiny_config(language, shape)
    if kind == "instructblip":
        model = InstructBlipForConditionalGeneration(InstructBlipConfig(**arguments))
    elif kind == "instructblipvideo":
        arguments["video_token_index"] = arguments.pop("image_token_index")
        model = InstructBlipVideoForConditionalGeneration(InstructBlipVideoConfig(**arguments))
    else:
        model = Blip2ForConditionalGeneration(Blip2Config(**arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower()
            # T5 attends without a scale: larger weights would only test rounding.
            std = 0.06 if language.startswith("t5") and "language_model" in name else 0.15
            parameter.normal_(1.0 if norm and name.endswith("weight") else 0.0, std)
    return model.eval()


def padded(name: str, rows: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """``{name}_ids`` and ``{name}_mask``, padded on the right with ``pad``."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return {
        f"{name}_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        f"{name}_mask": pad_sequence(mask, batch_first=True),
    }


def tiny_batch(config: Any, seed: int = 1, pad: int = 0) -> Batch:
    """Three samples of unequal lengths over two pictures of which one is shared.

    ``config`` is ours or transformers'. No field has its longest row where another has it, so
    that every row is padded somewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    size = getattr(config, "vision_config", None) or config.vision

    def ids(high: int, lengths: tuple[int, ...], end: list[int]) -> list[list[int]]:
        draw = [torch.randint(4, high, (n,), generator=generator).tolist() for n in lengths]
        return [row + end for row in draw]

    return Batch(
        pixel_values=torch.randn(2, 3, size.image_size, size.image_size, generator=generator),
        image_index=torch.tensor([[0], [1], [0]]),
        **padded("qformer", ids(40, (6, 2, 4), [3]), pad),
        **padded("prompt", ids(58, (1, 3, 6), []), pad),
        **padded("response", ids(58, (2, 5, 1), [2]), pad),
    )


def transformers_inputs(batch: Batch, num_query_tokens: int) -> dict[str, torch.Tensor]:
    """The batch in transformers' layout for a decoder-only model, padded on the right:
    [<image> * Q] + prompt + response, labels at the response alone."""
    rows, labels = [], []
    for sample in range(len(batch)):
        prompt = batch.prompt_ids[sample][batch.prompt_mask[sample].bool()].tolist()
        response = batch.response_ids[sample][batch.response_mask[sample].bool()].tolist()
        rows.append([IMAGE_TOKEN] * num_query_tokens + prompt + response)
        labels.append([-100] * (num_query_tokens + len(prompt)) + response)
    text = padded("input", rows)
    label_ids = pad_sequence([torch.tensor(row) for row in labels], True, padding_value=-100)
    return {
        **picture_inputs(batch),
        "input_ids": text["input_ids"],
        "attention_mask": text["input_mask"],
        "labels": label_ids,
    }


def seq2seq_inputs(batch: Batch, num_query_tokens: int) -> dict[str, torch.Tensor]:
    """The batch in transformers' layout for an encoder-decoder."""
    image = torch.full((len(batch), num_query_tokens), IMAGE_TOKEN)
    labels = batch.response_ids.masked_fill(batch.response_mask == 0, -100)
    return {
        **picture_inputs(batch),
        "input_ids": torch.cat([image, batch.prompt_ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(image), batch.prompt_mask], dim=1),
        "labels": labels,
    }


def picture_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Pictures (one per sample) and the instruction for the Q-Former."""
    assert batch.pixel_values is not None
    return {
        "pixel_values": batch.pixel_values[batch.image_index[:, 0]],
        "qformer_input_ids": batch.qformer_ids,
        "qformer_attention_mask": batch.qformer_mask,
    }
