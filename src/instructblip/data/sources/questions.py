"""Question generation: question-answering sets turned round.

The instruction holds an answer (``Example.question``: what the instruction is about) and the
response is the question. Of several answers the most frequent is taken, so that the instruction
is the same each time and the pair is one that people agree on.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.sources.aokvqa import aokvqa
from instructblip.data.sources.vqa import okvqa, vqav2


def vqav2_question(root: Path, split: str) -> Iterator[Example]:
    """The files of ``vqav2``."""
    yield from _turned_round(vqav2, "vqav2_question", root, split)


def okvqa_question(root: Path, split: str) -> Iterator[Example]:
    """The files of ``okvqa``."""
    yield from _turned_round(okvqa, "okvqa_question", root, split)


def aokvqa_question(root: Path, split: str) -> Iterator[Example]:
    """The files of ``aokvqa``; the answer is the right choice."""
    yield from _turned_round(aokvqa, "aokvqa_question", root, split)


def _turned_round(
    read: Callable[[Path, str], Iterator[Example]], dataset: str, root: Path, split: str
) -> Iterator[Example]:
    for example in read(root, split):
        counted = Counter(example.answers).most_common(1)
        yield replace(
            example,
            dataset=dataset,
            task="ask",
            question=counted[0][0] if counted else "",
            # Without an answer there is nothing to ask for: left empty, it is reported as bad.
            answers=(example.question,) if counted else (),
            choices=(),
        )
