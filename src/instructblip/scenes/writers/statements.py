"""A text judged against a picture: VSR and HatefulMemes."""

from instructblip.scenes.writers.set_folder import SetFolder


def vsr(out: SetFolder, number: int) -> None:
    records = []
    for i, scene, (question,) in out.asked(number, ("statement",), shapes=(2, 3)):
        name = out.picture(scene, f"{i:012d}.jpg")
        relation = next(r for r in ("left of", "right of", "above", "below") if r in question.text)
        label = int(question.answer == "true")
        records.append(
            {"image": name, "caption": question.text, "label": label, "relation": relation}
        )
    out.annotate("test.jsonl", records)


def hatefulmemes(out: SetFolder, number: int) -> None:
    """The label is 1 where the text fits the picture."""
    records = []
    for i, scene, (question,) in out.asked(number, ("label",)):
        name = out.picture(scene, f"img/{i:05d}.png")
        label = int(question.answer == "yes")
        records.append({"id": f"{i:05d}", "img": name, "label": label, "text": question.text})
    out.annotate("dev.jsonl", records)
