"""Step 4: puts the trained parts together as a BLIP-2 directory in transformers' format.

    python runs/starter/assemble.py --tokenizers DIR --vision RUN --language TERM1 TERM2 \
        --qformer RUN --out DIR

Beside what transformers reads: the Q-Former's tokenizer and ``text_branch.safetensors``, the text
half of the stage-1 Q-Former (what a Blip2ForImageTextRetrieval checkpoint carries for the real
model), which instruction tuning starts from.
"""

import argparse
import json
import shutil
from pathlib import Path

from qformer import assemble, load_tokens
from safetensors.torch import load_file

from instructblip.data.images import ImageTransform
from instructblip.model.checkpoints.text_branch import save_text_branch
from instructblip.model.instructblip import InstructBlip

CARD = """# The starter: a small BLIP-2 of the embedded world

A BLIP-2 in transformers' format (`Blip2ForConditionalGeneration`), {parameters:.1f} M parameters,
{size:.0f} MB, trained by this project's own code (`runs/starter.sh`) on two CPU cores. It plays the
BLIP-2 checkpoint that instruction tuning starts from: it describes pictures of the world of
`instructblip.scenes` and follows instructions poorly. It is of no use on photographs.

- **Language model** (plays Vicuna): Llama, width 192, byte-level BPE of its own. Trained on text
  alone for {steps} steps in two terms (single attributes, then two at once): scenes told in words
  and questions of every kind about them. Half of the scenes (in the second term 15 %) are told word
  by word, the others with the words of each thing summed into one position, which is the form in
  which a Q-Former speaks.
- **Image encoder** (plays EVA-CLIP): ViT, 4 layers of width 160, 64x64 pixels in patches of 8.
  Trained on {pictures:,} pictures to name what stands in each cell; each patch also names its row
  and column.
- **Q-Former** (plays BLIP-2's): 4 layers of width 192, 16 queries. Stage 1: image-text matching and
  grounded captions, then contrastive learning on phrases about one thing each; stage 2: captions
  through the frozen language model. They name shapes and colours, and as captions from the web do,
  only what catches the eye: the large things, in any order, no place and no size. Beside the
  captions, for every thing one query is drawn to the phrase that names its colour and shape, in
  the language model's space, and the phrases of stage 1, which name size and place too, go on in a
  space of their own: captions by themselves let the queries forget where things stand.

`text_branch.safetensors` is the text half of the stage-1 Q-Former (what a
`Blip2ForImageTextRetrieval` checkpoint carries), from which an instruction-aware Q-Former starts.

**Kept out of every stage with pictures**: six colour-shape pairs, the handwritten digits of the
test half, every picture of a held-out set. No question is asked about a picture before tuning.

## What the language model can do when the scene is told in words

Exact match in percent, told word by word and thing by thing; the second is the ceiling for what
tuning can reach without the Q-Former's help:

{text}

## What the image encoder sees

Accuracy at occupied cells, digits of unseen handwriting, in percent:

{vision}
"""


def card(out: Path, parameters: int) -> str:
    """The model card, from the figures that the stages left."""
    text = json.loads((out / "text_accuracy.json").read_text())
    steps = " + ".join(f"{n:,}" for n in text["steps"])
    vision = json.loads((out / "vision_accuracy.json").read_text())
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    pictures = vision.pop("pictures")
    rows = (f"| {k} | {v} | {text['things'][k]} |" for k, v in text["words"].items())
    told = "\n".join(["| kind | by words | by things |", "|---|---|---|", *rows])
    seen = "\n".join(
        ["| kind | accuracy |", "|---|---|", *(f"| {k} | {v} |" for k, v in vision.items())]
    )
    return CARD.format(
        parameters=parameters / 1e6, size=size, steps=steps, pictures=pictures,
        text=told, vision=seen,
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
