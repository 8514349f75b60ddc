"""A model that answers, in fewer bits, on several devices or on disk: the same answers.

There is one device here. The second is emulated (`Elsewhere`): its tensors say that they are on
``cuda:1`` and do not mix with others, and their numbers are computed on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import StaticCache

from instructblip.core import distributed
from instructblip.model import spread
from instructblip.model.config import InstructBlipConfig
from instructblip.model.decoding import GREEDY, Decoding
from instructblip.model.inference import generate_responses, rank_candidates
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language import generate
from instructblip.model.language.quantize import QuantizedLinear
from instructblip.model.placement import Placement, check_placement, spread_layers
from instructblip.model.spread import Footprint, language_layers, place
from tests.model.test_lora import adapted
from tests.parity.tiny import tiny_batch, tiny_config, tiny_transformers

LANGUAGES = ["llama", "opt", "t5"]
CPU, OTHER = torch.device("cpu"), torch.device("cuda", 1)
CANDIDATES = [[5, 6, 2], [5, 7, 8, 2], [9, 2]]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("starts")
    for language in LANGUAGES:
        tiny_transformers(language).save_pretrained(root / language)
    return root


def stored(directory: Path) -> InstructBlip:
    return InstructBlip.from_pretrained(directory, as_stored=True)


def answers(model: InstructBlip) -> tuple[list[Any], list[float]]:
    """Greedy answers, those of three beams, and log-likelihoods, of a batch."""
    batch = tiny_batch(model.config)
    beams = Decoding(num_beams=3, max_new_tokens=5, min_new_tokens=3)
    greedy = GREEDY.override(max_new_tokens=6, min_new_tokens=4)
    ids = [generate_responses(model, batch, decoding=each) for each in (greedy, beams)]
    scores = rank_candidates(model, batch, [CANDIDATES] * len(batch))
    return ids, torch.cat(scores).tolist()


@pytest.mark.parametrize("language", LANGUAGES)
def test_nf4_answers_are_those_of_the_weights_that_it_stands_for(
    language: str, starts: Path
) -> None:
    quantized = place(stored(starts / language), Placement(quantize="nf4"), "cpu")
    twin = InstructBlip.from_pretrained(starts / language)
    exact = answers(twin)
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    for name, module in quantized.language_model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = twin.language_model.get_submodule(name).weight
            weight.data = module.dequantized(torch.float32)
    assert len(layers) >= 12
    assert answers(quantized) == answers(twin)
    assert answers(quantized) != exact


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_from_disk_are_bit_equal(language: str, starts: Path) -> None:
    plain = InstructBlip.from_pretrained(starts / language)
    expected = answers(plain)
    model = place(stored(starts / language), Placement(devices="disk"), "cpu")
    places = [p.data_ptr() for p in model.parameters()]
    assert answers(model) == expected
    assert [p.data_ptr() for p in model.parameters()] == places, "copies are gone"


def test_a_layer_from_disk_has_its_adapter_and_its_type(starts: Path, tmp_path: Path) -> None:
    model = adapted(InstructBlip.from_pretrained(starts / "llama"))
    model.to_training_dtypes(frozen_dtype=torch.bfloat16).save_pretrained(tmp_path)
    reference = place(stored(tmp_path), Placement(), "cpu")
    assert answers(reference) == answers(InstructBlip.from_pretrained(tmp_path))
    disk = place(stored(tmp_path), Placement(devices="disk"), "cpu")
    assert next(disk.language_model.model.layers[0].parameters()).dtype == torch.bfloat16
    assert answers(disk) == answers(reference)


class Elsewhere(Tensor):
    """A tensor that says it is on another device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=CPU
        )
        made.inner = inner
        return made

    device = property(lambda self: OTHER)  # type: ignore[assignment]

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:  # type: ignore[override]
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        inner = self.inner if dtype is None else self.inner.to(dtype)
        if device == CPU:
            return inner.clone()
        return Elsewhere(inner.clone()) if copy or inner is not self.inner else self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation whose result is where its inputs are; inputs of two devices are an error."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in leaves if isinstance(x, Elsewhere)]
    moves = kwargs.get("device") == OTHER
    if there and any(x.dim() for x in leaves if not isinstance(x, Elsewhere)):
        raise RuntimeError(f"{func}: tensors on two devices")
    if not there and not moves:
        return func(*args, **kwargs)
    known = {id(x.inner): x for x in there}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    if moves:
        kwargs["device"] = CPU
    result = func(*args, **kwargs)
    return tree_map(
        lambda x: known.get(id(x)) or Elsewhere(x) if isinstance(x, Tensor) else x, result
    )


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.tensor

    def tensor(data: Any, device: Any = None, **settings: Any) -> Tensor:
        made = make(data, **settings)
        return Elsewhere(made) if device == OTHER else made

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    resolve = distributed.resolve_device
    monkeypatch.setattr(
        distributed, "resolve_device", lambda name: OTHER if name == "cuda:1" else resolve(name)
    )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_layers_on_two_devices_give_the_same_answers(
    language: str,
    quantize: Any,
    starts: Path,
    two_devices: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = Footprint.of(stored(starts / language), torch.float32, quantize)
    half = sum(size + needed.cache for size in needed.layers) * 3 // 4
    free = {CPU: needed.fixed + half, OTHER: half}
    monkeypatch.setattr(spread, "free_bytes", free.__getitem__)
    alone = Placement(devices="cpu", quantize=quantize)
    expected = answers(place(stored(starts / language), alone))
    with TwoDevices():
        placement = Placement(devices="cpu,cuda:1", quantize=quantize)
        model = place(stored(starts / language), placement)
        layers = language_layers(model.language_model).values()
        on = [{t.device for t in layer.parameters()} for layer in layers]
        assert on == sorted(on, key=lambda devices: OTHER in devices), "each device is passed once"
        assert [CPU] in map(list, on)
        assert [OTHER] in map(list, on)
        ids, scores = answers(model)
    assert ids == expected[0]
    assert scores == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize("language", ["llama", "opt"])
def test_a_static_cache_gives_the_same_answers(
    language: str, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = InstructBlip.from_pretrained(starts / language)
    expected = answers(model)
    made: list[Any] = []
    create = StaticCache.__init__

    def count(self: Any, *settings: Any, **more: Any) -> None:
        made.append(self)
        create(self, *settings, **more)

    monkeypatch.setattr(StaticCache, "__init__", count)
    assert answers(model) == expected
    assert not made
    monkeypatch.setattr(generate, "STATIC_DEVICES", ("cpu",))
    ids, scores = answers(model)
    assert len(made) == 1, "greedy answers; beams share their prompt in a cache that grows"
    assert (ids, scores) == expected


@pytest.mark.parametrize(
    ("rooms", "places"),
    [
        ([1000], [0, 0, 0, 0]),
        ([1000, 1000], [0, 0, 1, 1]),
        ([160, 1000], [1, 1, 1, 1]),
        ([160, 120, 120], [0, 1, 2, 3]),
        ([], [0, 0, 0, 0]),
    ],
)
def test_layers_fill_the_devices_to_the_same_share(rooms: list[int], places: list[int]) -> None:
    assert spread_layers(40, [100, 100, 100, 100], rooms) == places


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4", None])
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_plan_knows_the_bytes_of_a_placed_model(language: str, kind: Any, starts: Path) -> None:
    planned = Footprint.of(stored(starts / language), torch.bfloat16, kind)
    model = place(stored(starts / language), Placement(quantize=kind), "cpu", torch.bfloat16)
    codes = [
        b for m in model.modules() if isinstance(m, QuantizedLinear) for b in (m.codes, m.scale)
    ]
    held = sum(t.nbytes for t in (*model.parameters(), *codes))
    assert planned.fixed + sum(planned.layers) == held
    if kind is None:
        layers = language_layers(model.language_model).values()
        assert planned.layers == [sum(p.nbytes for p in layer.parameters()) for layer in layers]


def test_auto_takes_what_a_model_needs(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device if it fits, else on all GPUs, then on the CPU and at last on disk."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    needed = Footprint(fixed=100, layers=[60, 60], cache=40)
    monkeypatch.setattr(Footprint, "of", lambda *_: needed)
    model = stored(starts / "llama")

    def plan(gpu: int, host: int, kind: Any = None) -> tuple[list[str], int]:
        free = {"cuda": gpu, "cpu": host}
        monkeypatch.setattr(spread, "free_bytes", lambda device: free[device.type])
        home = torch.device("cuda", 0)
        settings = (model, Placement(quantize=kind), home, torch.float32, Decoding())
        devices, disk = spread._plan(*settings)
        return [str(device) for device in devices.values()], len(disk)

    assert plan(300, 0) == (["cuda:0", "cuda:0"], 0)
    assert plan(200, 0) == (["cuda:0", "cuda:1"], 0)
    assert plan(100, 100) == (["cuda:1", "cpu"], 0)
    with pytest.warns(UserWarning, match=r"needs .* GiB.*: 1 of 2 layers .* read from disk"):
        assert plan(100, 0) == (["cuda:1", "cuda:0"], 1)
    with pytest.raises(ValueError, match="take more devices, or disk at the end without quantize"):
        plan(10, 10, "nf4")


MEASURE = """
import json, sys, torch
from instructblip.model.instructblip import InstructBlip
from instructblip.model.placement import Placement
from instructblip.model.spread import language_layers, place
from tests.model.test_spread import anonymous_bytes, answers

before = anonymous_bytes()
model = InstructBlip.from_pretrained(sys.argv[1], as_stored=True)
place(model, Placement(devices=sys.argv[2]), "cpu")
seen = []
for layer in language_layers(model.language_model).values():
    layer.mlp.register_forward_hook(lambda *call: seen.append(anonymous_bytes()))
ids, scores = answers(model)
print(json.dumps({"bytes": max(seen) - before, "ids": ids, "scores": scores}))
"""


def anonymous_bytes() -> int:
    """Memory of this process that the kernel cannot take back; mapped files are not in it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_on_disk_holds_less_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    torch.manual_seed(0)
    values = {"model_type": "instructblip", **tiny_config("llama", **sizes)}
    model = InstructBlip(InstructBlipConfig.from_transformers(values))
    model.save_pretrained(tmp_path)
    layers = sum(p.nbytes for p in model.language_model.model.layers.parameters())

    def measure(devices: str) -> dict[str, Any]:
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), devices],
            env={**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    memory, disk = measure("cpu"), measure("disk")
    assert disk["ids"] == memory["ids"]
    assert disk["scores"] == memory["scores"]
    assert memory["bytes"] - disk["bytes"] > 0.7 * layers, (memory["bytes"], disk["bytes"], layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": "gpu"}, "devices must be auto, disk, or devices with commas.*got 'gpu'"),
        ({"devices": "disk,cpu"}, "devices must be auto"),
        ({"quantize": "int4"}, "quantize must be int8, fp8 or nf4; got 'int4'"),
        ({"devices": "cpu,disk", "quantize": "nf4"}, "leave out quantize=nf4, or disk"),
    ],
)
def test_settings_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_placement(**settings)


def test_answering_takes_apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread.answering_device() == "auto"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert spread.answering_device() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert spread.answering_device() == "auto"
