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
from dataclasses import replace
from pathlib import Path

from instructblip.core.example import Example
from instructblip.data.custom.formats import custom_source
from instructblip.data.custom.rows import CustomSet
from instructblip.data.reading.records import Record, read_records, read_text
from instructblip.data.reading.streaming import has_field, is_list
from instructblip.data.sources.split import COCO_FOLDERS, Split

FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images")


def coco_caption(split: Split) -> Iterator[Example]:
    """``coco_karpathy_{split}.json``, else ``captions_{split}2014.json``; of the owner's test
    split ``image_info_test2014.json``, without captions."""
    name, lavis = split.name, f"coco_karpathy_{split.name}.json"
    path = split.find(lavis, f"captions_{name}2014.json", f"image_info_{name}2014.json")
    if path.name == lavis:
        yield from _grouped(split, path)
    else:
        yield from _coco_style(split, path, f"{name}2014")


def coco_objects(split: Split) -> Iterator[Example]:
    """``coco_caption``, whose examples have the names of the annotated objects in ``extra``, from
    ``instances_train2014.json`` and ``instances_val2014.json``: images of both are in Karpathy's
    training split.

    ``{"annotations": [{"image_id": 9, "category_id": 51, "bbox": [...]}],
    "categories": [{"id": 51, "name": "bowl"}]}``
    """
    objects: dict[str, set[str]] = {}
    years = ("train", "val") if split.name == "train" else ("val",)
    for path in [split.find(f"instances_{year}2014.json") for year in years]:
        categories = read_records(path, "categories")
        names = {record.integer("id"): record.text("name") for _, record in categories}
        for _, record in read_records(path, "annotations"):
            name = record.integer("category_id")
            if name not in names:
                record.fail("category_id", "the id of one of 'categories'")
            objects.setdefault(record.identifier("image_id"), set()).add(names[name])
    for example in coco_caption(split):
        yield replace(example, extra={"objects": sorted(objects.get(example.id, ()))})


def nocaps(split: Split) -> Iterator[Example]:
    """``nocaps_val_4500_captions.json``; test: ``nocaps_test_image_info.json``, no captions."""
    other = "nocaps_val.json" if split.name == "val" else f"nocaps_{split.name}_image_info.json"
    path = split.find(f"nocaps_{split.name}_4500_captions.json", other)
    if is_list(path):
        raise ValueError(
            f"{path}: is LAVIS's list of images, without captions to score with; download the "
            f"owner's nocaps_val_4500_captions.json to {path.parent} (https://nocaps.org/download)"
        )
    yield from _coco_style(split, path, split.name, "val", "test")


def web_capfilt(split: Split) -> Iterator[Example | ValueError]:
    """``web_capfilt.json`` or ``ccs_synthetic_filtered_large.json``: ``[{image, caption}]``.

    The owner's file has a URL in place of each image. img2dataset downloads them into .tar shards
    of images and captions, which are read from ``root`` when there is no such file. Image paths
    are relative to ``root``.
    """
    names = ("web_capfilt.json", "ccs_synthetic_filtered_large.json")
    names = names if split.name == "train" else (f"web_capfilt_{split.name}.json",)
    if (path := split.find_optional(*names)) is None and any(split.root.glob("*.tar")):
        shards = custom_source(CustomSet(split.dataset, "webdataset", "*.tar"))
        yield from shards.read(split.root, split.name)
        return
    for key, record in read_records(path or split.find(*names)):
        if "url" in record and "image" not in record:
            record.fail("image", "the path of the image, downloaded from its URL beforehand")
        image = f"images/{split.image(record.text('image'), record.where)}"
        yield split.example(record.where, key, image, answers=(record.text("caption"),))


def flickr30k(split: Split) -> Iterator[Example]:
    """``dataset_flickr30k.json`` (Karpathy), else ``flickr30k_{split}.json`` (LAVIS), else the
    owner's ``results_20130124.token``, with the images of the split listed in ``{split}.txt``.

    ``{"images": [{"filename": "1000.jpg", "imgid": 0, "split": "test",
    "sentences": [{"raw": "A man rides."}]}], "dataset": "flickr30k"}``
    """
    token, lavis = "results_20130124.token", f"flickr30k_{split.name}.json"
    path = split.find("dataset_flickr30k.json", lavis, token)
    if path.name == token:
        yield from _flickr_token(split, path)
    elif path.name == lavis:
        yield from _grouped(split, path)
    else:
        for _, record in read_records(path, "images"):
            if record.text("split") == split.name:
                name = record.text("filename")
                yield split.example(
                    record.where,
                    record.identifier("imgid", name),
                    split.image(name, record.where, *FLICKR_FOLDERS),
                    answers=tuple(each.text("raw") for each in record.records("sentences")),
                )


def _flickr_token(split: Split, path: Path) -> Iterator[Example]:
    """``1000092795.jpg#0<tab>Two young men are outside.``; in ``{split}.txt`` ``1000092795``."""
    listed = {line.strip() for line, _ in read_text(split.find(f"{split.name}.txt"))} - {""}
    images: dict[str, tuple[str, list[str]]] = {}
    for line, where in read_text(path):
        name, hash_sign, rest = line.partition("#")
        number, tab, caption = rest.partition("\t")
        if not (hash_sign and tab and number.isdecimal()):
            raise ValueError(f"{where}: is {line[:80]!r}; expected image.jpg#0, a tab, a caption")
        if Path(name).stem in listed:
            record = Record({"caption": caption}, where)
            images.setdefault(name, (where, []))[1].append(record.text("caption"))
    for name, (where, captions) in images.items():
        image = split.image(name, where, *FLICKR_FOLDERS)
        yield split.example(where, name, image, answers=tuple(captions))


def _coco_style(split: Split, path: Path, *folders: str) -> Iterator[Example]:
    captions: dict[str, list[str]] = {}
    if has_field(path, "annotations"):  # test files leave it out
        for _, record in read_records(path, "annotations"):
            text = record.text("caption")
            captions.setdefault(record.identifier("image_id"), []).append(text)
    for _, record in read_records(path, "images"):
        image_id = record.identifier("id")
        yield split.example(
            record.where,
            image_id,
            split.image(record.text("file_name"), record.where, *folders),
            answers=tuple(captions.pop(image_id, ())),
            extra={"domain": record.text("domain")} if "domain" in record else {},
        )
    if captions:
        raise ValueError(
            f"{path.name}: {len(captions)} images have captions but are not listed in 'images', "
            f"first image_id {next(iter(captions))}; download the file again"
        )


def _grouped(split: Split, path: Path) -> Iterator[Example]:
    """A list of {image, caption: text or list}, one example per image, in order of the file."""
    images: dict[str, tuple[Record, list[str]]] = {}
    for _, record in read_records(path):
        _, captions = images.setdefault(record.text("image"), (record, []))
        captions.extend(record.one_or_more("caption"))
    for name, (record, captions) in images.items():
        digits = re.findall(r"\d+", Path(name).stem)
        yield split.example(
            record.where,
            str(int(digits[-1])) if digits else name,
            split.image(name, record.where, *COCO_FOLDERS, *FLICKR_FOLDERS),
            answers=tuple(captions),
        )
