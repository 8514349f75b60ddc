"""How often the Python tokenizer of captions agrees with the Stanford one, and what it changes.

    python benchmarks/caption_tokens.py CAPTIONS.json

The file is one of captions as COCO has them: a list of records with ``caption``, or annotations
with such a list. Captions of one image score each other: the first against the rest, or, where
every image has one, against the caption of the image before. Needs Java and the extra
``caption-metrics``. The last line of the output is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from instructblip.evaluation import captions


def scored(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Candidates and their references."""
    by_image: dict[Any, list[str]] = {}
    for record in records:
        by_image.setdefault(record["image_id"], []).append(record["caption"])
    several = [texts for texts in by_image.values() if len(texts) > 1]
    if several:
        return [texts[0] for texts in several], [texts[1:] for texts in several]
    first = [texts[0] for texts in by_image.values()]
    return first, [[before] for before in [first[-1], *first[:-1]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--shown", type=int, default=10, help="disagreements to print")
    options = parser.parse_args()
    read = json.loads(options.file.read_text(encoding="utf-8"))
    records = read["annotations"] if isinstance(read, dict) else read
    texts = [record["caption"] for record in records]
    ours, theirs = captions.tokenize(texts, "python"), captions.tokenize(texts, "ptb_java")
    other = [i for i in range(len(texts)) if ours[i] != theirs[i]]
    for i in other[: options.shown]:
        print(f"{texts[i]!r}\n  python {ours[i]}\n  java   {theirs[i]}")
    candidates, references = scored(records)
    result: dict[str, Any] = {"captions": len(texts), "agree": 1 - len(other) / len(texts)}
    for tokenizer in ("python", "ptb_java"):
        cider = captions.cider(candidates, references, tokenizer)
        result[f"cider_{tokenizer}"] = 100 * cider.value
    print(json.dumps(result))


if __name__ == "__main__":
    main()
