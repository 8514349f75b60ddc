"""Several turns about the same pictures, and the questions in a terminal."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructblip.core.batch import Example
from instructblip.data.templates import render_prompt
from instructblip.inference.batch import open_pictures
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import Picture

HELP = """\
Type a question. Commands:
  /image PATH [PATH ...]   look at these from now on: pictures, read in order, or a video file
  /reset                   forget the turns so far
  /help                    this text
  /quit                    leave (so does the end of the input)"""


@dataclass
class Conversation:
    """Pictures and the turns about them.

    The model has no memory: each question is asked with the turns before it written out in front,
    in the form of the dialogue data that it was tuned on. Several pictures are read like the
    frames of a video, their queries one after the other.
    """

    pictures: Sequence[Picture] = ()
    turns: list[tuple[str, str]] = field(default_factory=list)

    def instruction(self, question: str) -> str:
        """The question with the history in front of it."""
        return instruction_of(question, self.turns)

    def ask(
        self, engine: Engine, question: str, show: Callable[[str], None], **decoding: Any
    ) -> str:
        """The answer, shown piece by piece and remembered. ValueError without a picture."""
        if not self.pictures:
            raise ValueError("no picture yet: give one with /image PATH")
        said = ""
        for piece in engine.stream(self.pictures, self.instruction(question), **decoding):
            show(piece)
            said += piece
        self.turns.append((question, said))
        return said


def instruction_of(question: str, turns: Sequence[tuple[str, str]]) -> str:
    """A question after earlier turns, as the templates of dialogue write it."""
    if not turns:
        return question
    example = Example(
        dataset="chat",
        split="",
        id="",
        images=(),
        task="dialogue",
        question=question,
        history=tuple(turns),
    )
    return render_prompt(example, "{question}").prompt


def run_chat(
    engine: Engine,
    conversation: Conversation,
    read: Callable[[], str],
    show: Callable[[str], None],
    **decoding: Any,
) -> None:
    """Question and answer until ``read`` raises EOFError or gives /quit. A mistake is told, and the
    conversation goes on."""
    show(HELP + "\n")
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/help":
                show(HELP)
            elif command == "/reset":
                conversation.turns.clear()
            elif command == "/image":
                paths = [Path(path) for path in shlex.split(rest)]
                if not paths:
                    raise ValueError("/image needs a path")
                conversation.pictures = open_pictures(paths)
            elif command.startswith("/"):
                raise ValueError(f"no command {command}; /help lists them")
            elif line:
                # what a terminal sends that is no UTF-8 comes as halves of characters
                question = line.encode(errors="replace").decode()
                conversation.ask(engine, question, show, **decoding)
        except (ValueError, FileNotFoundError) as error:
            show(str(error))
        show("\n")
