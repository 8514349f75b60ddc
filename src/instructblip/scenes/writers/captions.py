"""Captions: COCO, NoCaps and, with words in the pictures, TextCaps."""

from instructblip.scenes.language import captions
from instructblip.scenes.writers.set_folder import SetFolder


def coco_caption(out: SetFolder, number: int) -> None:
    _coco_files(out, number, f"captions_{out.split}2014.json", f"COCO_{out.split}2014_", "seen")


def nocaps(out: SetFolder, number: int) -> None:
    _coco_files(out, number, "nocaps_val_4500_captions.json", "", "unseen")


def _coco_files(out: SetFolder, number: int, name: str, prefix: str, pairs: str) -> None:
    images, annotations = [], []
    for i in range(number):
        scene = out.scene(pairs=pairs)
        file_name = out.picture(scene, f"{prefix}{i:012d}.jpg")
        images.append({"id": i, "file_name": file_name, "width": 64, "height": 64})
        annotations += [
            {"image_id": i, "id": 5 * i + k, "caption": caption}
            for k, caption in enumerate(captions(scene))
        ]
    out.annotate(name, {"info": {}, "images": images, "annotations": annotations, "licenses": []})


def textcaps(out: SetFolder, number: int) -> None:
    data, ocr = [], []
    for i in range(number):
        scene = out.scene(shapes=(1, 2), words=1)
        image_id = f"{out.split}{i:06d}"
        out.picture(scene, f"train_images/{image_id}.jpg")
        # Only reading captions: the words are part of all five.
        references = captions(scene)
        ocr.append({"image_id": image_id, "ocr_tokens": [t.name for t in scene.of_kind("word")]})
        data += [
            {
                "image_id": image_id,
                "image_path": f"train_images/{image_id}.jpg",
                "caption_str": caption,
                "reference_strs": references,
            }
            for caption in references
        ]
    out.annotate(f"TextCaps_0.1_{out.split}.json", {"dataset_type": out.split, "data": data})
    out.annotate(f"TextVQA_Rosetta_OCR_v0.2_{out.split}.json", {"data": ocr})
