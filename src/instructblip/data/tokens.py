"""Text to token ids: the instruction for the Q-Former, prompt and response for the language model.

Special tokens, for a decoder-only language model (Llama, OPT) and an encoder-decoder one (T5)::

    Q-Former     [CLS] what colour ? [SEP]
    prompt       <s> Question : what colour ? Short answer :        (T5: ... </s>)
    response     red </s>                                           (never <s>)

Text that is too long is cut: instruction and prompt lose their beginning, since the question
stands at the end and the history before it, and keep their special tokens; a response loses its
end and keeps ``</s>``.

The response is tokenized as it reads after the prompt and one space, so that the prompt ids
followed by the response ids decode to "... Short answer: red": a byte-level tokenizer gives " red",
a Llama tokenizer "▁red". Special tokens that occur in a text (a question with "</s>") are text.

``<image>`` in a prompt is no text but the place of an image; the Q-Former reads the text without
it. Marks take the images in order. Where there are fewer marks than images, the first images have
none and are in front of the prompt, before its start token; so is an image whose mark begins the
prompt. A prompt that is cut at its beginning keeps all its images.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from instructblip.core.example import IMAGE_MARK
from instructblip.core.files import read_json
from instructblip.core.gguf import find_gguf, gguf_tokenizer
from instructblip.data.chat_format import ChatFormat, read_chat_template
from instructblip.data.templates import Dialogue, Rendered

_MARK = re.compile(rf"(?<!\s)\s*{IMAGE_MARK}")
"""An image mark, and the white space that separates it from the word before. White space is
searched from its beginning only: from each of its characters takes quadratic time."""

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
        raise ValueError(
            f"{type(tokenizer).__name__}: the ids of a text change when special tokens are added"
        )

    def last(self, ids: list[int], limit: int, suffix: bool = True) -> list[int]:
        """The ids of a text between the special tokens, their beginning cut to ``limit`` in all."""
        after = self.suffix if suffix else ()
        return [*self.prefix, *ids[-self.room(limit, suffix) :], *after]

    def room(self, limit: int, suffix: bool = True) -> int:
        """How many ids of a text are among ``limit`` ids."""
        return max(1, limit - len(self.prefix) - (len(self.suffix) if suffix else 0))


class TokenizedTexts(NamedTuple):
    """The ids of one sample, as ``Sample`` has them."""

    qformer_ids: list[int]
    prompt_ids: list[int]
    response_ids: list[int]
    image_places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """The tokenizers of a model and the limits on texts; a plain BLIP-2 has no ``qformer``.

    With a ``chat_template`` prompts and responses are in its format (`chat_format.py`). Raises
    ValueError for a template that cannot be used, that is longer than ``max_prompt``, or that comes
    with an encoder-decoder.
    """

    language: PreTrainedTokenizerBase
    qformer: PreTrainedTokenizerBase | None = None
    decoder_only: bool = True
    max_instruction: int = 128
    max_prompt: int = 128
    max_response: int = 256
    chat_template: str | None = None
    _language: _Wrap = field(init=False, repr=False)
    _qformer: _Wrap | None = field(init=False, repr=False)
    _anchor: str | None = field(init=False, repr=False)
    _chat: ChatFormat | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.language.eos_token_id is None:
            raise ValueError("the language model's tokenizer has no end token; set its `eos_token`")
        object.__setattr__(self, "_language", _Wrap.of(self.language))
        object.__setattr__(self, "_qformer", _Wrap.of(self.qformer) if self.qformer else None)
        object.__setattr__(self, "_anchor", _anchor(self.language))
        object.__setattr__(self, "_chat", self._chat_format())

    def _chat_format(self) -> ChatFormat | None:
        if self.chat_template is None:
            return None
        if not self.decoder_only:
            raise ValueError("an encoder-decoder reads no chat format; set model.chat_template=off")
        chat = ChatFormat.of(self.language, self.chat_template)
        if (length := chat.length(Dialogue(""))) >= self.max_prompt:
            raise ValueError(
                f"the chat template alone has {length} tokens, and a prompt at most "
                f"{self.max_prompt}; raise data.max_prompt"
            )
        return chat

    @classmethod
    def from_pretrained(cls, path: str | Path, **limits: int) -> "Tokens":
        """The tokenizers of a model directory, without downloading or running code of it."""
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no model directory {path}; expected one with a tokenizer")
        qformer = path / "qformer_tokenizer"
        return cls(
            language=load_tokenizer(path),
            qformer=load_tokenizer(qformer) if qformer.is_dir() else None,
            decoder_only=_is_decoder_only(path / "config.json"),
            chat_template=read_chat_template(path),
            **limits,
        )

    def check_rows(self, language: int, qformer: int) -> None:
        """ValueError unless the model's word tables, of so many rows, have all ids of its texts."""
        tables = (self._language, language, "language"), (self._qformer, qformer, "Q-Former")
        for wrap, rows, what in tables:
            if wrap is None:
                continue
            tokenizer: Any = wrap.tokenizer
            # a text has no special token but those around it
            special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
            used = {*wrap.prefix, *wrap.suffix, tokenizer.eos_token_id or 0}
            used |= {*tokenizer.get_vocab().values()} - special
            if max(used) >= rows:
                raise ValueError(
                    f"the {what} tokenizer has the id {max(used)}, and its word table {rows} rows: "
                    "the tokenizer is another model's; download both again"
                )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the layout that ``from_pretrained`` and transformers' processor read."""
        self.language.save_pretrained(str(path))
        if self.qformer is not None:
            self.qformer.save_pretrained(str(Path(path) / "qformer_tokenizer"))

    def tokenize(self, rendered: Rendered, num_images: int = 0) -> TokenizedTexts:
        """The ids of the texts [I], [T], [R] of a sample with ``num_images`` images.

        ``qformer_ids`` is empty without a Q-Former tokenizer, ``response_ids`` without a response,
        and ``image_places`` where all images are in front. ValueError for more marks than images.
        """
        check_marks(rendered.prompt, num_images)
        if self._chat is not None:
            prompt_ids, places = self._chat.prompt(rendered.turns, num_images, self.max_prompt)
        else:
            prompt_ids, places = self._prompt(rendered.prompt)
            places = [0] * (num_images - len(places)) + places
        return TokenizedTexts(
            qformer_ids=self.instruction(rendered.instruction),
            prompt_ids=prompt_ids,
            response_ids=self.response(rendered.response) if rendered.response else [],
            image_places=tuple(places) if any(places) else (),
        )

    def instruction(self, text: str) -> list[int]:
        """[I] ids of the text without its image marks; none without a Q-Former tokenizer."""
        if self._qformer is None:
            return []
        if IMAGE_MARK in text:
            text = _MARK.sub("", text).strip()
        ids = _encode(self._qformer.tokenizer, text)
        return self._qformer.last(ids, self.max_instruction)

    def prompt(self, text: str) -> list[int]:
        """[T] ids with the tokenizer's special tokens, without an end token for a decoder."""
        if self._chat is not None:
            return self._chat.prompt(Dialogue(text), 0, self.max_prompt)[0]
        return self._prompt(text)[0]

    def _prompt(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and how many of them are in front of each image mark."""
        ids, places = self._between(text)
        suffix, start = not self.decoder_only, len(self._language.prefix)
        cut = max(0, len(ids) - self._language.room(self.max_prompt, suffix))
        # An image in front of all text is in front of the start token too.
        places = [start + place - cut if place > cut else 0 for place in places]
        return self._language.last(ids, self.max_prompt, suffix), places

    def _between(self, prompt: str) -> tuple[list[int], list[int]]:
        """The ids of the text between the image marks, and how many are in front of each mark."""
        text, *more = _MARK.split(prompt)
        ids, places = _encode(self.language, text), []
        for text in more:
            places.append(len(ids))
            ids += self._behind("", text) if ids else _encode(self.language, text.lstrip())
        return ids, places

    def response(self, text: str) -> list[int]:
        """[R] ids, the end token last and no special token first."""
        return [*self._response(text)[: self.max_response - 1], self.eos_id]

    def response_length(self, text: str) -> int:
        """Number of ids of an uncut response, the end token included."""
        return len(self._response(text)) + 1

    def prompt_length(self, prompt: str | Rendered) -> int:
        """Number of ids of an uncut prompt, special tokens included."""
        rendered = Rendered.of(prompt)
        if self._chat is not None:
            return self._chat.length(rendered.turns)
        suffix = () if self.decoder_only else self._language.suffix
        return len(self._language.prefix) + len(self._between(rendered.prompt)[0]) + len(suffix)

    def _response(self, text: str) -> list[int]:
        if self._chat is not None:
            return self._chat.response(text)
        return self._behind(" ", text) if self.decoder_only else _encode(self.language, text)

    def _behind(self, space: str, text: str) -> list[int]:
        """The ids that ``text`` has after the anchor and ``space``, where they can be separated."""
        if self._anchor is not None:
            head = _encode(self.language, self._anchor)
            whole = _encode(self.language, f"{self._anchor}{space}{text}")
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return _encode(self.language, text)

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids`` without special tokens and surrounding white space."""
        return str(self.language.decode(ids, skip_special_tokens=True)).strip()

    def layout(self) -> dict[str, Any]:
        """The ids around the text of a prompt and of an instruction, and how many there are at most
        in all: what a program in another language needs besides the tokenizers."""
        wraps = (
            ("prompt", self._language, self.max_prompt),
            ("instruction", self._qformer, self.max_instruction),
        )
        return {
            name: {
                "prefix": [*wrap.prefix],
                "suffix": [*wrap.suffix] if name == "instruction" or not self.decoder_only else [],
                "longest": longest,
            }
            for name, wrap, longest in wraps
            if wrap is not None
        }

    @property
    def around_instruction(self) -> tuple[str, str]:
        """The special tokens before and after an instruction, such as ("[CLS]", "[SEP]")."""
        if (wrap := self._qformer) is None:
            return "", ""
        names = wrap.tokenizer.convert_ids_to_tokens
        return "".join(names(list(wrap.prefix))), "".join(names(list(wrap.suffix)))

    @property
    def eos_id(self) -> int:
        """The token that ends a response."""
        if self._chat is not None:
            return self._chat.end_id
        assert isinstance(self.language.eos_token_id, int)
        return self.language.eos_token_id


def text_reader(path: Path, longest: int) -> Callable[[str], list[int]]:
    """What turns a text into at most ``longest`` ids for the Q-Former of a model directory."""
    tokenizer = qformer_tokenizer(path)
    wrap = _Wrap.of(tokenizer)
    return lambda text: wrap.last(_encode(tokenizer, text), longest)


def qformer_tokenizer(path: Path) -> Any:
    """The tokenizer of the Q-Former of a model directory. transformers' Blip2ForImageTextRetrieval
    has no other one than this, in the directory itself."""
    beside = path / "qformer_tokenizer"
    return load_tokenizer(beside if beside.is_dir() else path)


def check_marks(text: str, num_images: int) -> None:
    """Raise ValueError for a text with more image marks than there are images."""
    if (marks := text.count(IMAGE_MARK)) > num_images:
        raise ValueError(
            f"the text has {marks} {IMAGE_MARK} and there are {num_images} images; expected at "
            f"most one for each: take {marks - num_images} out, or give the images"
        )


def _encode(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(encoded["input_ids"])


ANCHORS = (":", ".", "a", "?", "the")


def _anchor(tokenizer: Any) -> str | None:
    """The first of ``ANCHORS`` whose ids stay the same when text follows it, or None."""
    for anchor in ANCHORS:
        head = _encode(tokenizer, anchor)
        if head and _encode(tokenizer, f"{anchor} a")[: len(head)] == head:
            return anchor
    return None


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or of its GGUF file, read from disk only. ValueError when there
    is none."""
    # For some model types transformers returns an empty tokenizer where there are no files.
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        if (file := find_gguf(path)) is not None:
            return gguf_tokenizer(file)
        raise ValueError(
            f"{path}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}, as "
            "`save_pretrained` of the model's tokenizer writes them"
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = path / "config.json"
    try:
        if config.is_file():
            kind = read_json(config).get("model_type")
            if kind is not None and kind not in CONFIG_MAPPING:
                options["config"] = PreTrainedConfig()  # it warns of a type that only we know
        tokenizer = AutoTokenizer.from_pretrained(str(path), **options)
        tokenizer("a")  # some settings are read only now
        return tokenizer
    except Exception as error:  # the library's errors on a damaged file are of any kind
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: the tokenizer cannot be read ({reason}); download "
            "tokenizer.json and tokenizer_config.json again"
        ) from error


def num_rows(tokenizer: Any) -> int:
    """Rows that a word table needs for the ids of ``tokenizer``, which may have gaps. A token that
    only pads, which transformers adds to some tokenizers, needs none."""
    pads = {tokenizer.pad_token_id} - {tokenizer.eos_token_id, *tokenizer("a")["input_ids"]}
    return max(id_ for id_ in tokenizer.get_vocab().values() if id_ not in pads) + 1


def _is_decoder_only(path: Path) -> bool:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; expected the config.json of a model directory")
    config = read_json(path)
    known = config.get("use_decoder_only_language_model")
    if isinstance(known, bool):
        return known
    text = config.get("text_config") or config.get("language") or config
    if not isinstance(text, dict):
        raise ValueError(f"{path}: text_config is {str(text)[:80]!r}; expected an object")
    return not text.get("is_encoder_decoder", text.get("model_type") in ENCODER_DECODER)
