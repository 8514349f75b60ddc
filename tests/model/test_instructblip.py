"""What trains, what stays frozen, how images and frames reach the language model."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from pydantic import ValidationError
from transformers import InstructBlipConfig as TheirConfig

from instructblip.model.config import InstructBlipConfig, LoraConfig, VisionConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.lora import add_lora
from instructblip.model.trainable import ALIASES, PARTS, part_of
from tests.parity.tiny import tiny_batch, tiny_config, tiny_transformers


def tiny_model(language="llama", dropout=0.1, aware=True, shape="small"):
    torch.manual_seed(0)
    arguments = tiny_config(language, shape, dropout)
    config = InstructBlipConfig.from_transformers(TheirConfig(**arguments).to_dict())
    return InstructBlip(config.model_copy(update={"instruction_aware": aware}))


@pytest.fixture
def model():
    return tiny_model()


def test_config_is_the_same_after_a_round_trip_through_transformers(model):
    for aware in (True, False):
        config = model.config.model_copy(update={"instruction_aware": aware})
        assert InstructBlipConfig.from_transformers(config.to_transformers()) == config


def test_config_refuses_values_that_do_not_fit(model):
    values = model.config.model_dump()
    with pytest.raises(ValidationError, match="encoder_hidden_size must equal"):
        InstructBlipConfig(**{**values, "vision": {**values["vision"], "hidden_size": 32}})
    with pytest.raises(ValidationError, match="multiple of num_attention_heads"):
        VisionConfig(hidden_size=15, num_attention_heads=4)
    with pytest.raises(ValidationError, match="extra"):
        VisionConfig(widht=3)  # pyright: ignore
    with pytest.raises(ValueError, match="must be square"):
        InstructBlipConfig.from_transformers(
            {"model_type": "blip-2", "vision_config": {"image_size": [16, 8]}}
        )


# --- trainable parts -----------------------------------------------------------------------------


def test_exact_trainable_set(model):
    """Query tokens, the whole Q-Former, projection and the last vision LayerNorm; but not the text
    feed-forward of the last layer (3), which nothing reads."""
    layer = {
        f"attention.{name}.{kind}"
        for name in (
            "attention.query",
            "attention.key",
            "attention.value",
            "output.dense",
            "output.LayerNorm",
        )
        for kind in ("weight", "bias")
    }
    feed_forward = {
        f"{half}.{kind}"
        for half in ("intermediate.dense", "output.dense", "output.LayerNorm")
        for kind in ("weight", "bias")
    }
    expected = {
        "query_tokens",
        "language_projection.weight",
        "language_projection.bias",
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
        "qformer.embeddings.word_embeddings.weight",
        "qformer.embeddings.position_embeddings.weight",
        "qformer.embeddings.layernorm.weight",
        "qformer.embeddings.layernorm.bias",
    }
    for depth in range(4):
        names = set(layer)
        if depth % 2 == 0:
            names |= {f"cross{name}" for name in layer}
        names |= {
            name.replace("intermediate", "intermediate_query").replace("output", "output_query")
            for name in feed_forward
        }
        names |= feed_forward if depth < 3 else set()
        expected |= {f"qformer.encoder.layer.{depth}.{name}" for name in names}
    assert {name for name, _ in model.trainable_parameters()} == expected


def test_every_parameter_belongs_to_one_part(model):
    for root in model.adapted.values():
        add_lora(root, LoraConfig(rank=2))
    names = [name for name, _ in model.named_parameters()]
    assert {part_of(name) for name in names} == set(PARTS)


@pytest.mark.parametrize("part", [*PARTS, ("query_tokens", "projection")])
def test_chosen_parts_change_and_the_rest_is_bit_identical(part):
    choice = (part,) if isinstance(part, str) else part
    model = tiny_model()
    if part in model.adapted:
        add_lora(model.adapted[part], LoraConfig(rank=2))
    model.set_trainable(choice)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-2)
    model.loss(tiny_batch(model.config)).loss_sum.backward()
    assert all(p.grad is not None for _, p in model.trainable_parameters())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimizer.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert {part_of(name) for name in moved} == set(choice)
    assert moved <= {name for name, _ in model.trainable_parameters()}


def test_default_set_is_the_alias(model):
    default = [name for name, _ in model.trainable_parameters()]
    model.set_trainable(ALIASES["qformer"])
    assert [name for name, _ in model.trainable_parameters()] == default


@pytest.mark.parametrize("choice", [(), ("qfromer",), ("qformer", "vision")])
def test_unknown_parts_are_refused(model, choice):
    with pytest.raises(ValueError, match="trainable parts must be some of query_tokens"):
        model.set_trainable(choice)


# --- dropout -------------------------------------------------------------------------------------


def test_frozen_dropout_is_off_and_trained_dropout_is_on():
    """Flan-T5 has dropout; the official code leaves it on while T5 is frozen."""
    model = tiny_model("t5", dropout=0.0)
    model.train()
    assert model.training
    assert not any(module.training for module in model.language_model.modules())
    assert not model.vision_model.encoder.training
    batch = tiny_batch(model.config)
    assert torch.equal(model.loss(batch).loss_sum, model.loss(batch).loss_sum)
    model = tiny_model("t5", dropout=0.1).train()
    assert not torch.equal(model.loss(batch).loss_sum, model.loss(batch).loss_sum)
    model.eval()
    assert torch.equal(model.loss(batch).loss_sum, model.loss(batch).loss_sum)
    model.set_trainable(("language_model",)).train()
    assert model.language_model.training
    assert not model.qformer.training


# --- images --------------------------------------------------------------------------------------


def test_cached_features_are_taken_before_the_last_norm(model):
    model.eval()
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)
    batch = tiny_batch(model.config)
    cached = replace(
        batch, pixel_values=None, image_features=model.encode_image(batch.pixel_values)
    )
    assert torch.equal(model.loss(cached).loss_sum, model.loss(batch).loss_sum)


def test_shared_image_equals_its_copies(model):
    model.eval()
    batch = tiny_batch(model.config)
    copies = replace(
        batch,
        pixel_values=batch.pixel_values[batch.image_index[:, 0]],
        image_index=torch.arange(len(batch))[:, None],
    )
    torch.testing.assert_close(
        model.loss(copies).sample_losses, model.loss(batch).sample_losses, rtol=1e-6, atol=1e-6
    )


def test_video_is_its_frames_in_order(model):
    model.eval()
    batch = tiny_batch(model.config)
    video = replace(batch, image_index=torch.tensor([[0, 1], [1, 1], [1, 0]]))
    queries = model.encode_queries(video)
    width = model.config.num_query_tokens
    assert queries.shape == (3, 2 * width, 24)
    for frame in range(2):
        still = replace(batch, image_index=video.image_index[:, frame : frame + 1])
        torch.testing.assert_close(
            queries[:, frame * width : (frame + 1) * width], model.encode_queries(still)
        )


def test_wrong_shapes_are_caught(model):
    """The checker of annotations runs in this process: each call has one wrong dimension."""
    batch = tiny_batch(model.config)
    features = model.encode_image(batch.pixel_values)  # two images, three instructions
    with pytest.raises(TypeCheckError):
        model.encode_image(batch.pixel_values[:, :1])
    with pytest.raises(TypeCheckError):
        model.query_image(features, batch.qformer_ids, batch.qformer_mask[:2])
    with pytest.raises(TypeCheckError):
        model.project_queries(features[0])


def test_instruction_changes_the_queries_only_where_it_is_read():
    batch = tiny_batch(tiny_model().config)
    other = replace(batch, qformer_ids=(batch.qformer_ids + 5) % 40)
    aware, blind = tiny_model().eval(), tiny_model(aware=False).eval()
    assert not torch.equal(aware.encode_queries(batch), aware.encode_queries(other))
    assert torch.equal(blind.encode_queries(batch), blind.encode_queries(other))
    assert not any("intermediate.dense" in name for name in blind.state_dict())


def test_wrong_image_size_and_long_instruction_are_refused(model):
    batch = tiny_batch(model.config)
    with pytest.raises(ValueError, match="16 x 16 pixels; got"):
        model.loss(replace(batch, pixel_values=torch.zeros(2, 3, 20, 20)))
    long = torch.ones(3, 13, dtype=torch.long)
    with pytest.raises(ValueError, match=r"13 tokens.*at most 12"):
        model.loss(replace(batch, qformer_ids=long, qformer_mask=long))


# --- precision -----------------------------------------------------------------------------------


def test_training_dtypes(model):
    model.to_training_dtypes(torch.bfloat16, torch.bfloat16).train()
    assert all(p.dtype == torch.float32 for _, p in model.trainable_parameters())
    for part in (model.vision_model.encoder, model.vision_model.embeddings, model.language_model):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    batch = tiny_batch(model.config)
    result = model.loss(batch)
    assert result.loss_sum.dtype == torch.float32
    result.loss_sum.backward()
    assert all(p.grad.dtype == torch.float32 for _, p in model.trainable_parameters())
    exact, rounded = tiny_model().eval().loss(batch), model.eval().loss(batch)
    torch.testing.assert_close(
        rounded.sample_losses, exact.sample_losses.float(), rtol=0.02, atol=0.02
    )


def test_trained_language_model_keeps_fp32_masters(model):
    model.set_trainable(("language_model", "vision_tower"))
    model.to_training_dtypes(torch.bfloat16, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.loss(tiny_batch(model.config)).loss_sum.backward()


# --- the Q-Former alone --------------------------------------------------------------------------


def stage1_inputs(model):
    batch = tiny_batch(model.config)
    queries = model.query_tokens.expand(3, -1, -1)
    features = model.vision_model.norm(model.encode_image(batch.pixel_values))
    return queries, features, batch.qformer_ids, batch.qformer_mask, batch.image_index[:, 0]


def test_causal_text_sees_queries_and_earlier_text_only(model):
    model.eval()
    queries, features, ids, mask, index = stage1_inputs(model)
    ids, mask = ids[:, :3], mask[:, :3]
    plain = model.qformer.hidden_states(queries, features, ids, mask, index, causal_text=True)
    later = ids.clone()
    later[:, 2] = (later[:, 2] + 7) % 40
    changed = model.qformer.hidden_states(queries, features, later, mask, index, causal_text=True)
    torch.testing.assert_close(plain[0], changed[0])
    torch.testing.assert_close(plain[1][:, :2], changed[1][:, :2])
    assert not torch.allclose(plain[1][:, 2], changed[1][:, 2])
    other_image = model.qformer.hidden_states(
        queries, features.flip(0), ids, mask, index, causal_text=True
    )
    assert not torch.allclose(plain[1], other_image[1])


def test_text_alone_ignores_padding(model):
    model.eval()
    _, _, ids, mask, _ = stage1_inputs(model)
    none, text = model.qformer.hidden_states(None, None, ids, mask)
    assert none is None
    _, padded = model.qformer.hidden_states(
        None,
        None,
        torch.nn.functional.pad(ids, (0, 2), value=9),
        torch.nn.functional.pad(mask, (0, 2)),
    )
    torch.testing.assert_close(padded[:, : ids.shape[1]], text)


def test_blip2_has_no_hidden_states_of_text():
    model = tiny_model(aware=False)
    with pytest.raises(ValueError, match="no text branch"):
        model.qformer.hidden_states(*stage1_inputs(model))


def test_a_loaded_model_is_in_eval_mode_with_the_default_set(tmp_path):
    tiny_transformers().save_pretrained(tmp_path)
    loaded = InstructBlip.from_pretrained(tmp_path)
    assert not loaded.training
    assert {part_of(n) for n, _ in loaded.trainable_parameters()} == set(ALIASES["qformer"])
