"""Make the files in ``made/``: what a version of the package leaves on the disk.

    git worktree add /tmp/version COMMIT
    PYTHONPATH=/tmp/version/src python tests/compatibility/make.py tests/compatibility/made

It uses the command line alone, whose commands, options, recipe keys and files stay, so that it runs
with any commit. Everything is made below one fixed folder and copied from there:
`test_compatibility` writes the name of its folder in place of this one, and gives the data files
the same date as here. Nothing else of the files is touched.

The run is made whole; then its second checkpoint is deleted, as if it had been killed after the
first. Its results are kept in ``expected/``.
"""

import contextlib
import io
import json
import os
import platform
import shutil
import sys
from pathlib import Path

FOLDER = Path("/tmp/instructblip-compatibility")
"""Where everything is made; the manifests of prepared data name it."""
DATE = 1_700_000_000
"""Modification time of every data file, in seconds; prepared data notes it."""
RECIPE = """\
model:
  start: start
  text_branch: random
data:
  root: data
  augment: false
  max_instruction: 40
  max_prompt: 60
  max_response: 40
  sets:
    vqav2: {}
features:
  cache: "on"
training:
  steps: 6
  batch_size: 4
  accumulate: 2
  learning_rate: 1.0e-2
  warmup_steps: 1
  validate_every: 3
  save_every: 3
  log_every: 1
  precision: fp32
  workers: 0
evaluation:
  validation: [scenes_vqav2]
  validation_limit: 4
  benchmarks: [scenes_vqav2]
  limit: 4
  decoding: {max_new_tokens: 3}
"""
QUESTION = "Question: what colour is the circle? Short answer:"
ANSWER = ["answer", "--image", "IMAGE", "--instruction", QUESTION, "--num-beams", "2"]
ANSWER += ["--max-new-tokens", "6", "--repetition-penalty", "1.0", "--length-penalty", "1.0"]


def run(*arguments: str) -> str:
    """Run a command of the package in this process; returns what it prints."""
    from instructblip.__main__ import main

    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            main([*arguments, "--debug"])
        except SystemExit as stop:
            code = stop.code
    print(printed.getvalue())
    assert not code, f"instructblip {' '.join(arguments)} failed"
    return printed.getvalue()


def machine() -> dict[str, str]:
    """What decides the last bits of a sum; another machine may round otherwise."""
    import torch

    return {
        "torch": torch.__version__.partition("+")[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def answer(image: Path) -> str:
    return run(*(str(image) if a == "IMAGE" else a for a in ANSWER), "--model", "run").strip()


def write_model(folder: Path) -> None:
    """A tiny random BLIP-2 as transformers writes one, with the tokenizers of an InstructBLIP."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import Blip2Config, Blip2ForConditionalGeneration, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    language = Tokenizer(models.BPE(vocabulary, []))
    language.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    language.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=language, eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *map(chr, range(97, 123))]
    pieces += ["##" + chr(code) for code in range(97, 123)]
    words = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    reader = PreTrainedTokenizerFast(
        tokenizer_object=words, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    eos, rows = len(letters), len(letters) + 3
    config = Blip2Config(
        vision_config={
            "image_size": 16,
            "patch_size": 8,
            "num_hidden_layers": 2,
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_attention_heads": 2,
        },
        qformer_config={
            "num_hidden_layers": 2,
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "encoder_hidden_size": 12,
            "vocab_size": len(pieces),
            "max_position_embeddings": 64,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": rows,
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": eos,
            "pad_token_id": eos + 1,
        },
        num_query_tokens=3,
        image_token_index=rows - 1,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reader.save_pretrained(folder / "qformer_tokenizer")
    transform = {
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "image_processor_type": "BlipImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(transform))
    settings = {"num_beams": 2, "max_new_tokens": 4, "eos_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def set_dates(folder: Path) -> None:
    """Give every file the one date, and folders, too."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (DATE, DATE))


def main(target: Path) -> None:
    target = target.resolve()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    os.chdir(FOLDER)
    write_model(Path("start"))
    Path("recipe.yaml").write_text(RECIPE)
    run("scenes", "data", "--scale", "0.001")
    for folder in Path("data").iterdir():
        if folder.name != "vqav2":
            shutil.rmtree(folder)
    set_dates(Path("data/vqav2"))
    run("check", "recipe.yaml")
    run("train", "recipe.yaml", "--out", "run")
    run("evaluate", "recipe.yaml", "run", "--out", "results")
    image = min(Path("data/vqav2").rglob("*.[jp]*g"))
    expected = {
        "machine": machine(),
        "image": str(image),
        "answer": answer(image),
        "files": sorted(str(p) for p in Path("run").rglob("*") if p.is_file()),
    }
    Path("expected").mkdir()
    Path("expected/expected.json").write_text(json.dumps(expected, indent=1))
    for name in ("metrics.jsonl", "checkpoints/step_000006/parameters.safetensors"):
        shutil.copy(Path("run") / name, "expected")
    shutil.rmtree("run/checkpoints/step_000006")
    shutil.rmtree("run/last")
    Path("run/curves.png").unlink()
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(FOLDER, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
