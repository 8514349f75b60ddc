"""Each fast twin in ``model/fast.py`` against the plain definition: results and gradients."""

import pytest
import torch
from torch import Tensor

from instructblip.model.config import VisionConfig
from instructblip.model.fast import PackedQFormer, encode_frozen
from instructblip.model.instructblip import InstructBlip
from instructblip.model.qformer import QFormer
from instructblip.model.vision import VisionModel
from tests.model.test_instructblip import tiny_model
from tests.parity.tiny import tiny_batch


@pytest.fixture
def model() -> InstructBlip:
    return tiny_model().eval()


def inputs_of(model: InstructBlip) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of a Q-Former; three instructions with padding ask two images."""
    batch = tiny_batch(model.config)
    queries = model.query_tokens.expand(3, -1, -1)
    features = model.vision_model.norm(model.features_of(batch))
    return queries, features, batch.qformer_ids, batch.qformer_mask, batch.image_index[:, 0]


def gradients(model: InstructBlip, output: Tensor) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    names, parameters = zip(*model.trainable_parameters(), strict=True)
    outer = torch.randn_like(output)
    values = torch.autograd.grad(output, parameters, outer, allow_unused=True, retain_graph=True)
    return dict(zip(names, values, strict=True))


def assert_same(model: InstructBlip, fast: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    expected = gradients(model, plain)
    for name, value in gradients(model, fast).items():
        other = expected[name]
        if value is None or other is None:  # the plain way also computes what nothing reads
            assert value is None
            assert other is None or not other.any(), name
            continue
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu"])
@pytest.mark.parametrize("chunk", [2, 64])
def test_frozen_encoder_equals_the_plain_one(activation: str, chunk: int):
    config = VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        hidden_act=activation,  # pyright: ignore[reportArgumentType]
        pre_layernorm=activation == "quick_gelu",
    )
    torch.manual_seed(0)
    vision, images = VisionModel(config), torch.randn(5, 3, 16, 16)
    plain, fast = vision.body(images), encode_frozen(vision, images, chunk)
    assert not fast.requires_grad
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    if chunk > len(images):
        assert torch.equal(fast, plain)


def test_folded_norm_equals_the_norm(model: InstructBlip):
    norm = model.vision_model.post_layernorm
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.normal_(norm.bias)
    queries, features, ids, mask, index = inputs_of(model)
    plain = model.qformer(queries, features, ids, mask, index)
    features = model.features_of(tiny_batch(model.config))
    assert not features.requires_grad
    assert_same(model, model.query_image(features, ids, mask, index), plain)
    with torch.no_grad():
        assert torch.equal(model.query_image(features, ids, mask, index), plain)


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_packed_qformer_equals_the_plain_one(
    padded: bool, aware: bool, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model(aware=aware).eval()
    queries, features, ids, mask, index = inputs_of(model)
    assert not mask.all()
    arguments = (queries, features, ids, mask if padded else None, index)
    fast = model.qformer(*arguments)
    monkeypatch.setattr(PackedQFormer, "hidden_states", QFormer.hidden_states)
    assert_same(model, fast, model.qformer(*arguments))


@pytest.mark.parametrize("causal_text", [True, False])
def test_packed_hidden_states_equal_the_plain_ones(
    model: InstructBlip, causal_text: bool, monkeypatch: pytest.MonkeyPatch
):
    queries, features, ids, mask, index = inputs_of(model)
    model.qformer.requires_grad_(True)  # the last text feed-forward has a reader here
    fast = model.qformer.hidden_states(queries, features, ids, mask, index, causal_text)
    monkeypatch.setattr(PackedQFormer, "hidden_states", QFormer.hidden_states)
    plain = model.qformer.hidden_states(queries, features, ids, mask, index, causal_text)
    assert plain[0] is not None
    assert fast[0] is not None
    assert_same(model, fast[0], plain[0])
    real = mask.bool()
    assert_same(model, fast[1][real], plain[1][real])


def test_packed_text_alone_equals_the_plain_one(
    model: InstructBlip, monkeypatch: pytest.MonkeyPatch
):
    _, _, ids, mask, _ = inputs_of(model)
    none, fast = model.qformer.hidden_states(None, None, ids, mask)
    monkeypatch.setattr(PackedQFormer, "hidden_states", QFormer.hidden_states)
    also_none, plain = model.qformer.hidden_states(None, None, ids, mask)
    assert none is also_none is None
    assert_same(model, fast[mask.bool()], plain[mask.bool()])
