"""Captions: COCO Caption, Web CapFilt, NoCaps, Flickr30K.

Every reader yields one example per image, with all its captions as ``answers``.

COCO (captions_train2014.json, NoCaps alike)::

    {"images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}],
     "annotations": [{"image_id": 9, "id": 661, "caption": "A tray with bread and fruit."}]}

Karpathy's split as LAVIS ships it (coco_karpathy_train.json; val and test have a list)::

    [{"caption": "A tray with bread.", "image": "train2014/COCO_train2014_000000000009.jpg",
      "image_id": "coco_9"}]
"""

import re
from collections.abc import Iterator
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.custom.files import CustomSet
from instructblip.data.custom.formats import custom_source
from instructblip.data.reading.records import (
    Record,
    find_file,
    find_optional,
    place_image,
    read_records,
    read_text,
)
from instructblip.data.reading.streaming import has_field

COCO_FOLDERS = ("train2014", "val2014", "test2014", "test2015", "train2017", "val2017")
FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images")


def coco_caption(root: Path, split: str) -> Iterator[Example]:
    """``coco_karpathy_{split}.json``, else ``captions_{split}2014.json``; of the owner's test
    split ``image_info_test2014.json``, without captions."""
    official = (f"captions_{split}2014.json", f"image_info_{split}2014.json")
    path = find_file(root, f"coco_karpathy_{split}.json", *official)
    if path.name.startswith("coco_karpathy"):
        yield from _grouped(root, path, "coco_caption", split)
    else:
        yield from _coco_style(root, path, "coco_caption", split, (f"{split}2014",))


def nocaps(root: Path, split: str) -> Iterator[Example]:
    """``nocaps_val_4500_captions.json``; test: ``nocaps_test_image_info.json``, no captions."""
    names = {"val": ("nocaps_val_4500_captions.json", "nocaps_val.json")}.get(
        split, (f"nocaps_{split}_4500_captions.json", f"nocaps_{split}_image_info.json")
    )
    path = find_file(root, *names)
    yield from _coco_style(root, path, "nocaps", split, (split, "val", "test"))


def web_capfilt(root: Path, split: str) -> Iterator[Example]:
    """``web_capfilt.json`` or ``ccs_synthetic_filtered_large.json``: ``[{image, caption}]``.

    The owner's file has a URL in place of each picture. Whoever fetched them with img2dataset has
    .tar shards of pictures and captions: those are read from ``root`` when there is no such file.
    """
    names = ("web_capfilt.json", "ccs_synthetic_filtered_large.json")
    names = names if split == "train" else (f"web_capfilt_{split}.json",)
    if (path := find_optional(root, *names)) is None and any(root.glob("*.tar")):
        shards = custom_source(CustomSet("web_capfilt", "webdataset", "*.tar", "images"))
        yield from shards.read(root, split)
        return
    for key, record in read_records(path or find_file(root, *names)):
        if "url" in record and "image" not in record:
            record.fail("image", "the path of the picture, which was fetched from its URL before")
        yield Example(
            dataset="web_capfilt",
            split=split,
            id=key,
            images=(place_image(root, record.text("image"), record.where),),
            task="caption",
            answers=(record.text("caption"),),
            where=record.where,
        )


def flickr30k(root: Path, split: str) -> Iterator[Example]:
    """``dataset_flickr30k.json`` (Karpathy), else ``flickr30k_{split}.json`` (LAVIS), else the
    owner's ``results_20130124.token``, with the pictures of the split listed in ``{split}.txt``.

    ``{"images": [{"filename": "1000.jpg", "imgid": 0, "split": "test",
    "sentences": [{"raw": "A man rides."}]}], "dataset": "flickr30k"}``
    """
    token = "results_20130124.token"
    path = find_file(root, "dataset_flickr30k.json", f"flickr30k_{split}.json", token)
    if path.name == token:
        yield from _flickr_token(root, path, split)
        return
    if path.name != "dataset_flickr30k.json":
        yield from _grouped(root, path, "flickr30k", split)
        return
    for _, record in read_records(path, "images"):
        if record.text("split") != split:
            continue
        name = record.text("filename")
        yield Example(
            dataset="flickr30k",
            split=split,
            id=record.identifier("imgid") if "imgid" in record else name,
            images=(place_image(root, name, record.where, *FLICKR_FOLDERS),),
            task="caption",
            answers=tuple(sentence.text("raw") for sentence in record.records("sentences")),
            where=record.where,
        )


def _flickr_token(root: Path, path: Path, split: str) -> Iterator[Example]:
    """``1000092795.jpg#0<tab>Two young men are outside.``; in ``{split}.txt`` ``1000092795``."""
    listed = {line.strip() for line, _ in read_text(find_file(root, f"{split}.txt"))} - {""}
    pictures: dict[str, tuple[str, list[str]]] = {}
    for line, where in read_text(path):
        name, hash_sign, rest = line.partition("#")
        number, tab, caption = rest.partition("\t")
        if not (hash_sign and tab and number.isdecimal()):
            raise ValueError(f"{where}: is {line[:80]!r}; expected picture.jpg#0, a tab, a caption")
        if Path(name).stem in listed:
            record = Record({"caption": caption}, where)
            pictures.setdefault(name, (where, []))[1].append(record.text("caption"))
    for name, (where, captions) in pictures.items():
        yield Example(
            dataset="flickr30k",
            split=split,
            id=name,
            images=(place_image(root, name, where, *FLICKR_FOLDERS),),
            task="caption",
            answers=tuple(captions),
            where=where,
        )


def _coco_style(
    root: Path, path: Path, dataset: str, split: str, folders: tuple[str, ...]
) -> Iterator[Example]:
    captions: dict[str, list[str]] = {}
    if has_field(path, "annotations"):  # test files leave it out
        for _, record in read_records(path, "annotations"):
            text = record.text("caption")
            captions.setdefault(record.identifier("image_id"), []).append(text)
    for _, record in read_records(path, "images"):
        image_id = record.identifier("id")
        yield Example(
            dataset=dataset,
            split=split,
            id=image_id,
            images=(place_image(root, record.text("file_name"), record.where, *folders),),
            task="caption",
            answers=tuple(captions.pop(image_id, ())),
            where=record.where,
            extra={"domain": record.text("domain")} if "domain" in record else {},
        )
    if captions:
        raise ValueError(
            f"{path.name}: {len(captions)} captions name pictures that 'images' does not list, "
            f"first image_id {next(iter(captions))}; download the file again"
        )


def _grouped(root: Path, path: Path, dataset: str, split: str) -> Iterator[Example]:
    """A list of {image, caption: text or list}, one example per picture, in order of the file."""
    pictures: dict[str, tuple[Record, list[str]]] = {}
    for _, record in read_records(path):
        _, captions = pictures.setdefault(record.text("image"), (record, []))
        if isinstance(record.data.get("caption"), list):
            captions.extend(record.texts("caption"))
        else:
            captions.append(record.text("caption"))
    for name, (record, captions) in pictures.items():
        digits = re.findall(r"\d+", Path(name).stem)
        yield Example(
            dataset=dataset,
            split=split,
            id=str(int(digits[-1])) if digits else name,
            images=(place_image(root, name, record.where, *COCO_FOLDERS, *FLICKR_FOLDERS),),
            task="caption",
            answers=tuple(captions),
            where=record.where,
        )
