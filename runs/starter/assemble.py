"""Step 4: puts the trained parts together as a BLIP-2 directory in transformers' format.

    python runs/starter/assemble.py --vision DIR --language DIR --qformer DIR --out DIR

Beside what transformers reads: the Q-Former's tokenizer and ``text_branch.safetensors``, the text
half of the stage-1 Q-Former (what a Blip2ForImageTextRetrieval checkpoint carries for the real
model), which instruction tuning starts from.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from train_blip2 import assemble
from transformers import AutoTokenizer

from instructblip.data.images import ImageTransform
from instructblip.data.tokens import Tokens
from instructblip.model.instructblip import InstructBlip
from instructblip.model.pretrained import save_text_branch


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("vision", "language", "qformer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    tokens = Tokens(
        AutoTokenizer.from_pretrained(str(args.language)),
        AutoTokenizer.from_pretrained(str(args.language / "qformer_tokenizer")),
    )
    aware = assemble(args.language, tokens)
    aware.vision_model.load_state_dict(load_file(args.vision / "vision.safetensors"))
    state = torch.load(args.qformer / "qformer.pt", weights_only=True)["model"]
    aware.load_state_dict(state, strict=False)
    plain = InstructBlip(aware.config.model_copy(update={"instruction_aware": False}))
    kept = plain.state_dict().keys()
    plain.load_state_dict({k: v for k, v in aware.state_dict().items() if k in kept})
    plain.eval().save_pretrained(args.out)
    save_text_branch(aware, args.out / "text_branch.safetensors")
    tokens.save_pretrained(args.out)
    ImageTransform(image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3).save_pretrained(args.out)
    for source, name in (
        (args.language, "text_accuracy.json"),
        (args.vision, "vision_accuracy.json"),
    ):
        if (source / name).exists():
            shutil.copy(source / name, args.out / name)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 40}
    (args.out / "generation_config.json").write_text(json.dumps(settings, indent=2))
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
