"""The benchmarks: which examples, asked how, answered how, scored by what. Frozen by a test.

A figure belongs to its prompt, decoding and scorer, so that all three stand here and are written
beside every result. Three groups: the sets of the InstructBLIP paper with its prompts (appendix
E); ``finetuned_...``, the rows of its table 3, for a model tuned on that one set; ``scenes_...``,
the sets of the embedded world, with plain prompts and greedy decoding.
Adding a benchmark is one entry at the foot of this file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Mode = Literal["generate", "rank"]
Role = Literal["held_in", "held_out", "finetuned"]
Decoding = Mapping[str, int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One evaluation set with everything its figure depends on.

    ``source`` is a key of ``data.sources.SOURCES``; ``prompt`` a template with its places.
    ``mode`` "rank" chooses among ``candidates`` by log-likelihood (None: the example's choices,
    or with ``vocabulary`` the distinct answers of the training split). ``verbalizers`` are further
    wordings of a candidate: it is worth as much as its best wording (section 3.3).
    ``unseen_type``: no data set of this task was in the instruction tuning.
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
    decoding: Decoding = field(default_factory=dict)
    unseen_type: bool = False

    def settings(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def select_benchmarks(
    names: Iterable[str], known: Mapping[str, Benchmark] | None = None
) -> list[Benchmark]:
    """The benchmarks called ``names``, each once; a group's name stands for its members.

    Groups: "held_in", "held_out" and "finetuned" (the paper's), "scenes", "scenes_held_in",
    "scenes_held_out". ValueError names the nearest names for one that does not exist.
    """
    known = BENCHMARKS if known is None else known
    chosen: dict[str, Benchmark] = {}
    for name in names:
        members = [b for b in known.values() if name in (b.name, *groups_of(b))]
        if not members:
            from difflib import get_close_matches

            near = get_close_matches(name, [*known, *GROUPS], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no benchmark or group '{name}'{hint} Groups: {', '.join(GROUPS)}")
        chosen |= {b.name: b for b in members}
    return list(chosen.values())


def groups_of(benchmark: Benchmark) -> tuple[str, ...]:
    """The groups that a benchmark belongs to."""
    if benchmark.name.startswith("scenes_"):
        return ("scenes", f"scenes_{benchmark.role}")
    return (benchmark.role,)


GROUPS = ("held_in", "held_out", "finetuned", "scenes", "scenes_held_in", "scenes_held_out")

# Section 2.6 and appendix E of the paper: beams of 3 for NoCaps, 5 elsewhere, 1 for OCR-VQA; the
# lengths and the length penalty are those of the released LAVIS configurations.
_CAPTION: Decoding = {
    "num_beams": 5,
    "max_new_tokens": 80,
    "min_new_tokens": 10,
    "length_penalty": 1.0,
    "repetition_penalty": 1.15,
}
_NOCAPS: Decoding = {**_CAPTION, "num_beams": 3}
_ANSWER: Decoding = {
    "num_beams": 5,
    "max_new_tokens": 10,
    "min_new_tokens": 1,
    "length_penalty": -1.0,
}
_GREEDY_ANSWER: Decoding = {**_ANSWER, "num_beams": 1}
_SCENES_CAPTION: Decoding = {"num_beams": 1, "max_new_tokens": 40}
_SCENES_ANSWER: Decoding = {"num_beams": 1, "max_new_tokens": 10}

_DESCRIBE = "A short image description."
_ASK = "Question: {question} Short answer:"
_READ = "OCR tokens: {ocr_tokens}. Question: {question} Short answer:"
_CHOOSE = "Question: {question} Options: {options}. Short answer:"
_CHOOSE_IN_CONTEXT = "Context: {context} Question: {question} Options: {options}. Answer:"
_JUDGE = 'Based on the image, is this statement true or false? "{question}" Answer:'
_CONVERSE = "Dialog history: {context} {history}\n Question: {question} Short answer:"
_CONVERSE_PLAIN = "Dialog history: {history} Question: {question} Short answer:"
_HATEFUL = 'This is an image with: "{question}" written on it. Is it hateful? Answer:'
_CORRECT = 'This is an image with: "{question}" written on it. Is it correct? Answer:'

_TRUE_FALSE = ("true", "false")
_YES_NO = ("yes", "no")
# "We widen the label space" (section 3.3): each label also in the other words for it.
_OTHER_TRUE_FALSE = {"true": ("yes",), "false": ("no",)}
_OTHER_YES_NO = {"yes": ("true",), "no": ("false",)}

_VQA = "vqa_accuracy official_2021"


BENCHMARKS: dict[str, Benchmark] = {
    # The paper, held-in: in the instruction tuning mixture.
    "coco_caption": Benchmark(
        name="coco_caption",
        title="COCO Caption",
        source="coco_caption",
        split="test",
        prompt=_DESCRIBE,
        mode="generate",
        metric="cider",
        role="held_in",
        decoding=_CAPTION,
    ),
    "textcaps": Benchmark(
        name="textcaps",
        title="TextCaps",
        source="textcaps",
        split="val",
        prompt=_DESCRIBE,
        mode="generate",
        metric="cider",
        role="held_in",
        decoding=_CAPTION,
    ),
    "vqav2": Benchmark(
        name="vqav2",
        title="VQAv2",
        source="vqav2",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric=_VQA,
        role="held_in",
        decoding=_ANSWER,
    ),
    "okvqa": Benchmark(
        name="okvqa",
        title="OK-VQA",
        source="okvqa",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric="okvqa_accuracy official_2021",
        role="held_in",
        decoding=_ANSWER,
    ),
    "aokvqa": Benchmark(
        name="aokvqa",
        title="A-OKVQA choices",
        source="aokvqa",
        split="val",
        prompt=_CHOOSE,
        mode="rank",
        metric="exact_match",
        role="held_in",
    ),
    "aokvqa_direct": Benchmark(
        name="aokvqa_direct",
        title="A-OKVQA direct",
        source="aokvqa_direct",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric="aokvqa_accuracy",
        role="held_in",
        decoding=_ANSWER,
    ),
    "ocrvqa": Benchmark(
        name="ocrvqa",
        title="OCR-VQA",
        source="ocrvqa",
        split="test",
        prompt=_ASK,
        mode="generate",
        metric="exact_match",
        role="held_in",
        decoding=_GREEDY_ANSWER,
    ),
    # The paper, held-out: the 13 columns of table 1, in its order.
    "nocaps": Benchmark(
        name="nocaps",
        title="NoCaps",
        source="nocaps",
        split="val",
        prompt=_DESCRIBE,
        mode="generate",
        metric="cider",
        role="held_out",
        decoding=_NOCAPS,
    ),
    "flickr30k": Benchmark(
        name="flickr30k",
        title="Flickr30K",
        source="flickr30k",
        split="test",
        prompt=_DESCRIBE,
        mode="generate",
        metric="cider",
        role="held_out",
        decoding=_CAPTION,
    ),
    "gqa": Benchmark(
        name="gqa",
        title="GQA",
        source="gqa",
        split="test",
        prompt=_ASK,
        mode="generate",
        metric="gqa_accuracy lavis",
        role="held_out",
        decoding=_ANSWER,
        unseen_type=True,
    ),
    "vsr": Benchmark(
        name="vsr",
        title="VSR",
        source="vsr",
        split="test",
        prompt=_JUDGE,
        mode="rank",
        metric="exact_match",
        role="held_out",
        candidates=_TRUE_FALSE,
        verbalizers=_OTHER_TRUE_FALSE,
        unseen_type=True,
    ),
    "iconqa": Benchmark(
        name="iconqa",
        title="IconQA",
        source="iconqa",
        split="test",
        prompt=_CHOOSE,
        mode="rank",
        metric="exact_match",
        role="held_out",
        unseen_type=True,
    ),
    "textvqa": Benchmark(
        name="textvqa",
        title="TextVQA",
        source="textvqa",
        split="val",
        prompt=_READ,
        mode="generate",
        metric="textvqa_accuracy",
        role="held_out",
        decoding=_ANSWER,
    ),
    "visual_dialog": Benchmark(
        name="visual_dialog",
        title="Visual Dialog",
        source="visual_dialog",
        split="val",
        prompt=_CONVERSE,
        mode="rank",
        metric="mrr",
        role="held_out",
        unseen_type=True,
    ),
    "hatefulmemes": Benchmark(
        name="hatefulmemes",
        title="HatefulMemes",
        source="hatefulmemes",
        split="val",
        prompt=_HATEFUL,
        mode="rank",
        metric="auroc",
        role="held_out",
        candidates=_YES_NO,
        verbalizers=_OTHER_YES_NO,
        unseen_type=True,
    ),
    "vizwiz": Benchmark(
        name="vizwiz",
        title="VizWiz",
        source="vizwiz",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric=_VQA,
        role="held_out",
        decoding=_ANSWER,
    ),
    "scienceqa": Benchmark(
        name="scienceqa",
        title="ScienceQA image",
        source="scienceqa",
        split="test",
        prompt=_CHOOSE_IN_CONTEXT,
        mode="rank",
        metric="exact_match",
        role="held_out",
    ),
    "msvdqa": Benchmark(
        name="msvdqa",
        title="MSVD-QA",
        source="msvdqa",
        split="test",
        prompt=_ASK,
        mode="rank",
        metric="exact_match",
        role="held_out",
        vocabulary=True,
        unseen_type=True,
    ),
    "msrvttqa": Benchmark(
        name="msrvttqa",
        title="MSRVTT-QA",
        source="msrvttqa",
        split="test",
        prompt=_ASK,
        mode="rank",
        metric="exact_match",
        role="held_out",
        vocabulary=True,
        unseen_type=True,
    ),
    "ivqa": Benchmark(
        name="ivqa",
        title="iVQA",
        source="ivqa",
        split="test",
        prompt=_ASK,
        mode="generate",
        metric="ivqa_accuracy",
        role="held_out",
        decoding=_ANSWER,
        unseen_type=True,
    ),
    # The paper, fine-tuning on one set: the rows of table 3.
    "finetuned_scienceqa": Benchmark(
        name="finetuned_scienceqa",
        title="ScienceQA image",
        source="scienceqa",
        split="test",
        prompt=_CHOOSE_IN_CONTEXT,
        mode="rank",
        metric="exact_match",
        role="finetuned",
    ),
    "finetuned_ocrvqa": Benchmark(
        name="finetuned_ocrvqa",
        title="OCR-VQA",
        source="ocrvqa",
        split="test",
        prompt=_ASK,
        mode="generate",
        metric="exact_match",
        role="finetuned",
        decoding=_GREEDY_ANSWER,
    ),
    "finetuned_okvqa": Benchmark(
        name="finetuned_okvqa",
        title="OK-VQA",
        source="okvqa",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric="okvqa_accuracy official_2021",
        role="finetuned",
        decoding=_ANSWER,
    ),
    "finetuned_aokvqa_direct": Benchmark(
        name="finetuned_aokvqa_direct",
        title="A-OKVQA direct",
        source="aokvqa_direct",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric="aokvqa_accuracy",
        role="finetuned",
        decoding=_ANSWER,
    ),
    "finetuned_aokvqa": Benchmark(
        name="finetuned_aokvqa",
        title="A-OKVQA choices",
        source="aokvqa",
        split="val",
        prompt=_CHOOSE,
        mode="rank",
        metric="exact_match",
        role="finetuned",
    ),
    # Scenes, held-in.
    "scenes_coco_caption": Benchmark(
        name="scenes_coco_caption",
        title="captions",
        source="coco_caption",
        split="val",
        prompt=_DESCRIBE,
        mode="generate",
        metric="rouge_l",
        role="held_in",
        decoding=_SCENES_CAPTION,
    ),
    "scenes_vqav2": Benchmark(
        name="scenes_vqav2",
        title="questions",
        source="vqav2",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric=_VQA,
        role="held_in",
        decoding=_SCENES_ANSWER,
    ),
    "scenes_okvqa": Benchmark(
        name="scenes_okvqa",
        title="knowledge",
        source="okvqa",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric="okvqa_accuracy official_2021",
        role="held_in",
        decoding=_SCENES_ANSWER,
    ),
    "scenes_aokvqa": Benchmark(
        name="scenes_aokvqa",
        title="choices",
        source="aokvqa",
        split="val",
        prompt=_CHOOSE,
        mode="rank",
        metric="exact_match",
        role="held_in",
    ),
    "scenes_ocrvqa": Benchmark(
        name="scenes_ocrvqa",
        title="reading",
        source="ocrvqa",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric="exact_match",
        role="held_in",
        decoding=_SCENES_ANSWER,
    ),
    "scenes_textcaps": Benchmark(
        name="scenes_textcaps",
        title="captions with words",
        source="textcaps",
        split="val",
        prompt=_DESCRIBE,
        mode="generate",
        metric="rouge_l",
        role="held_in",
        decoding=_SCENES_CAPTION,
    ),
    # Scenes, held-out.
    "scenes_nocaps": Benchmark(
        name="scenes_nocaps",
        title="captions of new pairs",
        source="nocaps",
        split="val",
        prompt=_DESCRIBE,
        mode="generate",
        metric="rouge_l",
        role="held_out",
        decoding=_SCENES_CAPTION,
    ),
    "scenes_gqa": Benchmark(
        name="scenes_gqa",
        title="relations",
        source="gqa",
        split="test",
        prompt=_ASK,
        mode="generate",
        metric="gqa_accuracy official_exact",
        role="held_out",
        decoding=_SCENES_ANSWER,
    ),
    "scenes_vsr": Benchmark(
        name="scenes_vsr",
        title="true or false",
        source="vsr",
        split="test",
        prompt=_JUDGE,
        mode="rank",
        metric="exact_match",
        role="held_out",
        candidates=_TRUE_FALSE,
        unseen_type=True,
    ),
    "scenes_iconqa": Benchmark(
        name="scenes_iconqa",
        title="picture puzzles",
        source="iconqa",
        split="test",
        prompt=_CHOOSE,
        mode="rank",
        metric="exact_match",
        role="held_out",
        unseen_type=True,
    ),
    "scenes_scienceqa": Benchmark(
        name="scenes_scienceqa",
        title="context and options",
        source="scienceqa",
        split="test",
        prompt=_CHOOSE_IN_CONTEXT,
        mode="rank",
        metric="exact_match",
        role="held_out",
    ),
    "scenes_textvqa": Benchmark(
        name="scenes_textvqa",
        title="words in scenes",
        source="textvqa",
        split="val",
        prompt=_READ,
        mode="generate",
        metric="textvqa_accuracy",
        role="held_out",
        decoding=_SCENES_ANSWER,
    ),
    "scenes_visual_dialog": Benchmark(
        name="scenes_visual_dialog",
        title="dialogue",
        source="visual_dialog",
        split="val",
        prompt=_CONVERSE_PLAIN,
        mode="rank",
        metric="mrr",
        role="held_out",
        unseen_type=True,
    ),
    "scenes_hatefulmemes": Benchmark(
        name="scenes_hatefulmemes",
        title="label against picture",
        source="hatefulmemes",
        split="val",
        prompt=_CORRECT,
        mode="rank",
        metric="auroc",
        role="held_out",
        candidates=_YES_NO,
        unseen_type=True,
    ),
    "scenes_vizwiz": Benchmark(
        name="scenes_vizwiz",
        title="blurred and unanswerable",
        source="vizwiz",
        split="val",
        prompt=_ASK,
        mode="generate",
        metric=_VQA,
        role="held_out",
        decoding=_SCENES_ANSWER,
    ),
    "scenes_msvdqa": Benchmark(
        name="scenes_msvdqa",
        title="motion",
        source="msvdqa",
        split="test",
        prompt=_ASK,
        mode="rank",
        metric="exact_match",
        role="held_out",
        vocabulary=True,
        unseen_type=True,
    ),
}
