"""One packed row gives the losses and gradients of padded rows."""

from dataclasses import replace

import pytest
import torch

from instructblip.model import head, packing
from instructblip.model.instructblip import InstructBlip
from instructblip.model.packing import ATTENTION, Packing, packs
from instructblip.model.qformer import Rows
from tests.model.test_activations import gradients
from tests.model.test_language import tiny_model
from tests.parity.tiny import tiny_batch


def test_slots_tokens_and_positions_name_each_other():
    packed = Packing.of(torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool())
    assert packed.slots.tolist() == [0, 1, 3, 6, 7, 8]
    assert packed.positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert packed.lengths == [2, 1, 3]
    states = torch.arange(6.0).view(1, 1, 6, 1)
    rows = packed.unpack(states)
    assert rows[:, 0, :, 0].tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5]]
    assert torch.equal(packed.pack(rows.transpose(1, 2)), states.transpose(1, 2))


@pytest.mark.parametrize("devices", [(), ("cpu",)])
@pytest.mark.parametrize("language", ["llama", "opt", "gpt2", "qwen2"])
def test_packed_equals_padded(
    language: str, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packing, "ONE_BY_ONE", devices)
    model = tiny_model(language)
    batch = tiny_batch(model.config)
    assert packs(model.language_model)
    joined = model.language.join(model.encode_queries(batch), batch)
    assert joined.packing is not None
    slots = joined.packing.index.numel()
    assert joined.inputs_embeds.shape[1] < slots  # there was padding to be saved
    packed, slopes = model.loss(batch), gradients(model, batch)
    model.language_model.set_attn_implementation("sdpa")
    assert not packs(model.language_model)
    padded = model.loss(batch)
    torch.testing.assert_close(packed.sample_losses, padded.sample_losses, rtol=1e-5, atol=1e-5)
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(slopes[name], value, rtol=1e-4, atol=1e-5)


def test_rows_of_the_qformer_name_their_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows = Rows.of(torch.zeros(2, 4, 1), 1, mask)
    assert rows.slots.tolist() == [0, 4, 1, 2, 5]  # both queries, then three words
    tokens = torch.arange(5.0)[:, None]
    assert rows.unpack(tokens)[..., 0].tolist() == [[0, 2, 3, 0], [1, 4, 0, 0]]
    assert torch.equal(rows.pack(rows.unpack(tokens)), tokens)
    assert Rows.of(torch.zeros(2, 4, 1), 1, None).slots.tolist() == [0, 4, 1, 2, 3, 5, 6, 7]


def test_padding_of_the_instruction_changes_nothing():
    model = tiny_model("llama")
    batch = tiny_batch(model.config)
    more = 5
    longer = replace(
        batch,
        qformer_ids=torch.cat([batch.qformer_ids, batch.qformer_ids[:, :more]], 1),
        qformer_mask=torch.cat([batch.qformer_mask, batch.qformer_mask.new_zeros(3, more)], 1),
    )
    slopes = gradients(model, batch)
    for name, value in gradients(model, longer).items():
        torch.testing.assert_close(value, slopes[name], rtol=1e-4, atol=1e-6)


def test_other_decoders_keep_padded_rows():
    model = tiny_model("bloom")
    assert model.language_model.config._attn_implementation != ATTENTION
    batch = tiny_batch(model.config)
    assert model.language.join(model.encode_queries(batch), batch).packing is None


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_frozen_head_has_the_slopes_of_a_trained_one(
    language: str, monkeypatch: pytest.MonkeyPatch
):
    """The frozen head brings its own backward pass; in chunks or at once it is autograd's."""

    def of(model: InstructBlip) -> dict[str, torch.Tensor]:
        return gradients(model, tiny_batch(model.config))

    frozen = tiny_model(language)
    trained = tiny_model(language)
    trained.language_model.get_output_embeddings().requires_grad_(True)
    expected = of(trained)
    for chunk in (1024, 2):
        monkeypatch.setattr(head, "LOSS_CHUNK", chunk)
        for name, value in of(frozen).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
