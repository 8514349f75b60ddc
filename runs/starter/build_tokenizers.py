"""Trains the starter's two tokenizers: byte-level BPE for the language model, WordPiece for the
Q-Former. Both lower-case, so that "What" and "what" are one word of a small world.

    python runs/starter/build_tokenizers.py OUT
"""

import random
import sys
from pathlib import Path

from corpus import texts
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertTokenizerFast, PreTrainedTokenizerFast


def language_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=3,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        truncation_side="left",
        clean_up_tokenization_spaces=False,
    )


def qformer_tokenizer(lines: list[str]) -> BertTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=768, min_frequency=3, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return BertTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=["[DEC]"],
        truncation_side="left",
        do_lower_case=True,
    )


def main() -> None:
    out = Path(sys.argv[1])
    lines = texts(random.Random(0), 6000)
    language, qformer = language_tokenizer(lines), qformer_tokenizer(lines)
    language.save_pretrained(str(out))
    qformer.save_pretrained(str(out / "qformer_tokenizer"))
    for tokenizer in (language, qformer):
        text = "What color is the circle? Short answer: (a) red (b) top left."
        print(len(tokenizer), tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


if __name__ == "__main__":
    main()
