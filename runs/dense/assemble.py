"""Step 4: assemble the trained parts as a BLIP-2 directory in transformers' format.

python runs/dense/assemble.py OUT --vision RUN --qformer RUN
"""

import argparse
from pathlib import Path

from hidden_words import start
from safetensors.torch import load_file

from instructblip.data.images import ImageTransform
from instructblip.model.checkpoints.transformers import save_text_branch
from instructblip.model.instructblip import InstructBlip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--qformer", type=Path, required=True, help="the run of step 3")
    args = parser.parse_args()
    aware, tokens = start(args.vision)
    trained = load_file(args.qformer / "last/pretraining.safetensors")
    weights = {name.removeprefix("model."): value for name, value in trained.items()}
    aware.load_state_dict(weights, strict=False)
    config = aware.config.model_copy(update={"instruction_aware": False})
    plain = InstructBlip(config, generation_settings=aware.generation_settings)
    kept = plain.state_dict().keys()
    plain.load_state_dict({k: v for k, v in aware.state_dict().items() if k in kept})
    plain.eval().save_pretrained(args.out, assets=aware.assets)
    save_text_branch(aware.qformer, args.out / "text_branch.safetensors")
    tokens.save_pretrained(args.out)
    side = aware.config.vision.image_size
    ImageTransform(image_size=side, mean=(0.5,) * 3, std=(0.5,) * 3).save_pretrained(args.out)


if __name__ == "__main__":
    main()
