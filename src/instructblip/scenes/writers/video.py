"""Videos: MSVD-QA."""

import random
from dataclasses import replace

from instructblip.scenes.world import Thing
from instructblip.scenes.writers.set_folder import SetFolder


def msvdqa(out: SetFolder, number: int) -> None:
    """Videos of four frames: of two shapes one moves, and is asked about."""
    records = []
    while len(records) < number:
        scene = out.scene(shapes=(2, 2))
        first, second = scene.shapes
        if first.name == second.name or first.colour == second.colour:
            continue
        moving, still = out.rng.sample([first, second], 2)
        video = f"vid{len(records)}" if out.split == "test" else f"{out.split}{len(records)}"
        for k, cell in enumerate(walk(moving, still, out.rng)):
            moved = replace(moving, row=cell[0], column=cell[1])
            things = tuple(moved if thing is moving else thing for thing in scene.things)
            out.picture(replace(scene, things=things), f"{video}/frame_{k}.png")
        question, answer = out.rng.choice(motion_questions(moving, still))
        records.append(
            {"id": len(records), "video_id": video, "question": question, "answer": answer}
        )
    out.annotate(f"{out.split}_qa.json", records)


def motion_questions(moving: Thing, still: Thing) -> list[tuple[str, str]]:
    """Questions and answers about a video in which one of two shapes moves."""
    return [
        ("what shape moves?", moving.name),
        ("what color is the shape that moves?", moving.colour),
        ("what shape stays in its place?", still.name),
        ("what color is the shape that stays in its place?", still.colour),
    ]


def walk(moving: Thing, still: Thing, rng: random.Random) -> list[tuple[int, int]]:
    """Four cells, each beside the one before, none of them taken."""
    cells = [(moving.row, moving.column)]
    while len(cells) < 4:
        row, column = cells[-1]
        beside = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        taken = {(still.row, still.column)}
        free = [c for c in beside if {*c} <= {0, 1, 2} and c not in taken]
        cells.append(rng.choice(free))
    return cells
