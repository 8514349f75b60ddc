"""Prompts in the format that a chat model was trained on, rendered by its tokenizer's template.

A template puts control tokens around the turns. That of SmolLM2 and Qwen::

    <|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nWhat colour?<|im_end|>\\n
    <|im_start|>assistant\\n                         the prompt, whose answer is to come
    Red.<|im_end|>                                  the response and its end token

The ids are those of ``tokenizer.apply_chat_template``, except that a control token written in a
text stays text, and that ``<image>`` in a text is the place of an image. Images without a mark are
at the beginning of the first question, where LLaVA's data has them. A prompt that is too long loses
its earliest turns, then the beginning of the system text and of the question: no control token, and
no image.
"""

import functools
import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from instructblip.core.example import IMAGE_MARK
from instructblip.core.files import read_json
from instructblip.data.templates import Dialogue

CHAT_FILE = "chat_format.json"
"""The file beside the weights that records the chat template a model was tuned with, or none."""

DATE = "26 Jul 2024"
"""For a template that states the date (Llama 3), since a prompt must not change from day to day.
It is the default of Llama 3.1's template."""

REMEDY = "repair the template, or set model.chat_template=off"

_IMAGE, _QUOTE = "\ufdd0", "\ufdd1"
"""Characters that Unicode keeps for use inside programs: the place of an image, and what is around
a control token that is text."""
_PIECES = re.compile(f"({_IMAGE}|{_QUOTE}.*?{_QUOTE})", re.DOTALL)


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with a chat template.

    ``end_id`` is the token that the template puts behind a response, and ``before`` what it puts
    between the last control token of a prompt and the response. Where ``takes_system`` is false
    (Gemma), a system text is the beginning of the first question.
    """

    tokenizer: Any
    template: str
    end_id: int = -1
    before: str = ""
    takes_system: bool = True

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> "ChatFormat":
        """Raises ValueError for a template that fails, that drops the question or the response, or
        that ends a response without a control token."""
        chat = cls(tokenizer, template)
        dialogue, answer = Dialogue("any question"), "any answer"
        prompt = chat._render(dialogue)
        whole = chat._render(dialogue, answer)
        for text, name in ((dialogue.question, "question"), (answer, "response")):
            if text not in whole:
                raise ValueError(f"the chat template drops the {name}; {REMEDY}")
        head, _, tail = whole.rpartition(answer)
        ends = [i for i in chat._encode(tail) if i in chat._control_ids]
        if not ends:
            raise ValueError(f"the chat template ends a response without a token; {REMEDY}")
        lead = head[len(prompt) :] if head.startswith(prompt) else ""
        before = chat._controls.split(prompt)[-1] + lead
        try:
            takes_system = "any system" in chat._render(replace(dialogue, system="any system"))
        except ValueError:  # Gemma's template refuses it
            takes_system = False
        return replace(chat, end_id=ends[0], before=before, takes_system=takes_system)

    def prompt(
        self, dialogue: Dialogue, num_images: int, limit: int
    ) -> tuple[list[int], list[int]]:
        """The ids of a prompt, cut to ``limit`` where the template itself is not longer, and how
        many of them are in front of each image."""
        dialogue = dialogue.with_beginning(IMAGE_MARK * (num_images - dialogue.num_marks))
        ids, places = self._ids(dialogue)
        return (ids, places) if len(ids) <= limit else self._ids(self._cut(dialogue, limit))

    def length(self, dialogue: Dialogue) -> int:
        """Number of ids of an uncut prompt."""
        return len(self._ids(dialogue)[0])

    def response(self, text: str) -> list[int]:
        """The ids of a response as they are behind the prompt, without the end token."""
        head = self._encode(self.before, plain=True)
        whole = self._encode(self.before + text, plain=True)
        return whole[len(head) :] if whole[: len(head)] == head else self._encode(text, plain=True)

    def example(self) -> str:
        """A prompt about an image and its response, as text."""
        text = self._render(Dialogue(f"{IMAGE_MARK}What is it?"), "A red cat.")
        return text.replace(_IMAGE, IMAGE_MARK)

    def _cut(self, dialogue: Dialogue, limit: int) -> Dialogue:
        """The longest end of a dialogue whose prompt has at most ``limit`` ids."""

        def fits(shorter: Dialogue) -> bool:
            return len(self._ids(shorter)[0]) <= limit

        while dialogue.history and not fits(dialogue):
            dialogue = dialogue.without_first_turn()
        for name in ("system", "question"):
            cuts = _Cuts(dialogue, name)
            dialogue = cuts[bisect_left(cuts, True, hi=len(cuts) - 1, key=fits)]
        return dialogue

    def _render(self, dialogue: Dialogue, answer: str | None = None) -> str:
        """The text of a prompt, or of a conversation that ends with ``answer``, its texts quoted.
        ValueError where the template fails."""
        messages = []
        if dialogue.system and self.takes_system:
            messages.append({"role": "system", "content": self._quote(dialogue.system)})
        elif dialogue.system:
            dialogue = dialogue.with_beginning(f"{dialogue.system}\n\n")
        texts = [text for turn in dialogue.history for text in turn]
        texts += [dialogue.question, *([] if answer is None else [answer])]
        for i, text in enumerate(texts):
            messages.append({"role": ("user", "assistant")[i % 2], "content": self._quote(text)})
        settings: dict[str, Any] = {"enable_thinking": False, "date_string": DATE}
        settings = {name: value for name, value in settings.items() if name in self.template}
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answer is None,
                **settings,
            )
        except Exception as error:  # of jinja, or whatever the template does with a text
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"the chat template fails: {reason}; {REMEDY}") from error

    def _ids(self, dialogue: Dialogue) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and how many of them are in front of each image."""
        ids: list[int] = []
        places: list[int] = []
        for piece in _PIECES.split(self._render(dialogue)):
            if piece == _IMAGE:
                places.append(len(ids))
            else:
                ids += self._encode(piece.strip(_QUOTE), plain=piece.startswith(_QUOTE))
        return ids, places

    def _quote(self, text: str) -> str:
        """A text whose marks and control tokens the template and the tokenizer do not see."""
        text = text.replace(_IMAGE, "").replace(_QUOTE, "").replace(IMAGE_MARK, _IMAGE)
        return self._controls.sub(lambda token: f"{_QUOTE}{token[0]}{_QUOTE}", text)

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        """The ids of ``text``; where it is ``plain``, control tokens in it are text."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=plain, verbose=False
        )
        return list(encoded["input_ids"])

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(id_ for id_, token in added if token.special)

    @functools.cached_property
    def _controls(self) -> re.Pattern[str]:
        """Any control token in a text, the longest where several begin."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


class _Cuts(Sequence[Dialogue]):
    """A dialogue with the beginning of one of its texts removed: by 0, 1, ... characters."""

    def __init__(self, dialogue: Dialogue, name: str) -> None:
        self.dialogue, self.name = dialogue, name
        self.text: str = getattr(dialogue, name)

    def __len__(self) -> int:
        return len(self.text) + 1

    def __getitem__(self, count: Any) -> Dialogue:
        rest = self.text[count:]
        marks = self.text.count(IMAGE_MARK) - rest.count(IMAGE_MARK)
        return replace(self.dialogue, **{self.name: IMAGE_MARK * marks + rest})


def chat_note(template: str | None) -> str:
    """The content of ``CHAT_FILE``; None records that prompts have no chat format."""
    return json.dumps({"chat_template": template}, ensure_ascii=False, indent=2) + "\n"


def read_chat_template(directory: Path) -> str | None:
    """The template that a directory records; None where it records none, or nothing."""
    path = directory / CHAT_FILE
    if not path.is_file():
        return None
    template = read_json(path).get("chat_template")
    if not isinstance(template, str | None):
        raise ValueError(
            f"{path}: chat_template is {str(template)[:80]!r}; expected a text or null"
        )
    return template
