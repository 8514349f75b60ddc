"""The commands of docs/howto/one-gpu.md, run on tiny random models of the types that they name."""

import json
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    SiglipConfig,
    SiglipModel,
)

from instructblip.cli import main as cli
from instructblip.data.chat_format import read_chat_template
from instructblip.model.checkpoints.directory import read_config
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import load_recipe
from tests.data.test_chat_format import FORMATS, chat_tokenizer
from tests.model.test_parts import ENCODER, LANGUAGE
from tests.testing import wordpiece, write_json, write_picture, write_vqa

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "one-gpu.md"
WIDTH = {"hidden_size": 20, "intermediate_size": 26, "num_attention_heads": 2}
SIZE = {
    "combine": ["--queries=3", "--layers=2", "--width=20", "--heads=2", "--feed-forward=26"],
    "answer": ["--max-new-tokens=3", "--num-beams=1"],
}
TRAINING = ["training.steps=1", "training.batch_size=8", "training.workers=0"]
TRAINING += ["training.device=cpu", "data.max_instruction=40"]
EVALUATION = ["evaluation.validation=[]", "evaluation.benchmarks=[]"]
SETS = ("web_capfilt", "vqav2")


def write_siglip2(folder: Path) -> None:
    """As the Hub has SigLIP 2 of a fixed size: image and text model in SigLIP's directory."""
    text = {**ENCODER, "vocab_size": 40, "max_position_embeddings": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=ENCODER))
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {"size": {"height": 16, "width": 16}})


def write_dinov2(folder: Path) -> None:
    AutoModel.from_config(AutoConfig.for_model("dinov2", **ENCODER)).save_pretrained(folder)
    settings = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}
    write_json(folder / "preprocessor_config.json", settings)


def language_writer(kind: str, chat: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tokenizer = chat_tokenizer()
        tokenizer.chat_template = FORMATS[chat][0]
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
        values = {**LANGUAGE[kind], "vocab_size": len(tokenizer), **ends}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


def write_bert(folder: Path) -> None:
    words = wordpiece()
    config = BertConfig(vocab_size=len(words), num_hidden_layers=2, **WIDTH)
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)


HUB = {
    "google/siglip2-base-patch16-224": write_siglip2,
    "facebook/dinov2-base": write_dinov2,
    "Qwen/Qwen3-0.6B": language_writer("qwen3", "qwen3"),
    "HuggingFaceTB/SmolLM2-360M-Instruct": language_writer("llama", "smollm2"),
    "meta-llama/Llama-3.2-1B-Instruct": language_writer("llama", "llama-3"),
    "google-bert/bert-base-uncased": write_bert,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of ``HUB``, data/ with captions and questions, and photo.jpg."""
    folder = tmp_path_factory.mktemp("one_gpu")
    torch.manual_seed(0)
    for name, write in HUB.items():
        write(folder / "hub" / name)
    captions = [{"image": f"{i}.jpg", "caption": f"a red cat {i}"} for i in range(8)]
    data = folder / "data"
    write_json(data / "web_capfilt" / "annotations" / "web_capfilt.json", captions)
    for number, caption in enumerate(captions):
        write_picture(data / "web_capfilt" / "images" / caption["image"], seed=number)
    write_vqa(data / "vqav2", 8)
    write_picture(folder / "photo.jpg")
    return folder


def commands(pair: str) -> list[list[str]]:
    """Those of the page that name a pair and do more than predict, as words."""
    lines = re.findall(r"^instructblip (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    words = [shlex.split(line) for line in lines if pair in line]
    return [command for command in words if command[0] != "memory"]


def sized(words: list[str]) -> list[str]:
    """A command with settings that change nothing but how much there is."""
    if words[0] in SIZE:
        return [*words, *SIZE[words[0]]]
    sets = {name: {} for name in load_recipe(words[1]).data.sets if name in SETS}
    more = [*TRAINING, *EVALUATION, f"data.sets={json.dumps(sets)}"]
    return [*words[:2], *more, *words[2:]]


@pytest.mark.parametrize(
    ("pair", "language", "adapter"),
    [
        ("siglip2_qwen3", "qwen3", False),
        ("siglip2_smollm2", "llama", True),
        ("dinov2_llama3", "llama", False),
    ],
)
def test_the_commands_lead_from_captions_to_an_instructblip(
    pair: str,
    language: str,
    adapter: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: str(folder / "hub" / name)
    )
    monkeypatch.setattr(socket.socket, "connect", pytest.fail)
    monkeypatch.setattr("instructblip.training.log.draw_curves", lambda *_: None)
    monkeypatch.chdir(folder)
    for words in commands(pair):
        with pytest.raises(SystemExit) as stop:
            cli.main([*sized(words), "--debug"])
        assert not stop.value.code, words
    printed = capsys.readouterr().out
    assert f"language model  {language} " in printed
    assert printed.count("prompts and responses are in chat format") == 1, "in tuning alone"
    run, start = folder / "out" / pair, folder / "out" / f"{pair}_stage2"
    assert read_chat_template(run / "last") is not None
    assert read_config(run).instruction_aware
    assert not read_config(start).instruction_aware
    assert (run / "last" / "language_adapter").is_dir() == adapter
    tuned = InstructBlip.from_pretrained(run).state_dict()
    before = InstructBlip.from_pretrained(start, instruction_aware=True).state_dict()
    moved = {name for name, value in before.items() if not torch.equal(tuned[name], value)}
    assert any(name.startswith("qformer.") for name in moved)
    assert not [n for n in moved if n.startswith(("language_model.", "vision_model.encoder."))]
