"""Several turns: LLaVA's conversations and Visual Dialog."""

from instructblip.scenes.language import detail, phrase
from instructblip.scenes.questions import (
    ALL_PLACES,
    NUMBERS,
    VQA_KINDS,
)
from instructblip.scenes.world import (
    COLOURS,
    SHAPES,
    WORDS,
)
from instructblip.scenes.writers.set_folder import SetFolder

DIALOGUE_KINDS = ("color", "shape", "count", "exists", "place", "size")
DIALOGUE_OPTIONS = 20


def llava(out: SetFolder, number: int) -> None:
    conversations, details, reasons = [], [], []
    for i, scene, asked in out.asked(number, VQA_KINDS, per_scene=3, shapes=(2, 3)):
        name = out.picture(scene, f"{i:012d}.jpg")
        turns = [(q.text, f"{q.answer}") for q in asked]
        record = {"id": f"{i:012d}", "image": name}
        conversations.append({**record, "conversations": _conversation(turns)})
        text = out.rng.choice(
            ("describe the picture in detail.", "tell me everything that you see.")
        )
        details.append({**record, "conversations": _conversation([(text, detail(scene))])})
        question = out.question(scene, ("fruit", "corners", "signal"))
        if question:
            answer = f"{question.answer}, because {question.why}."
            text = f"{question.text} say why."
            reasons.append({**record, "conversations": _conversation([(text, answer)])})
    out.annotate("conversation_58k.json", conversations)
    out.annotate("detail_23k.json", details)
    out.annotate("complex_reasoning_77k.json", reasons)


def _conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    lines = []
    for i, (question, answer) in enumerate(turns):
        value = f"<image>\n{question}" if i == 0 else question
        lines += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return lines


def visual_dialog(out: SetFolder, number: int) -> None:
    questions: dict[str, int] = {}
    pool = _answer_pool()
    dialogs = []
    rounds = 4
    for i, scene, asked in out.asked(number // rounds, DIALOGUE_KINDS, rounds, shapes=(2, 3)):
        out.picture(scene, f"VisualDialog_val2018_{i:012d}.jpg")
        turns = []
        for question in asked:
            number_of = questions.setdefault(question.text, len(questions))
            right = pool.index(question.answer)
            options = out.rng.sample([k for k in range(len(pool)) if k != right],
                                     DIALOGUE_OPTIONS - 1)  # fmt: skip
            options.insert(out.rng.randrange(DIALOGUE_OPTIONS), right)
            turns.append(
                {
                    "question": number_of,
                    "answer": right,
                    "answer_options": options,
                    "gt_index": options.index(right),
                }
            )
        dialogs.append({"image_id": i, "caption": phrase(scene.things[0]), "dialog": turns})
    data = {"questions": list(questions), "answers": pool, "dialogs": dialogs}
    out.annotate("visdial_1.0_val.json", {"version": "1.0", "split": "val", "data": data})


def _answer_pool() -> list[str]:
    return [*COLOURS, *SHAPES, *ALL_PLACES, *NUMBERS, *WORDS, "yes", "no", "small", "large"]
