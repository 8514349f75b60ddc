"""One packed row gives the losses and gradients of padded rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers.models.t5.modeling_t5 import T5Attention

from instructblip.core.batch import Batch
from instructblip.model.fast import Rows
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.fast import attention, head
from instructblip.model.language.fast.attention import ATTENTION, packs
from instructblip.model.language.fast.packing import Packing
from tests.model.test_activations import gradients
from tests.model.test_language import tiny_model
from tests.parity.tiny import FAMILIES, padded, tiny_batch


def test_slots_index_and_positions_agree():
    packed = Packing.of(torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool())
    assert packed.slots.tolist() == [0, 1, 3, 6, 7, 8]
    assert packed.positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert packed.lengths == [2, 1, 3]
    states = torch.arange(6.0).view(1, 1, 6, 1)
    rows = packed.unpack(states)
    assert rows[:, 0, :, 0].tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5]]
    assert torch.equal(packed.pack(rows.transpose(1, 2)), states.transpose(1, 2))


def test_wrong_shapes_are_caught():
    """Every test run compares annotated shapes with tensors (tests/__init__.py)."""
    packed = Packing.of(torch.ones(2, 3).bool())
    with pytest.raises(TypeCheckError):
        replace(packed, positions=packed.positions[:, 1:])
    with pytest.raises(TypeCheckError):
        head.token_losses(torch.nn.Linear(4, 9), torch.zeros(3, 4), torch.zeros(2).long())


@pytest.mark.parametrize(
    ("devices", "dtypes"), [((), ()), (("cpu",), ()), (("cpu",), (torch.float32,))]
)
@pytest.mark.parametrize(
    "language", ["llama", "opt", "gpt2", "qwen2", "t5", "t5-scaled", *FAMILIES]
)
def test_packed_equals_padded(
    language: str,
    devices: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(attention, "ONE_BY_ONE", devices)
    monkeypatch.setattr(attention, "PRODUCT_DTYPES", dtypes)
    model = tiny_model(language)
    if language == "t5":  # the table of relative positions gets a gradient too
        model.set_trainable(("qformer", "language_model"))
    batch = tiny_batch(model.config)
    assert packs(model.language_model)
    joined = model.language.join(model.encode_queries(batch), batch)
    assert joined.packing is not None
    slots = joined.packing.index.numel()
    assert joined.inputs_embeds.shape[1] < slots  # there is padding to save
    packed, packed_gradients = model.loss(batch), gradients(model, batch)
    model.language_model.set_attn_implementation("sdpa")
    assert not packs(model.language_model)
    padded = model.loss(batch)
    torch.testing.assert_close(packed.sample_losses, padded.sample_losses, rtol=1e-5, atol=1e-5)
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(packed_gradients[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_last_token_of_a_row_is_not_read(packed: bool):
    """It is predicted, and predicts nothing."""
    model = tiny_model("llama")
    if not packed:
        model.language_model.set_attn_implementation("sdpa")
    batch = ragged(4, 5, 3, seed=0)
    joined = model.language.join(model.encode_queries(batch), batch)
    text = batch.prompt_mask.sum(1) + batch.response_mask.sum(1)
    lengths = model.config.num_query_tokens + text - 1
    if packed:
        assert joined.packing is not None
        assert joined.packing.lengths == lengths.tolist()
    else:
        assert joined.attention_mask is not None
        assert joined.attention_mask.sum(1).tolist() == lengths.tolist()
        assert joined.inputs_embeds.shape[1] == lengths.max()
    assert len(joined.targets) == batch.num_response_tokens


def ragged(samples: int, prompt: int, response: int, seed: int) -> Batch:
    """A batch of rows of random lengths; the first row has the greatest."""
    generator = torch.Generator().manual_seed(seed)

    def rows(name: str, longest: int) -> dict[str, Any]:
        lengths = torch.randint(1, longest + 1, (samples,), generator=generator)
        lengths[0] = longest
        ids = [torch.randint(4, 30, (int(n),), generator=generator).tolist() for n in lengths]
        return padded(name, ids)

    return Batch(
        pixel_values=torch.randn(samples, 3, 16, 16, generator=generator),
        image_index=torch.arange(samples)[:, None],
        **rows("qformer", 6),
        **rows("prompt", prompt),
        **rows("response", response),
    )


@pytest.mark.parametrize("devices", [(), ("cpu",)])
@pytest.mark.parametrize(
    ("samples", "prompt", "response"), [(6, 150, 40), (4, 20, 1), (1, 9, 5), (1, 1, 1)]
)
def test_t5_packed_equals_padded(
    samples: int,
    prompt: int,
    response: int,
    devices: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    """Long prompts reach all distances of T5; the Q-Former gets the gradients of padded rows."""
    monkeypatch.setattr(attention, "ONE_BY_ONE", devices)
    model = tiny_model("t5").double()  # rounding is far below the tolerance
    batch = ragged(samples, prompt, response, seed=samples)
    assert batch.pixel_values is not None
    batch = replace(batch, pixel_values=batch.pixel_values.double())
    joined = model.language.join(model.encode_queries(batch), batch)
    queries = model.config.num_query_tokens
    assert joined.inputs_embeds.shape[1] == samples * queries + int(batch.prompt_mask.sum())
    assert joined.decoder_ids is not None
    assert joined.decoder_ids.shape == (1, int(batch.response_mask.sum()))
    packed, packed_gradients = model.loss(batch), gradients(model, batch)
    model.language_model.set_attn_implementation("sdpa")
    padded_loss = model.loss(batch)
    torch.testing.assert_close(
        packed.sample_losses, padded_loss.sample_losses, rtol=1e-5, atol=1e-5
    )
    expected = gradients(model, batch)
    assert expected["query_tokens"].abs().max() > 1e-4
    for name, value in expected.items():
        torch.testing.assert_close(packed_gradients[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 3, 4]])
def test_rows_of_the_same_length_are_attended_to_together(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
):
    """With a bias, as T5's: the result is that of each row alone."""
    module: Any = torch.nn.Module().eval()
    module.is_causal = False
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 8)
    bias = torch.randn(1, 2, 4, 4)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    calls: list[int] = []
    plain = attention.sdpa_attention_forward

    def count(*args: Any, **settings: Any) -> Any:
        calls.append(len(args[1]))
        return plain(*args, **settings)

    monkeypatch.setattr(attention, "sdpa_attention_forward", count)
    rows: Any = {"packing": Packing.of(mask), "position_bias": bias}
    attend: Any = attention.attend
    context, _ = attend(module, query, key, value, None, **rows)
    assert calls == ([3] if lengths == [4, 4, 4] else [1, 1, 1])
    parts = zip(*(states.split(lengths, 2) for states in (query, key, value)), lengths, strict=True)
    alone = [plain(module, q, k, v, bias[..., :n, :n])[0] for q, k, v, n in parts]
    torch.testing.assert_close(context, torch.cat(alone, 1))


def test_t5_computes_its_bias_for_one_sample(monkeypatch: pytest.MonkeyPatch):
    """Not for all pairs of columns of the packed row."""
    model = tiny_model("t5")
    batch = ragged(5, 12, 7, seed=0)
    made = []
    original = T5Attention.compute_bias

    def compute_bias(self: T5Attention, rows: int, columns: int, **settings: Any):
        made.append((rows, columns))
        return original(self, rows, columns, **settings)

    monkeypatch.setattr(T5Attention, "compute_bias", compute_bias)
    model.loss(batch)
    longest = model.config.num_query_tokens + 12
    assert made == [(longest, longest), (7, 7)]


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
    expected = gradients(model, batch)
    for name, value in gradients(model, longer).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_other_decoders_keep_padded_rows():
    with pytest.warns(UserWarning, match="'bloom' reads padded rows.*fail"):
        model = tiny_model("bloom")
    assert model.language_model.config._attn_implementation != ATTENTION
    batch = tiny_batch(model.config)
    assert model.language.join(model.encode_queries(batch), batch).packing is None


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_frozen_head_gives_the_gradients_of_a_trainable_one(
    language: str, monkeypatch: pytest.MonkeyPatch
):
    """The backward pass of the frozen head equals autograd's, in one chunk and in several."""

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
