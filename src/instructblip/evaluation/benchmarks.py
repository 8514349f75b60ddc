"""The benchmarks: which examples, asked how, answered how, scored by what. Frozen by a test.

A score belongs to its prompt, decoding and metric, so all three are listed here and are written
beside every result. To add a benchmark, add a row to a table below.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

Mode = Literal["generate", "rank"]
Role = Literal["held_in", "held_out", "finetuned"]
Overrides = Mapping[str, int | float]
"""Settings of ``Decoding`` above ``GREEDY``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One evaluation set with everything its score depends on.

    ``source`` is a key of ``data.sources.SOURCES``, ``prompt`` a template, ``metric`` a key of
    ``scoring.SCORERS``. ``mode`` "rank" chooses the likeliest of ``candidates`` (None: the choices
    of the example, or with ``vocabulary`` the distinct answers of the training split).
    ``verbalizers`` are further wordings of a candidate, which scores as its likeliest wording
    (section 3.3 of the paper). ``unseen_type``: the instruction tuning has no set of this task.
    """

    name: str
    title: str
    source: str
    split: str
    prompt: str
    mode: Mode
    metric: str
    role: Role
    candidates: tuple[str, ...] | None = None
    verbalizers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    vocabulary: bool = False
    decoding: Overrides = field(default_factory=dict)
    unseen_type: bool = False

    def settings(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return asdict(self)


# Prompts of appendix E of the paper.
DESCRIBE = "A short image description."
ASK = "Question: {question} Short answer:"
READ = "OCR tokens: {ocr_tokens}. Question: {question} Short answer:"
CHOOSE = "Question: {question} Options: {options}. Short answer:"
CHOOSE_IN_CONTEXT = "Context: {context} Question: {question} Options: {options}. Answer:"
JUDGE = 'Based on the image, is this statement true or false? "{question}" Answer:'
CONVERSE = "Dialog history: {context} {history}\n Question: {question} Short answer:"
HATEFUL = 'This is an image with: "{question}" written on it. Is it hateful? Answer:'

SCENES_CONVERSE = "Dialog history: {history} Question: {question} Short answer:"
SCENES_CORRECT = 'This is an image with: "{question}" written on it. Is it correct? Answer:'

TRUE_FALSE = ("true", "false")
YES_NO = ("yes", "no")

# Section 2.6 and appendix E of the paper: 5 beams, except NoCaps (3) and OCR-VQA (1). Lengths and
# length penalty are those of the released LAVIS configurations.
CAPTION: Overrides = {
    "num_beams": 5,
    "max_new_tokens": 80,
    "min_new_tokens": 10,
    "length_penalty": 1.0,
    "repetition_penalty": 1.15,
}
NOCAPS: Overrides = {**CAPTION, "num_beams": 3}
ANSWER: Overrides = {
    "num_beams": 5,
    "max_new_tokens": 10,
    "min_new_tokens": 1,
    "length_penalty": -1.0,
}
GREEDY_ANSWER: Overrides = {**ANSWER, "num_beams": 1}
SCENES_CAPTION: Overrides = {"num_beams": 1, "max_new_tokens": 40}
SCENES_ANSWER: Overrides = {"num_beams": 1, "max_new_tokens": 10}


def _row(
    name: str,
    title: str,
    split: str,
    prompt: str,
    metric: str,
    role: Role,
    decoding: Overrides | None = None,
    new: bool = False,
    **other: Any,
) -> Benchmark:
    """A row of the tables. Without ``decoding`` it ranks candidates; ``new``: an unseen type."""
    return Benchmark(
        name=name,
        title=title,
        source=name.removeprefix("scenes_"),
        split=split,
        prompt=prompt,
        mode="rank" if decoding is None else "generate",
        metric=metric,
        role=role,
        decoding=decoding or {},
        unseen_type=new,
        **other,
    )


VQA = "vqa_accuracy official_2021"
OKVQA = "okvqa_accuracy official_2021"
IN: Role = "held_in"
OUT: Role = "held_out"

# name, title, split, prompt, metric, role, decoding
PAPER = [
    # Held-in: the instruction tuning mixture contains the training splits.
    _row("coco_caption", "COCO Caption", "test", DESCRIBE, "cider", IN, CAPTION),
    _row("textcaps", "TextCaps", "val", DESCRIBE, "cider", IN, CAPTION),
    _row("vqav2", "VQAv2", "val", ASK, VQA, IN, ANSWER),
    _row("okvqa", "OK-VQA", "val", ASK, OKVQA, IN, ANSWER),
    _row("aokvqa", "A-OKVQA choices", "val", CHOOSE, "exact_match", IN),
    _row("aokvqa_direct", "A-OKVQA direct", "val", ASK, "aokvqa_accuracy", IN, ANSWER),
    _row("ocrvqa", "OCR-VQA", "test", ASK, "exact_match", IN, GREEDY_ANSWER),
    # Held-out: the 13 columns of table 1, in its order. "We widen the label space" (section 3.3):
    # verbalizers are the other words for a label.
    _row("nocaps", "NoCaps", "val", DESCRIBE, "cider", OUT, NOCAPS),
    _row("flickr30k", "Flickr30K", "test", DESCRIBE, "cider", OUT, CAPTION),
    _row("gqa", "GQA", "test", ASK, "gqa_accuracy lavis", OUT, ANSWER, new=True),
    _row(
        "vsr",
        "VSR",
        "test",
        JUDGE,
        "exact_match",
        OUT,
        candidates=TRUE_FALSE,
        verbalizers={"true": ("yes",), "false": ("no",)},
        new=True,
    ),
    _row("iconqa", "IconQA", "test", CHOOSE, "exact_match", OUT, new=True),
    _row("textvqa", "TextVQA", "val", READ, "textvqa_accuracy", OUT, ANSWER),
    _row("visual_dialog", "Visual Dialog", "val", CONVERSE, "mrr", OUT, new=True),
    _row(
        "hatefulmemes",
        "HatefulMemes",
        "val",
        HATEFUL,
        "auroc",
        OUT,
        candidates=YES_NO,
        verbalizers={"yes": ("true",), "no": ("false",)},
        new=True,
    ),
    _row("vizwiz", "VizWiz", "val", ASK, VQA, OUT, ANSWER),
    _row("scienceqa", "ScienceQA image", "test", CHOOSE_IN_CONTEXT, "exact_match", OUT),
    _row("msvdqa", "MSVD-QA", "test", ASK, "exact_match", OUT, vocabulary=True, new=True),
    _row("msrvttqa", "MSRVTT-QA", "test", ASK, "exact_match", OUT, vocabulary=True, new=True),
    _row("ivqa", "iVQA", "test", ASK, "ivqa_accuracy", OUT, ANSWER, new=True),
]

# The rows of table 3: a model tuned on this one set, asked and scored as above.
FINETUNED = [
    replace(row, name=f"finetuned_{name}", role="finetuned")
    for name in ("scienceqa", "ocrvqa", "okvqa", "aokvqa_direct", "aokvqa")
    for row in PAPER
    if row.name == name
]

# The sets of the embedded world, with plain prompts and greedy decoding.
SCENES = [
    _row("scenes_coco_caption", "captions", "val", DESCRIBE, "rouge_l", IN, SCENES_CAPTION),
    _row("scenes_vqav2", "questions", "val", ASK, VQA, IN, SCENES_ANSWER),
    _row("scenes_okvqa", "knowledge", "val", ASK, OKVQA, IN, SCENES_ANSWER),
    _row("scenes_aokvqa", "choices", "val", CHOOSE, "exact_match", IN),
    _row("scenes_ocrvqa", "reading", "val", ASK, "exact_match", IN, SCENES_ANSWER),
    _row("scenes_textcaps", "captions with words", "val", DESCRIBE, "rouge_l", IN, SCENES_CAPTION),
    _row("scenes_nocaps", "captions of new pairs", "val", DESCRIBE, "rouge_l", OUT, SCENES_CAPTION),
    _row("scenes_gqa", "relations", "test", ASK, "gqa_accuracy official_exact", OUT, SCENES_ANSWER),
    _row(
        "scenes_vsr",
        "true or false",
        "test",
        JUDGE,
        "exact_match",
        OUT,
        candidates=TRUE_FALSE,
        new=True,
    ),
    _row("scenes_iconqa", "picture puzzles", "test", CHOOSE, "exact_match", OUT, new=True),
    _row("scenes_scienceqa", "context and options", "test", CHOOSE_IN_CONTEXT, "exact_match", OUT),
    _row("scenes_textvqa", "words in scenes", "val", READ, "textvqa_accuracy", OUT, SCENES_ANSWER),
    _row("scenes_visual_dialog", "dialogue", "val", SCENES_CONVERSE, "mrr", OUT, new=True),
    _row(
        "scenes_hatefulmemes",
        "label against picture",
        "val",
        SCENES_CORRECT,
        "auroc",
        OUT,
        candidates=YES_NO,
        new=True,
    ),
    _row("scenes_vizwiz", "blurred and unanswerable", "val", ASK, VQA, OUT, SCENES_ANSWER),
    _row("scenes_msvdqa", "motion", "test", ASK, "exact_match", OUT, vocabulary=True, new=True),
]

BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in [*PAPER, *FINETUNED, *SCENES]}

OWNERS: dict[str, str] = {
    "coco_caption": "https://cocodataset.org/#download",
    "textcaps": "https://textvqa.org/textcaps/dataset/",
    "vqav2": "https://visualqa.org/download.html",
    "okvqa": "https://okvqa.allenai.org/download.html",
    "aokvqa": "https://github.com/allenai/aokvqa",
    "aokvqa_direct": "https://github.com/allenai/aokvqa",
    "ocrvqa": "https://ocr-vqa.github.io",
    "nocaps": "https://nocaps.org/download",
    "flickr30k": "https://shannon.cs.illinois.edu/DenotationGraph/",
    "gqa": "https://cs.stanford.edu/people/dorarad/gqa/download.html",
    "vsr": "https://github.com/cambridgeltl/visual-spatial-reasoning",
    "iconqa": "https://iconqa.github.io",
    "textvqa": "https://textvqa.org/dataset/",
    "visual_dialog": "https://visualdialog.org/data",
    "hatefulmemes": "https://hatefulmemeschallenge.com",
    "vizwiz": "https://vizwiz.org/tasks-and-datasets/vqa/",
    "scienceqa": "https://scienceqa.github.io",
    "msvdqa": "https://github.com/xudejing/video-question-answering",
    "msrvttqa": "https://github.com/xudejing/video-question-answering",
    "ivqa": "https://antoyang.github.io/just-ask.html",
}
"""Source of a benchmark -> the page where its owner offers the data. Nothing is downloaded."""

GROUPS = ("held_in", "held_out", "finetuned", "scenes", "scenes_held_in", "scenes_held_out")


def select_benchmarks(names: Iterable[str]) -> list[Benchmark]:
    """Return the benchmarks called ``names``, each once; the name of a group means its members.

    Groups: "held_in", "held_out" and "finetuned" (the paper's), "scenes", "scenes_held_in",
    "scenes_held_out". Raises ValueError with the nearest names for an unknown one.
    """
    chosen: dict[str, Benchmark] = {}
    for name in names:
        members = [b for b in BENCHMARKS.values() if name in (b.name, *groups_of(b.name, b.role))]
        if not members:
            near = get_close_matches(name, [*BENCHMARKS, *GROUPS], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no benchmark or group '{name}'{hint} Groups: {', '.join(GROUPS)}")
        chosen |= {b.name: b for b in members}
    return list(chosen.values())


def groups_of(name: str, role: str) -> tuple[str, ...]:
    """Return the groups that the benchmark ``name`` belongs to."""
    return ("scenes", f"scenes_{role}") if name.startswith("scenes_") else (role,)
