"""Directories that transformers wrote are read, and what is written here transformers reads."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
)

from instructblip.model.checkpoints.transformers import save_text_branch
from instructblip.model.instructblip import InstructBlip
from tests.parity.tiny import (
    IMAGE_TOKEN,
    seq2seq_inputs,
    tiny_batch,
    tiny_config,
    tiny_transformers,
    transformers_inputs,
)


def inputs_for(theirs, batch):
    build = transformers_inputs if theirs.config.use_decoder_only_language_model else seq2seq_inputs
    return build(batch, theirs.config.num_query_tokens)


def blip2_loss(theirs, batch):
    inputs = inputs_for(theirs, batch)
    inputs = {name: value for name, value in inputs.items() if "qformer" not in name}
    return theirs(**inputs).loss


def mean_loss(ours, batch):
    result = ours.loss(batch)
    return result.loss_sum / result.num_tokens


@pytest.mark.parametrize("language", ["llama", "opt", "t5"])
def test_blip2_directory_equals_transformers_blip2(tmp_path, language):
    theirs = tiny_transformers(language, kind="blip-2")
    theirs.save_pretrained(tmp_path)
    ours = InstructBlip.from_pretrained(tmp_path)
    assert not ours.config.instruction_aware
    batch = tiny_batch(theirs.config)
    torch.testing.assert_close(
        mean_loss(ours, batch), blip2_loss(theirs, batch), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("language", ["llama", "opt", "t5", "t5-scaled"])
@pytest.mark.parametrize("aware", [True, False])
def test_saved_directory_loads_in_transformers_with_the_same_loss(tmp_path, language, aware):
    kind = "instructblip" if aware else "blip-2"
    tiny_transformers(language, kind=kind).save_pretrained(tmp_path / "theirs")
    ours = InstructBlip.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    reader = InstructBlipForConditionalGeneration if aware else Blip2ForConditionalGeneration
    again, info = reader.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = tiny_batch(again.config)
    expected = again(**inputs_for(again, batch)).loss if aware else blip2_loss(again.eval(), batch)
    torch.testing.assert_close(mean_loss(ours, batch), expected, rtol=1e-5, atol=1e-5)
    ours_again = InstructBlip.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(mean_loss(ours_again, batch), mean_loss(ours, batch), rtol=0, atol=0)


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_instructblip_video_is_the_same_weights(tmp_path, language):
    """Four frames a sample, as transformers' processor gives it; read, written and read again."""
    theirs = tiny_transformers(language, kind="instructblipvideo")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = InstructBlip.from_pretrained(tmp_path / "theirs")
    batch = tiny_batch(theirs.config)
    frames = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 1]])
    batch = replace(batch, image_index=frames)
    build = transformers_inputs if language == "llama" else seq2seq_inputs
    inputs = build(batch, 4 * theirs.config.num_query_tokens)
    inputs["pixel_values"] = batch.pixel_values[frames]
    torch.testing.assert_close(mean_loss(ours, batch), theirs(**inputs).loss, rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again, info = InstructBlipVideoForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.video_token_index == IMAGE_TOKEN
    assert torch.equal(again.eval()(**inputs).loss, theirs(**inputs).loss)


def test_untied_t5_head_survives_both_ways(tmp_path):
    """Flan-T5: transformers 5 ties the head in the module and keeps the file's untied one."""
    theirs = tiny_transformers("t5")
    head = theirs.language_model.lm_head
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    reread = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    ours = InstructBlip.from_pretrained(tmp_path / "theirs")
    language = ours.language_model
    assert not torch.equal(language.lm_head.weight, language.shared.weight)
    assert torch.equal(language.encoder.embed_tokens.weight, language.shared.weight)
    ours.save_pretrained(tmp_path / "ours")
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "ours")
    batch = tiny_batch(theirs.config)
    for model in (theirs, reread, again):
        expected = model.eval()(**inputs_for(model, batch)).loss
        torch.testing.assert_close(mean_loss(ours, batch), expected, rtol=1e-5, atol=1e-5)


def test_sharded_directory(tmp_path):
    theirs = tiny_transformers("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    batch = tiny_batch(theirs.config)
    expected = theirs(**inputs_for(theirs, batch)).loss
    ours = InstructBlip.from_pretrained(tmp_path)
    torch.testing.assert_close(mean_loss(ours, batch), expected, rtol=1e-5, atol=1e-5)


def branch_of(model):
    return {
        name: value.clone()
        for name, value in model.qformer.state_dict().items()
        if any(part in name for part in ("_embeddings", ".intermediate.", ".output.dense"))
        and "attention" not in name
    }


def test_text_branch_of_a_retrieval_model(tmp_path):
    """Stage 1 of BLIP-2 gives the text branch: both halves come from their own directory."""
    arguments = tiny_config()
    arguments["qformer_config"]["use_qformer_text_input"] = True
    arguments["qformer_config"]["vocab_size"] = 43
    torch.manual_seed(3)
    stage1 = Blip2ForImageTextRetrieval(Blip2Config(**arguments))
    stage1.save_pretrained(tmp_path / "stage1")
    tiny_transformers(kind="blip-2").save_pretrained(tmp_path / "blip2")
    ours = InstructBlip.from_pretrained(
        tmp_path / "blip2", instruction_aware=True, text_branch=tmp_path / "stage1"
    )
    assert ours.config.instruction_aware
    assert ours.config.qformer.vocab_size == 43
    expected = stage1.state_dict()
    branch = branch_of(ours)
    assert len(branch) == 2 + 4 * 4
    for name, value in branch.items():
        theirs = expected.get(f"qformer.{name}", expected.get(name))
        assert torch.equal(value, theirs), name
    ours.save_pretrained(tmp_path / "ours")
    again = InstructBlip.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config


def test_text_branch_of_a_bert_gets_one_row_more(tmp_path):
    bert = BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=20,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=26,
            max_position_embeddings=16,
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    tiny_transformers(kind="blip-2").save_pretrained(tmp_path / "blip2")
    ours = InstructBlip.from_pretrained(
        tmp_path / "blip2", instruction_aware=True, text_branch=tmp_path / "bert"
    )
    words = ours.qformer.embeddings.word_embeddings.weight
    assert words.shape == (41, 20)
    assert torch.equal(words[:40], bert.embeddings.word_embeddings.weight)
    layer = bert.encoder.layer[2]
    ours_layer = ours.qformer.encoder.layer[2]
    assert torch.equal(ours_layer.intermediate.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(ours_layer.output.LayerNorm.bias, layer.output.LayerNorm.bias)


def test_text_branch_file_beside_a_blip2(tmp_path):
    tiny_transformers(kind="blip-2").save_pretrained(tmp_path / "blip2")
    tiny_transformers(kind="instructblip", seed=5).save_pretrained(tmp_path / "other")
    other = InstructBlip.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"no text branch.*'random'"):
        InstructBlip.from_pretrained(tmp_path / "blip2", instruction_aware=True)
    save_text_branch(other.qformer, tmp_path / "blip2" / "text_branch.safetensors")
    ours = InstructBlip.from_pretrained(tmp_path / "blip2", instruction_aware=True)
    for name, value in branch_of(ours).items():
        assert torch.equal(value, other.qformer.state_dict()[name])
    plain = InstructBlip.from_pretrained(tmp_path / "blip2")
    assert torch.equal(
        plain.qformer.embeddings.layernorm.weight, ours.qformer.embeddings.layernorm.weight
    )
    random = InstructBlip.from_pretrained(
        tmp_path / "blip2", instruction_aware=True, text_branch="random"
    )
    assert not torch.equal(
        random.qformer.embeddings.word_embeddings.weight,
        ours.qformer.embeddings.word_embeddings.weight,
    )


def test_other_image_size_equals_transformers_interpolation(tmp_path):
    theirs = tiny_transformers()
    theirs.save_pretrained(tmp_path)
    ours = InstructBlip.from_pretrained(tmp_path, image_size=24)
    pixels = torch.randn(2, 3, 24, 24)
    expected = theirs.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(
        ours.vision_model.norm(ours.encode_image(pixels)), expected, rtol=1e-5, atol=1e-5
    )
    assert ours.config.vision.image_size == 24
    assert ours.config.image_token_id == IMAGE_TOKEN
