"""How a decoder reads follows from a comparison with transformers, not from its name."""

import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from instructblip.model.checkpoints.weights import NoRandomWeights
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import build_language_model
from instructblip.model.language.fast import llama, probe
from instructblip.model.language.fast.attention import packs
from instructblip.model.language.fast.packing import Packing
from instructblip.model.language.fast.probe import Abilities, abilities_of
from tests.model.test_language import TEXT_CONFIGS, tiny_model
from tests.parity.tiny import DECODER, VOCAB, tiny_batch

LLAMA_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
ALL = Abilities(packed=True, fused=True, trees=True)
EXPECTED = {
    "llama": ALL,
    "qwen2": ALL,
    "qwen3": ALL,
    "gemma": ALL,
    "smollm3": ALL,
    "phi3": ALL,
    "mistral": ALL._replace(trees=False),  # a tree is longer than its window
    "gemma3": ALL._replace(trees=False),
    "opt": ALL._replace(fused=False),
    "gpt2": ALL._replace(fused=False),
    "phi": ALL._replace(fused=False),
    "bloom": Abilities(),
}


@pytest.fixture(autouse=True)
def fresh():
    """Results of other tests are not used, and those of this one are not kept."""
    probe._probe.cache_clear()
    yield
    probe._probe.cache_clear()


def build(language: str, **changes: Any) -> Any:
    return build_language_model({"vocab_size": VOCAB, **TEXT_CONFIGS[language], **changes})


def losses(model: InstructBlip) -> torch.Tensor:
    return model.loss(tiny_batch(model.config)).sample_losses


@pytest.mark.parametrize("language", EXPECTED)
def test_abilities(language: str):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(language)
    assert abilities_of(model) == EXPECTED[language]
    assert packs(model) == EXPECTED[language].packed
    reads_padded = [str(w.message) for w in caught if "padded rows" in str(w.message)]
    assert len(reads_padded) == (not EXPECTED[language].packed)


def test_layers_that_differ_stay_those_of_transformers(monkeypatch: pytest.MonkeyPatch):
    """Planted: a rotation that forgets the sine. Rows are still packed."""
    expected = losses(tiny_model("qwen3"))
    monkeypatch.setattr(llama, "_rotate", lambda states, cos, _: states * cos)
    probe._probe.cache_clear()
    model = tiny_model("qwen3")
    assert abilities_of(model.language_model) == ALL._replace(fused=False)
    torch.testing.assert_close(losses(model), expected, rtol=1e-5, atol=1e-5)


def test_packed_rows_that_differ_stay_padded(monkeypatch: pytest.MonkeyPatch):
    """Planted: all tokens of a packed row have the position 0."""
    expected = losses(tiny_model("qwen3"))
    plain = Packing.arguments

    def arguments(self: Packing) -> dict[str, Any]:
        return {**plain(self), "position_ids": torch.zeros_like(self.positions)}

    monkeypatch.setattr(Packing, "arguments", arguments)
    probe._probe.cache_clear()
    with pytest.warns(UserWarning, match=r"'qwen3' reads padded rows.*packed ones differ by"):
        model = tiny_model("qwen3")
    assert not packs(model.language_model)
    torch.testing.assert_close(losses(model), expected, rtol=1e-5, atol=1e-5)


def test_a_window_that_packed_attention_ignores_shows(monkeypatch: pytest.MonkeyPatch):
    """Planted: attention over packed rows without the window of Mistral."""
    plain = llama.AttentionInterface()["instructblip_packed"]

    def attend(*states: Any, **settings: Any) -> Any:
        return plain(*states, **{**settings, "sliding_window": None})

    monkeypatch.setitem(llama.AttentionInterface._global_mapping, "instructblip_packed", attend)
    with pytest.warns(UserWarning, match="'mistral' reads padded rows"):
        build("mistral")
    assert abilities_of(build("qwen3")) == ALL


def test_a_layer_of_another_kind_is_compared_too():
    """LFM 2 mixes neighbours in some of its layers, here in the sixth of seven."""
    kinds = ["full_attention"] * 5 + ["conv"] + ["full_attention"]
    with pytest.warns(UserWarning, match="'lfm2' reads padded rows"):
        build_language_model(
            {"model_type": "lfm2", **DECODER, "vocab_size": VOCAB}
            | {"num_hidden_layers": 7, "layer_types": kinds}
        )


def test_a_type_that_the_probe_does_not_fit_reads_padded_rows():
    with pytest.warns(UserWarning, match=r"'mamba' reads padded rows.*fail \(AttributeError"):
        build_language_model(
            {"model_type": "mamba", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1}
        )


def test_the_probe_is_small():
    config = probe._small(probe.AutoConfig.for_model(**LLAMA_13B))
    with torch.device("meta"):
        model = probe.AutoModelForCausalLM.from_config(config)
    assert len(model.model.layers) == 2
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_the_probe_does_not_depend_on_what_is_around_it():
    """Random numbers go on as without it; fake tensors, zeros and other devices do not reach it."""
    torch.manual_seed(0)
    first = build("qwen3").state_dict()
    torch.manual_seed(0)
    again = build("qwen3").state_dict()  # from the cache
    assert all(torch.equal(first[name], value) for name, value in again.items())
    for around in (FakeTensorMode(), NoRandomWeights(), torch.device("meta"), torch.no_grad()):
        probe._probe.cache_clear()
        with around:
            assert abilities_of(build("qwen3")) == ALL
