"""predictions.jsonl: a line per answered sample, written as they come, from which a run resumes.

``settings.json`` beside it holds what the predictions depend on; a file of other settings is never
continued or overwritten. In a process group each rank writes ``predictions.rank<N>.jsonl``; they
are joined into one file at the end, or at the next start with any number of ranks.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from instructblip.core import distributed
from instructblip.core.files import (
    cut_last_line,
    flush,
    parse_json,
    read_json,
    whole_lines,
    write_json,
)

PREDICTIONS = "predictions.jsonl"
SETTINGS = "settings.json"


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file. Raises ValueError for a broken one or a repeated id."""
    predictions: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            prediction = parse_json(line)
            identifier = prediction["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:line {number}: is not a prediction ({error}); delete the line, and the "
                "sample is answered again"
            ) from None
        if identifier in predictions:
            raise ValueError(f"{path}:line {number}: id {identifier!r} appears twice")
        predictions[identifier] = prediction
    return list(predictions.values())


class PredictionLog:
    """The predictions of one benchmark: those on disk, and a place to add more.

    Args:
        folder: folder of the files; None keeps the predictions in memory only.
        settings: what the predictions depend on.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.done: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> "PredictionLog":
        if self.folder is None:
            return self
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_settings()
            _join_parts(self.folder)
        distributed.barrier()
        self.done = {p["id"]: p for p in read_predictions(self.folder / PREDICTIONS)}
        distributed.barrier()  # before the main rank adds lines to what the others still read
        self._file = _part(self.folder).open("a", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def gather(self) -> None:
        """Give every rank the predictions of all; the main rank joins their files."""
        if distributed.world_size() == 1:
            return
        self.__exit__()
        for part in distributed.gather_objects(self.done):
            self.done |= part
        if self.folder is not None and distributed.is_main():
            _join_parts(self.folder)
        distributed.barrier()

    def add(self, predictions: Iterable[dict[str, Any]]) -> None:
        """Add a batch. It is on disk before this returns: a kill loses one batch at most."""
        lines = []
        for prediction in predictions:
            self.done[prediction["id"]] = prediction
            lines.append(json.dumps(prediction, ensure_ascii=False) + "\n")
        if self._file is not None:
            self._file.write("".join(lines))
            flush(self._file)

    def _check_settings(self) -> None:
        assert self.folder is not None
        path = self.folder / SETTINGS
        settings = json.loads(json.dumps(self.settings))
        if path.is_file():
            old = read_json(path)
            if old != settings:
                changed = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
                raise ValueError(
                    f"{self.folder} holds predictions made with another "
                    f"{', '.join(sorted(changed))}; choose another output folder, or delete this "
                    "one to start again"
                )
        elif (self.folder / PREDICTIONS).is_file():
            raise ValueError(
                f"{self.folder} holds {PREDICTIONS} without {SETTINGS}: the settings of its "
                "predictions are unknown; choose another output folder"
            )
        else:
            write_json(path, settings, indent=2)


def _part(folder: Path) -> Path:
    rank = distributed.rank()
    return folder / (f"predictions.rank{rank}.jsonl" if rank else PREDICTIONS)


def _join_parts(folder: Path) -> None:
    """Append the files of the other ranks to the main one, whole lines only, and remove them."""
    path = folder / PREDICTIONS
    cut_last_line(path)
    for part in sorted(folder.glob("predictions.rank*.jsonl")):
        cut_last_line(part)
        known = {p["id"] for p in read_predictions(path)}
        new = [p for p in read_predictions(part) if p["id"] not in known]
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in new)
            flush(file)
        part.unlink()
