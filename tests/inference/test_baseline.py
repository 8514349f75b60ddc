"""A transformers model of another kind, made by the test, as a baseline."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from instructblip.cli import main as cli
from instructblip.core.example import Example
from instructblip.evaluation.evaluate import evaluate
from instructblip.inference.baseline import TransformersModel, is_baseline
from tests.evaluation.fakes import ListDataset, benchmark
from tests.testing import write_model, write_picture

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS += ["Question", ":", "what", "is", "red", "?", "Short", "answer"]
WORDS += ["the", "cat", "blue", "yes", "no"]


def write_llava(folder: Path) -> Path:
    """A tiny LLaVA with random weights, a word tokenizer and its processor."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_index=4,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ListDataset:
    root = tmp_path_factory.mktemp("images")
    example = Example(
        dataset="toy",
        split="val",
        id="0",
        images=(),
        task="vqa",
        question="what is red?",
        answers=("cat",),
        choices=("cat", "the cat", "blue"),
    )
    names = [write_picture(root / f"{i}.png", seed=i).name for i in range(3)]
    return ListDataset(
        [replace(example, id=str(i), images=(name,)) for i, name in enumerate(names)],
        image_root=root,
    )


def test_answers_and_likelihoods_are_those_of_transformers(
    folder: Path, dataset: ListDataset
) -> None:
    baseline = TransformersModel(folder, torch.device("cpu"))
    answered = evaluate(baseline, benchmark(), dataset, progress=False)
    assert all("Question" not in p["prediction"] for p in answered.predictions)
    ranked = evaluate(baseline, benchmark(mode="rank", decoding={}), dataset, progress=False)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    for prediction in ranked.predictions:
        for text, score in zip(
            prediction["candidates"], prediction["log_likelihoods"], strict=True
        ):
            with Image.open(dataset.image_root / prediction["images"][0]) as image:
                whole = processor(
                    images=image.convert("RGB"),
                    text=f"<image>\n{prediction['prompt']} {text} </s>",
                    return_tensors="pt",
                )
            whole.pop("token_type_ids", None)
            length = len(text.split()) + 1
            labels = whole["input_ids"].clone()
            labels[:, :-length] = -100
            with torch.no_grad():
                loss = model(**whole, labels=labels).loss
            assert score == pytest.approx(-float(loss) * length, abs=1e-4)


def test_compare_takes_models_of_all_kinds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blip2 = write_model(tmp_path / "blip2", "blip2")
    with pytest.raises(SystemExit):
        cli.main(["scenes", str(tmp_path / "data"), "--scale", "0.02"])
    capsys.readouterr()
    models = [str(folder), str(blip2), f"data.root={tmp_path / 'data'}"]
    options = ["--recipe", "scenes", "--benchmarks", "scenes_vsr,scenes_vqav2", "--limit", "3"]
    options += ["--out", str(tmp_path / "results"), "--format", "json", "--debug"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *models, *options])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    printed = json.loads(out[out.index("{\n") :])
    assert printed["models"] == [folder.name, "blip2"]
    assert set(printed["datasets"]) == {"scenes_vsr", "scenes_vqav2"}
    assert "blip2" in printed["datasets"]["scenes_vsr"]["models"]


@pytest.mark.parametrize("kind", ["blip-2", "instructblip", "blip-2-other-tower"])
def test_models_of_this_package_are_no_baselines(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert not is_baseline(tmp_path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert is_baseline(tmp_path)
    with pytest.raises(ValueError, match="neither a BLIP-2, an InstructBLIP nor"):
        TransformersModel(tmp_path, torch.device("cpu"))
