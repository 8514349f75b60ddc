"""The files of one split of a published data set, as its reader sees them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructblip.core.example import Example
from instructblip.data.reading.opened import note_file
from instructblip.data.reading.records import image_name, list_folder

COCO_FOLDERS = ("train2014", "val2014", "test2014", "test2015", "train2017", "val2017")
"""Folders that COCO's archives of images unpack to."""


@dataclass(frozen=True, slots=True)
class Split:
    """One split of one data set: ``root/annotations``, ``root/images``, and what all examples of
    the split have in common."""

    root: Path
    name: str
    dataset: str
    task: str
    _folders: dict[str, bool] = field(default_factory=dict, init=False, compare=False)
    """Whether a folder below ``images/`` exists: a stat for each example would take most of the
    time of a reader."""
    _listings: dict[str, frozenset[str]] = field(default_factory=dict, init=False, compare=False)
    _places: dict[str, str] = field(default_factory=dict, init=False, compare=False)
    """The name as written of each image that is elsewhere."""

    def find_optional(self, *names: str) -> Path | None:
        """The first of ``annotations/<name>`` that exists, or None."""
        for name in names:
            path = self.root / "annotations" / name
            note_file(path, present := path.exists())
            if present:
                return path
        return None

    def find(self, *names: str) -> Path:
        """The first of ``annotations/<name>`` that exists; FileNotFoundError lists the names."""
        path = self.find_optional(*names)
        if path is None:
            raise FileNotFoundError(
                f"none of {', '.join(names)} is in {self.root / 'annotations'}; download the "
                "owner's file and put it there, unpacked (`annotations/` beside `images/`)"
            )
        return path

    def image(self, name: str, where: str, *folders: str) -> str:
        """Path of an image below ``images/``, where the owner's archive may have its own folder.

        Depending on what exists, it is: the name as written, ``folders/<file name>``, or
        ``<file name>`` alone; if it is nowhere, the name as written, so that errors show it. Raises
        ValueError if two names with folders would share one file.
        """
        name = image_name(name, where)
        parent, _, base = name.rpartition("/")
        if parent and self._has_folder(parent):
            return name
        places = [f"{folder}/{base}" for folder in folders if self._has_folder(folder)] or [base]
        if not parent and len(places) == 1:
            return places[0]
        for place in dict.fromkeys([*places, base]):
            if base in self._listing(place[: -len(base)]):
                if parent and (first := self._places.setdefault(place, name)) != name:
                    raise ValueError(
                        f"{where}: neither '{first}' nor '{name}' is in {self.root / 'images'}, "
                        f"and '{place}' cannot be both: the archive was unpacked without its "
                        "folders; unpack it again with them"
                    )
                return place
        return name if parent else places[0]

    def _listing(self, folder: str) -> frozenset[str]:
        if folder not in self._listings:
            path = self.root / "images" / folder
            names = (entry.name for entry in list_folder(path)) if path.is_dir() else ()
            self._listings[folder] = frozenset(names)
        return self._listings[folder]

    def _has_folder(self, name: str) -> bool:
        if name not in self._folders:
            self._folders[name] = (self.root / "images" / name).is_dir()
        return self._folders[name]

    def example(self, where: str, id: str, *images: str, **fields: Any) -> Example:
        """An example with the other ``fields`` of ``Example``, empty without them."""
        return Example(
            dataset=self.dataset,
            split=self.name,
            id=id,
            images=images,
            task=self.task,
            where=where,
            **fields,
        )


Reader = Callable[[Split], Iterator[Example | ValueError]]
"""Yields the examples of a split in the order of its file, or the error of a row of a shard."""


def read_split(
    read: Reader, dataset: str, task: str, root: Path, split: str
) -> Iterator[Example | ValueError]:
    yield from read(Split(root, split, dataset, task))
