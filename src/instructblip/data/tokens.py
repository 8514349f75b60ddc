"""Text to token ids: the instruction for the Q-Former, prompt and response for the language model.

Policies, for a decoder-only language model (Llama, OPT) and an encoder-decoder one (T5)::

    Q-Former     [CLS] what colour ? [SEP]
    prompt       <s> Question : what colour ? Short answer :        (T5: ... </s>)
    response     red </s>                                           (never <s>)

Over-long text: instruction and prompt lose their beginning (the question stands at the end, the
history before it) and keep their special tokens; a response loses its end and keeps ``</s>``.

The response is tokenised as it reads after the prompt and one space, so that prompt ids and
response ids in a row decode to "... Short answer: red": a byte-level tokenizer gives " red" and a
Llama one "▁red". Special tokens written out in a text (a question that says "</s>") are text.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from instructblip.data.templates import Rendered

ENCODER_DECODER = ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "led", "t5gemma")


@dataclass(frozen=True, slots=True)
class _Wrap:
    """A tokenizer with the special tokens that it puts around a text."""

    tokenizer: Any
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_Wrap":
        bare = _encode(tokenizer, "a")
        full = list(tokenizer("a")["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return cls(tokenizer, tuple(full[:start]), tuple(full[start + len(bare) :]))
        raise ValueError(f"{type(tokenizer).__name__}: its special tokens change the text's own")

    def last(self, text: str, limit: int, suffix: bool = True) -> list[int]:
        """The end of ``text`` between the special tokens, at most ``limit`` ids in all."""
        after = self.suffix if suffix else ()
        room = max(1, limit - len(self.prefix) - len(after))
        return [*self.prefix, *_encode(self.tokenizer, text)[-room:], *after]


@dataclass(frozen=True)
class Tokens:
    """The tokenizers of a model and the policy above. ``qformer`` None: a plain BLIP-2."""

    language: PreTrainedTokenizerBase
    qformer: PreTrainedTokenizerBase | None = None
    decoder_only: bool = True
    max_instruction: int = 128
    max_prompt: int = 128
    max_response: int = 256
    _language: _Wrap = field(init=False, repr=False)
    _qformer: _Wrap | None = field(init=False, repr=False)
    _anchor: str | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.language.eos_token_id is None:
            raise ValueError("the language model's tokenizer has no end token; set `eos_token`")
        object.__setattr__(self, "_language", _Wrap.of(self.language))
        object.__setattr__(self, "_qformer", _Wrap.of(self.qformer) if self.qformer else None)
        object.__setattr__(self, "_anchor", _anchor(self.language))

    @classmethod
    def from_pretrained(cls, path: str | Path, **limits: int) -> "Tokens":
        """Tokenizers of a model directory; nothing is downloaded and no code of it is run."""
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no model directory {path}; expected one with a tokenizer")
        qformer = path / "qformer_tokenizer"
        return cls(
            language=load_tokenizer(path),
            qformer=load_tokenizer(qformer) if qformer.is_dir() else None,
            decoder_only=_is_decoder_only(path / "config.json"),
            **limits,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the layout that ``from_pretrained`` and transformers' processor read."""
        self.language.save_pretrained(str(path))
        if self.qformer is not None:
            self.qformer.save_pretrained(str(Path(path) / "qformer_tokenizer"))

    def tokenize(self, rendered: Rendered) -> tuple[list[int], list[int], list[int]]:
        """(qformer_ids [I], prompt_ids [T], response_ids [R]); empty where there is no text."""
        qformer = self._qformer
        instruction = qformer.last(rendered.instruction, self.max_instruction) if qformer else []
        response = self.response(rendered.response) if rendered.response else []
        return instruction, self.prompt(rendered.prompt), response

    def prompt(self, text: str) -> list[int]:
        """[T]; begins as the tokenizer does (a decoder's prompt never ends with an end token)."""
        return self._language.last(text, self.max_prompt, suffix=not self.decoder_only)

    def response(self, text: str) -> list[int]:
        """[R]; ends with the end token, never begins with a special one."""
        return [*self._response(text)[: self.max_response - 1], self.eos_id]

    def response_length(self, text: str) -> int:
        """Tokens of a response before it is cut to ``max_response``, its end token included."""
        return len(self._response(text)) + 1

    def prompt_length(self, text: str) -> int:
        """Tokens of a prompt before it is cut to ``max_prompt``, its special ones included."""
        added = self._language.suffix if not self.decoder_only else ()
        own = _encode(self.language, text)
        return len(self._language.prefix) + len(own) + len(added)

    def _response(self, text: str) -> list[int]:
        ids = _continue(self.language, self._anchor, text) if self.decoder_only else None
        return _encode(self.language, text) if ids is None else ids

    def candidates(self, texts: list[str] | tuple[str, ...]) -> list[list[int]]:
        """[C][R]: answers to rank, tokenised exactly as responses are in training."""
        return [self.response(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids, without special tokens and surrounding white space."""
        return str(self.language.decode(ids, skip_special_tokens=True)).strip()

    @property
    def eos_id(self) -> int:
        eos = self.language.eos_token_id
        assert isinstance(eos, int)
        return eos


def _encode(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(encoded["input_ids"])


ANCHORS = (":", ".", "a", "?", "the")


def _anchor(tokenizer: Any) -> str | None:
    """A text that keeps its ids when more is written after it."""
    for anchor in ANCHORS:
        head = _encode(tokenizer, anchor)
        if head and _encode(tokenizer, f"{anchor} a")[: len(head)] == head:
            return anchor
    return None


def _continue(tokenizer: Any, anchor: str | None, text: str) -> list[int] | None:
    """Ids of ``text`` as it is tokenised after other text and a space."""
    if anchor is None:
        return None
    head, whole = _encode(tokenizer, anchor), _encode(tokenizer, f"{anchor} {text}")
    return whole[len(head) :] if whole[: len(head)] == head else None


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, from this disk alone. ValueError when there is none."""
    # Asked first: for some model types transformers makes up an empty tokenizer when there is none.
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{path}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}, as "
            "`save_pretrained` of the model's tokenizer writes them"
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: the tokenizer cannot be read ({str(error).splitlines()[0]}); download "
            "tokenizer.json and tokenizer_config.json again"
        ) from error


def _is_decoder_only(path: Path) -> bool:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; expected the config.json of a model directory")
    config = json.loads(path.read_text(encoding="utf-8"))
    known = config.get("use_decoder_only_language_model")
    if isinstance(known, bool):
        return known
    text = config.get("text_config") or config.get("language") or config
    return not text.get("is_encoder_decoder", text.get("model_type") in ENCODER_DECODER)
