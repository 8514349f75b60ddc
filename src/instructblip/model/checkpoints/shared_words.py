"""A Q-Former that has no words of its own takes its language model's: tokenizer and word table."""

from typing import Any

from jaxtyping import Float
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def shared_tokenizer(language: Any) -> PreTrainedTokenizerBase:
    """A language model's tokenizer for the Q-Former: ``<start> text <end>`` with its own tokens.

    The contrast and the captions of stage 1 read the first token as [CLS] and [DEC], so it must not
    be a word. Without a start token the end token comes first too.
    """
    if not getattr(language, "is_fast", False) or language.eos_token is None:
        raise ValueError(
            f"{type(language).__name__} cannot be the Q-Former's tokenizer too: it has no "
            "tokenizer.json, or no end token; give a BERT's with --qformer-tokenizer"
        )
    backend = Tokenizer.from_str(language.backend_tokenizer.to_str())
    start, end = language.bos_token or language.eos_token, language.eos_token
    ids = [(token, language.convert_tokens_to_ids(token)) for token in {start: 0, end: 0}]
    backend.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    special = {
        name: getattr(language, name)
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if getattr(language, name) is not None
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def shared_words(words: Float[Tensor, "rows D"], deviation: float) -> Float[Tensor, "rows D"]:
    """Word embeddings scaled to the deviation of new weights, which is that of the position
    embeddings that are added to them."""
    # in fp64, so that the result does not depend on the number of threads that add
    return words * float(deviation / words.double().std())
