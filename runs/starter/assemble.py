"""Step 4: assemble the trained parts as a BLIP-2 directory in transformers' format.

    python runs/starter/assemble.py --tokenizers DIR --vision RUN --language TERM1 TERM2 \
        --qformer RUN --out DIR

It also has the Q-Former's tokenizer and ``text_branch.safetensors``, the text half of the stage-1
Q-Former (which a Blip2ForImageTextRetrieval checkpoint of the real model contains). Instruction
tuning starts from it.
"""

import argparse
import json
import shutil
from pathlib import Path

from qformer import assemble, load_tokens
from safetensors.torch import load_file

from instructblip.data.images import ImageTransform
from instructblip.model.checkpoints.transformers import save_text_branch
from instructblip.model.instructblip import InstructBlip

CARD = """# The starter: a small BLIP-2 for Scenes

A BLIP-2 in transformers' format (`Blip2ForConditionalGeneration`), {parameters:.1f} M parameters,
{size:.0f} MB, trained by this project's code (`runs/starter.sh`) on two CPU cores. It is the small
counterpart of the BLIP-2 checkpoint that instruction tuning starts from: it describes images of
Scenes, the embedded world of `instructblip.scenes`, and follows instructions poorly. It does not
work on photographs.

- **Language model** (instead of Vicuna): Llama, width 192, with a new byte-level BPE. Trained on
  text alone for {steps} steps in two terms (single attributes, then two at once): descriptions of
  scenes and questions of every kind about them. Half of the descriptions (in the second term 15 %)
  are written word by word, the others with the words of each object summed into one position, which
  is the form of the queries of a Q-Former.
- **Image encoder** (instead of EVA-CLIP): ViT, 4 layers of width 160, 64x64 pixels in patches
  of 8. Trained on {pictures:,} images to name the content of each cell; each patch also predicts
  its row and column.
- **Q-Former** (as BLIP-2's): 4 layers of width 192, 16 queries. Stage 1: image-text matching and
  grounded captions, then contrastive learning on phrases about one object each. Stage 2: captions
  through the frozen language model. The captions name shapes and colours, and as web captions do,
  only what is conspicuous: the large objects, in any order, without place and size. Two contrastive
  losses train beside the captions. For every object, one query is drawn to the phrase with its
  colour and shape, in the space of the language model; the phrases of stage 1, which also name size
  and place, continue in a separate space. With captions alone the queries forget the places.

`text_branch.safetensors` is the text half of the stage-1 Q-Former (which a
`Blip2ForImageTextRetrieval` checkpoint contains); an instruction-aware Q-Former starts from it.

**Held out of every stage with images**: six colour-shape pairs, the handwritten digits of the test
half, every image of a held-out set. No stage before tuning has questions about an image.

## The language model on descriptions of scenes

Exact match in percent on descriptions by words and by objects; the second is the upper bound for
tuning without the help of the Q-Former:

{text}

## The image encoder

Accuracy at occupied cells, digits of unseen handwriting, in percent:

{vision}
"""


def card(out: Path, parameters: int) -> str:
    """Return the model card with the scores of the stages."""
    text = json.loads((out / "text_accuracy.json").read_text())
    steps = " + ".join(f"{n:,}" for n in text["steps"])
    vision = json.loads((out / "vision_accuracy.json").read_text())
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    pictures = vision.pop("pictures")
    rows = (f"| {k} | {v} | {text['things'][k]} |" for k, v in text["words"].items())
    by_kind = "\n".join(["| kind | by words | by objects |", "|---|---|---|", *rows])
    seen = "\n".join(
        ["| kind | accuracy |", "|---|---|", *(f"| {k} | {v} |" for k, v in vision.items())]
    )
    return CARD.format(
        parameters=parameters / 1e6, size=size, steps=steps, pictures=pictures,
        text=by_kind, vision=seen,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("tokenizers", "vision", "qformer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--language", type=Path, nargs=2, required=True, help="both terms")
    args = parser.parse_args()
    tokens = load_tokens(args.tokenizers)
    aware = assemble(args.vision / "last", args.language[-1] / "last", tokens)
    trained = load_file(args.qformer / "last" / "pretraining.safetensors")
    weights = {n.removeprefix("model."): p for n, p in trained.items() if n.startswith("model.")}
    aware.load_state_dict(weights, strict=False)
    plain = InstructBlip(aware.config.model_copy(update={"instruction_aware": False}))
    kept = plain.state_dict().keys()
    plain.load_state_dict({k: v for k, v in aware.state_dict().items() if k in kept})
    plain.eval().save_pretrained(args.out)
    save_text_branch(aware.qformer, args.out / "text_branch.safetensors")
    tokens.save_pretrained(args.out)
    ImageTransform(image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3).save_pretrained(args.out)
    shutil.copy(args.vision / "vision_accuracy.json", args.out)
    terms = [json.loads((term / "text_accuracy.json").read_text()) for term in args.language]
    accuracy = {**terms[-1], "steps": [term["steps"] for term in terms]}
    (args.out / "text_accuracy.json").write_text(json.dumps(accuracy, indent=1))
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 40}
    settings |= {"num_beams": 1, "repetition_penalty": 1.0}  # "a red circle and a red square"
    (args.out / "generation_config.json").write_text(json.dumps(settings, indent=2))
    parameters = sum(p.numel() for p in plain.parameters())
    (args.out / "README.md").write_text(card(args.out, parameters))
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
