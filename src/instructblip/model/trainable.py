"""The parts of an InstructBLIP that can train, by the names of their parameters."""

import re

from torch import nn

PARTS = {
    "query_tokens": r"query_tokens",
    "qformer_text_embeddings": r"qformer\.embeddings\.(word|position)_embeddings\..*",
    # The LayerNorm over the concatenation feeds the first self-attention.
    "qformer_self_attention": r"qformer\.(embeddings\.layernorm|encoder\.layer\.\d+\.attention)"
    r"\..*",
    "qformer_cross_attention": r"qformer\.encoder\.layer\.\d+\.crossattention\..*",
    "qformer_feed_forward": r"qformer\.encoder\.layer\.\d+\.(intermediate|output)(_query)?\..*",
    "projection": r"language_projection\..*",
    "vision_norm": r"vision_model\.post_layernorm\..*",
    "vision_tower": r"vision_model\.(embeddings|encoder)\..*",
    "language_model": r"language_model\..*",
    "lora": r"language_model\..*\.lora\.[AB]",
    "qformer_lora": r"(qformer|language_projection)(\..*)?\.lora\.[AB]",
}
"""Part -> pattern of the whole names of its parameters. An adapter belongs to the last part that
matches, every other parameter to the only one."""

ALIASES = {
    # What the official code trains: 188M of 8B parameters for Vicuna-7B (section 3.4).
    "qformer": (
        "query_tokens",
        "qformer_text_embeddings",
        "qformer_self_attention",
        "qformer_cross_attention",
        "qformer_feed_forward",
        "projection",
        "vision_norm",
    ),
}


def part_of(name: str) -> str:
    """The part that the parameter ``name`` belongs to."""
    parts = [part for part, pattern in PARTS.items() if re.fullmatch(pattern, name)]
    assert len(parts) == 1 or parts[1:] in (["lora"], ["qformer_lora"]), f"{name}: {parts}"
    return parts[-1]


def eval_frozen(model: nn.Module) -> None:
    """Put each module of ``model`` without a trainable parameter in eval mode. Dropout of a frozen
    language model would be noise in the loss (the official code leaves Flan-T5's on)."""
    for module in model.modules():
        if any(True for _ in module.parameters()) and not is_trainable(module):
            module.eval()


def is_trainable(*modules: nn.Module) -> bool:
    """Whether any parameter trains, those of LoRA adapters inside the modules left out."""
    named = (pair for module in modules for pair in module.named_parameters())
    return any(p.requires_grad and "lora." not in name for name, p in named)
