"""Several turns about the same images, and the questions in a terminal."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructblip.core.example import Example
from instructblip.data.templates import Dialogue, Rendered, render_prompt
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import ImageInput, open_images

HELP = """\
Type a question. Commands:
  /image PATH [PATH ...]   ask about these: images, read in order, or a video file
  /reset                   forget the turns so far
  /help                    this text
  /quit                    leave (as does the end of the input)"""


@dataclass
class Conversation:
    """Images and the turns about them.

    The model has no memory: each question is preceded by the turns before it, written as in the
    dialogue data that it was tuned on. Several images are read like the frames of a video, their
    queries one after the other.
    """

    images: Sequence[ImageInput] = ()
    turns: list[tuple[str, str]] = field(default_factory=list)

    def ask(
        self, engine: Engine, question: str, show: Callable[[str], None], **decoding: Any
    ) -> str:
        """The answer, shown piece by piece and remembered. Raises ValueError without an image."""
        if not self.images:
            raise ValueError("no image yet: give one with /image PATH")
        pieces = []
        instruction = instruction_of(question, self.turns)
        for piece in engine.stream(self.images, instruction, **decoding):
            show(piece)
            pieces.append(piece)
        self.turns.append((question, "".join(pieces)))
        return self.turns[-1][1]


def instruction_of(question: str, turns: Sequence[tuple[str, str]], system: str = "") -> Rendered:
    """A question after a system text and earlier turns, as the dialogue templates write it."""
    text = question
    if turns:
        example = Example(
            dataset="chat",
            split="",
            id="",
            images=(),
            task="dialogue",
            question=question,
            history=tuple(turns),
        )
        text = render_prompt(example, "{question}").prompt
    text = f"{system} {text}" if system else text
    return Rendered(text, text, dialogue=Dialogue(question, tuple(turns), system))


def run_chat(
    engine: Engine,
    conversation: Conversation,
    read: Callable[[], str],
    show: Callable[[str], None],
    **decoding: Any,
) -> None:
    """Question and answer until ``read`` raises EOFError or returns /quit. The user's mistakes are
    shown and do not end the conversation."""
    show(HELP + "\n")
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line.partition(" ")[0] == "/quit":
            return
        try:
            _run_line(line, engine, conversation, show, decoding)
        except (ValueError, FileNotFoundError) as error:
            show(str(error))
        show("\n")


def _run_line(
    line: str,
    engine: Engine,
    conversation: Conversation,
    show: Callable[[str], None],
    decoding: dict[str, Any],
) -> None:
    command, _, rest = line.partition(" ")
    if command == "/help":
        show(HELP)
    elif command == "/reset":
        conversation.turns.clear()
    elif command == "/image":
        if not (paths := [Path(path) for path in shlex.split(rest)]):
            raise ValueError("/image needs a path")
        conversation.images = open_images(paths)
    elif command.startswith("/"):
        raise ValueError(f"no command {command}; /help lists them")
    elif line:
        # a terminal that is not UTF-8 gives halves of characters
        question = line.encode(errors="replace").decode()
        conversation.ask(engine, question, show, **decoding)
