"""300 of Tux Paint's stamps that no stage of `small` has shown, with their kind as a question.

    python runs/small/stamps.py PACKAGES OUT && instructblip tune OUT --model small

They are the first ones in the order of their paths.
"""

import argparse
import csv
from pathlib import Path

from instructblip.scenes.pictures.catalog import STAMPS, Picture, read_catalog, single
from instructblip.scenes.pictures.world import World

NUMBER = 300
KINDS = {
    "animals/mammals": "mammal",
    "animals/marsupials": "mammal",
    "animals/birds": "bird",
    "animals/insects": "insect",
    "animals/fish": "fish",
    "plants": "plant",
    "plants/flowers": "flower",
    "plants/trees": "tree",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "town/roadsigns": "road sign",
    "town/houses": "house",
    "town/monuments": "monument",
    "town/flags": "flag",
    "household": "household item",
    "household/dishes": "household item",
    "household/tools": "tool",
    "household/arttools": "tool",
    "space/planets": "planet",
    "space/moon": "planet",
    "hobbies/music": "musical instrument",
    "sports": "sport",
    "clothes": "clothing",
    "clothes/hats": "clothing",
    "vehicles": "vehicle",
    "seasonal/christmas": "decoration",
    "seasonal/halloween": "decoration",
    "seasonal/easter": "decoration",
    "seasonal/hanukkah": "decoration",
}
"""Folder of Tux Paint -> answer; folders below `vehicles` are vehicles."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    shown = {picture.path for picture in World(read_catalog(args.packages)).train}
    stamps, rows = args.packages / "tux" / STAMPS, []
    args.out.mkdir()
    for file in sorted(stamps.rglob("*.png")):
        parts = file.relative_to(stamps).parts
        folder = "vehicles" if parts[0] == "vehicles" else "/".join(parts[:-1][:2])
        kind = KINDS.get(folder)
        if len(rows) == NUMBER:
            break
        if not kind or file in shown or not file.with_suffix(".txt").exists():
            continue
        name = "_".join(parts)
        single(Picture(file, "tux", "", "")).save(args.out / name)
        rows.append((name, "what kind of thing is this?", kind))
    with (args.out / "data.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image", "question", "answer"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
