"""The plug-in for vLLM: over stand-ins of vLLM's interfaces, and in vLLM itself where installed."""

import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import instructblip.integrations.vllm as plugin
from instructblip.data.templates import Rendered
from instructblip.inference.engine import Engine
from instructblip.model import config as sizes
from instructblip.model.checkpoints.weights import read_weights
from instructblip.model.decoding import GREEDY
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import build_language_model
from instructblip.model.lora import FOLDERS
from tests.parity.tiny import tiny_config
from tests.testing import byte_level, llama_like, write_model, write_picture

IN_VLLM = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
from instructblip.integrations.vllm import register

register()
model, requests, out = sys.argv[1:]
requests = json.load(open(requests))
llm = LLM(
    model, dtype="float32", enforce_eager=True, max_model_len=400, limit_mm_per_prompt={"image": 2}
)


def answer():
    given = [
        {"prompt": text, "multi_modal_data": {"image": [Image.open(path) for path in images]}}
        for images, text in requests
    ]
    outputs = llm.generate(given, SamplingParams(temperature=0, max_tokens=12))
    return [list(output.outputs[0].token_ids) for output in outputs]


json.dump([answer(), answer()], open(out, "w"))
"""
MODEL = "instructblip.integrations.vllm.model"
PLACE = 271
TEXTS = ["Question: what is red? Short answer:", "A red cat.", "what is the cat?"]
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


@dataclass(frozen=True)
class Inputs:
    """vLLM's ProcessorInputs, as far as the plug-in reads them."""

    prompt: list[int]
    mm_data_items: Any
    hf_processor_mm_kwargs: dict[str, Any] = field(default_factory=dict)


class Base:
    """A stand-in for a base class of vLLM."""

    def __init__(self, given: Any = None) -> None:
        self.info = self.model_id = given

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def apply(self, inputs: Inputs, timing_ctx: Any) -> Inputs:
        return inputs


class Loader:
    """vLLM's AutoWeightsLoader: sets parameters by name and refuses other names."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = dict(model.named_parameters())

    def load_weights(self, weights: Any) -> set[str]:
        read = set()
        for name, value in weights:
            self.parameters[name].data.copy_(value)
            read.add(name)
        return read


class Parts:
    """What vLLM's SupportsMultiModal adds to a model."""

    configure_mm_token_handling = staticmethod(lambda vocab_size, mm_token_ids: None)

    def _mark_language_model(self, *_: Any) -> Any:
        return torch.no_grad()

    _mark_tower_model = _mark_language_model


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the plug-in with the model, over stand-ins."""

    def build(*, vllm_config: Any, hf_config: Any, prefix: str) -> Any:
        assert prefix == "language_model"
        model = build_language_model(vllm_config.language)
        model.make_empty_intermediate_tensors = None
        return model

    utils = {
        "AutoWeightsLoader": Loader,
        "init_vllm_registered_model": build,
        "maybe_prefix": lambda prefix, name: name,
    }
    registry = SimpleNamespace(register_processor=lambda *_, **__: lambda cls: cls)
    fields = SimpleNamespace(batched=lambda modality: ("batched", modality))
    bases = ("BaseDummyInputsBuilder", "BaseMultiModalProcessor", "BaseProcessingInfo")
    stand_ins: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"VllmConfig": Any},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.interfaces": {"SupportsMultiModal": Parts, "SupportsPP": Base},
        "vllm.model_executor.models.utils": utils,
        "vllm.multimodal": {"MULTIMODAL_REGISTRY": registry},
        "vllm.multimodal.inputs": {"MultiModalFieldConfig": fields},
        "vllm.multimodal.processing": {
            **{name: type(name, (Base,), {}) for name in bases},
            "PromptReplacement": lambda *given: given,
        },
    }
    for name, values in stand_ins.items():
        stand_in = ModuleType(name)
        vars(stand_in).update(values)
        monkeypatch.setitem(sys.modules, name, stand_in)
    sys.modules.pop(MODEL, None)
    yield importlib.import_module(MODEL)
    del sys.modules[MODEL]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "instructblip", rows=PLACE + 1)


def processor_of(module: Any, folder: Path) -> Any:
    return module.Processor(module.ProcessingInfo(str(folder)))


def inputs_of(engine: Engine, text: str, count: int = 1, **settings: Any) -> Inputs:
    """A request as vLLM has it: the ids of its tokenizer, and so many images."""
    ids = list(engine.tokens.language(text)["input_ids"])
    return Inputs(ids, SimpleNamespace(get_all_counts=lambda: {"image": count}), settings)


def load(module: Any, folder: Path) -> Any:
    """The plug-in's model with the weights of ``folder``, each of which it must take."""
    values = json.loads((folder / "config.json").read_text())
    config = sizes.InstructBlipConfig.from_transformers(values)
    text_config = SimpleNamespace(
        hidden_size=config.language["hidden_size"], vocab_size=config.language["vocab_size"]
    )
    model_config = SimpleNamespace(
        model=str(folder), hf_config=SimpleNamespace(text_config=text_config)
    )
    given = SimpleNamespace(model_config=model_config, language=config.language)
    model = module.InstructBlipForVllm(vllm_config=given).eval()
    stored = read_weights(folder)
    assert model.load_weights(stored.items()) == set(stored) == set(dict(model.named_parameters()))
    return model


def test_vllm_is_pointed_at_the_class(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    entry = project["project"]["entry-points"]["vllm.general_plugins"]["instructblip"]
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    pkgutil.resolve_name(entry)()
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    assert registered == {architecture: f"{MODEL}:InstructBlipForVllm"}


def test_registering_imports_no_torch() -> None:
    code = f"import sys, {plugin.__name__}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "count"),
    [(TEXTS[0], 1), (TEXTS[1], 2), ("Is <image> the <image> red?", 3), ("red " * 140, 1)],
)
def test_a_prompt_has_the_ids_of_the_engine(
    module: Any, folder: Path, text: str, count: int
) -> None:
    engine = Engine.from_pretrained(folder, device="cpu")
    processor = processor_of(module, folder)
    got = processor.apply(inputs_of(engine, text, count), None)
    expected = engine.sample(("",) * count, (torch.zeros(3, 16, 16),) * count, text)
    places = [i for i, token in enumerate(got.prompt) if token == PLACE]
    assert [i for i in got.prompt if i != PLACE] == expected.prompt_ids
    assert [i - k for k, i in enumerate(places)] == list(expected.image_places or (0,) * count)
    queries = [PLACE] * engine.model.config.num_query_tokens
    assert processor._get_prompt_updates(None, {}, None) == [("image", [PLACE], queries)]


@pytest.mark.parametrize("text", [*TEXTS, "a , b .  two spaces ?", "? it's . "])
def test_a_text_is_read_back_from_its_tokens(module: Any, folder: Path, text: str) -> None:
    for tokenizer in (byte_level(), llama_like()):
        tokenizer.save_pretrained(folder)
        engine = Engine.from_pretrained(folder, device="cpu")
        processor = processor_of(module, folder)
        if "'" in text and tokenizer.unk_token:
            with pytest.raises(ValueError, match="the prompt has <unk>; expected plain text"):
                processor.apply(inputs_of(engine, text), None)
        else:
            got = processor.apply(inputs_of(engine, text), None)
            assert got.hf_processor_mm_kwargs["instruction"] == text


def test_the_instruction_is_part_of_what_vllm_hashes(module: Any, folder: Path) -> None:
    engine = Engine.from_pretrained(folder, device="cpu")
    processor = processor_of(module, folder)
    for text in TEXTS:
        got = processor.apply(inputs_of(engine, text), None)
        assert got.hf_processor_mm_kwargs == {"instruction": text}
        again = processor.apply(inputs_of(engine, "is it?", instruction=text), None)
        assert (again.prompt, again.hf_processor_mm_kwargs) == (
            got.prompt,
            got.hf_processor_mm_kwargs,
        )


def test_queries_are_those_of_the_engine(module: Any, folder: Path, tmp_path: Path) -> None:
    """Two images under three instructions of different lengths, in one call of the model."""
    engine = Engine.from_pretrained(folder, device="cpu")
    processor, model = processor_of(module, folder), load(module, folder)
    images = [write_picture(tmp_path / f"{i}.png", seed=i) for i in range(2)]
    pairs = [(image, text) for image in images for text in TEXTS]
    data = [
        processor._call_hf_processor({"images": [Image.open(image)]}, {"instruction": text})
        for image, text in pairs
    ]
    with torch.inference_mode():
        got = model.embed_multimodal(
            pixel_values=torch.cat([each["pixel_values"] for each in data]),
            qformer_input_ids=[each["qformer_input_ids"][0] for each in data],
        )
        expected = [
            engine.model.encode_queries(engine._collate(engine.samples(image, text)))[0]
            for image, text in pairs
        ]
    for ours, theirs in zip(expected, got, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 1e-3


def test_a_chat_model_gets_its_format_from_the_plain_text(module: Any, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(folder)
    (folder / "chat_format.json").write_text(json.dumps({"chat_template": CHAT}))
    engine = Engine.from_pretrained(folder, device="cpu")
    processor = processor_of(module, folder)
    got = processor.apply(inputs_of(engine, TEXTS[0]), None)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert got.prompt[:2] == [user, PLACE]
    with pytest.raises(ValueError, match=r"the prompt has <\|user\|>; expected plain text"):
        processor.apply(inputs_of(engine, f"<|user|>{TEXTS[0]}"), None)


def test_what_vllm_would_answer_wrongly_is_refused(module: Any, folder: Path) -> None:
    engine = Engine.from_pretrained(folder, device="cpu")
    processor = processor_of(module, folder)
    with pytest.raises(ValueError, match="instruction must be a text; got 3"):
        processor.apply(inputs_of(engine, "", instruction=3), None)
    with pytest.raises(ValueError, match="2 <image> and there are 1 images"):
        processor.apply(inputs_of(engine, "<image> or <image>?"), None)
    with pytest.raises(ValueError, match="got an image as list"):
        processor._call_hf_processor({"images": [[0]]}, {"instruction": ""})
    with pytest.raises(FileNotFoundError, match="OWNER/NAME is no local directory"):
        module.read_config("OWNER/NAME")
    adapter = folder / FOLDERS["lora"]
    adapter.mkdir()
    with pytest.raises(ValueError, match="has an adapter, which vLLM would leave out"):
        module.read_config(str(folder))
    adapter.rmdir()
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if "image_token" not in name}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no image_token_index"):
        module.read_config(str(folder))
    config["text_config"] = {"model_type": "t5"}
    config.pop("use_decoder_only_language_model", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has an encoder-decoder as its language model"):
        _ = module.ProcessingInfo(str(folder)).tokens


@pytest.fixture(params=["llama", "opt"])
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An InstructBLIP whose heads have a width that vLLM's attention takes on a CPU."""
    folder = tmp_path / "decoder"
    if request.param == "llama":
        model = InstructBlip.from_pretrained("starter", instruction_aware=True)
        model.save_pretrained(folder)
        return folder
    write_model(folder, "instructblip", rows=PLACE + 1)
    wide = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 2}
    config = tiny_config("opt", vocab_size=PLACE + 1, eos_token_id=259, **wide)
    config |= {"image_token_index": PLACE}
    config["text_config"] |= {"max_position_embeddings": 512}
    config["qformer_config"] |= {"vocab_size": 90, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = InstructBlipForConditionalGeneration(InstructBlipConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_like_the_engine(decoder: Path, tmp_path: Path) -> None:
    """Greedy token ids, with all instructions about an image in one batch, and again with what
    vLLM then has in its caches. Under the first instruction alone they are others."""
    images = [str(write_picture(tmp_path / f"{i}.png", (64, 48), seed=i)) for i in range(2)]
    texts = [*TEXTS, "A short image description."]
    requests = [([image], text) for image in images for text in texts]
    requests += [
        (images, texts[0]),
        (images, "Is <image> like <image>?"),
        (images[:1], "red " * 200),
    ]
    engine = Engine.from_pretrained(decoder, device="cpu")
    samples = [engine.samples([frames], text)[0] for frames, text in requests]
    greedy = GREEDY.override(max_new_tokens=12)
    expected = [engine.respond([sample], greedy)[0] for sample in samples]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    subprocess.run(
        [sys.executable, "-c", IN_VLLM, decoder, tmp_path / "requests.json", tmp_path / "out.json"],
        env={**os.environ, **settings, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    for answers in json.loads((tmp_path / "out.json").read_text()):
        ended = [ids[:-1] if ids[-1] == engine.tokens.eos_id else ids for ids in answers]
        assert ended == [list(ids) for ids in expected]
    confused = [engine.samples([f], [Rendered(texts[0], text)])[0] for f, text in requests]
    assert [engine.respond([sample], greedy)[0] for sample in confused] != expected
