"""Our model against transformers' InstructBlipForConditionalGeneration on tiny random weights."""

import pytest
import torch

from instructblip.model.decoding import GREEDY
from instructblip.model.inference import generate_responses
from instructblip.model.instructblip import InstructBlip
from tests.parity.tiny import (
    LANGUAGES,
    SHAPES,
    picture_inputs,
    seq2seq_inputs,
    tiny_batch,
    tiny_transformers,
    transformers_inputs,
)

LANGUAGE_CASES = [(language, "small") for language in LANGUAGES]
SHAPE_CASES = [(language, shape) for language in ("llama", "t5") for shape in list(SHAPES)[1:]]
CASES = LANGUAGE_CASES + SHAPE_CASES


@pytest.fixture(params=CASES, ids="-".join)
def pair(request, tmp_path):
    """The same weights in transformers and here, by way of a directory."""
    theirs = tiny_transformers(*request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, InstructBlip.from_pretrained(tmp_path)


def their_loss(theirs, batch):
    num_queries = theirs.config.num_query_tokens
    if theirs.config.use_decoder_only_language_model:
        return theirs(**transformers_inputs(batch, num_queries))
    return theirs(**seq2seq_inputs(batch, num_queries))


def test_image_features_and_queries(pair):
    theirs, ours = pair
    batch = tiny_batch(theirs.config)
    output = their_loss(theirs, batch)
    features = ours.encode_image(batch.pixel_values)
    normed = ours.vision_model.norm(features)
    torch.testing.assert_close(
        normed[batch.image_index[:, 0]], output.vision_outputs[0], rtol=1e-5, atol=1e-5
    )
    queries = ours.query_image(
        features, batch.qformer_ids, batch.qformer_mask, batch.image_index[:, 0]
    )
    their_queries = output.qformer_outputs[0][:, : theirs.config.num_query_tokens]
    torch.testing.assert_close(queries, their_queries, rtol=1e-5, atol=1e-5)


def test_loss_and_logits(pair):
    """Logits through the loss of every single token: log-softmax at the label."""
    theirs, ours = pair
    batch = tiny_batch(theirs.config)
    output = their_loss(theirs, batch)
    result = ours.loss(batch)
    assert result.num_tokens == batch.num_response_tokens
    torch.testing.assert_close(
        result.loss_sum / result.num_tokens, output.loss, rtol=1e-5, atol=1e-5
    )
    joined = ours.language.join(ours.encode_queries(batch), batch)
    logits, labels = output.logits, None
    if theirs.config.use_decoder_only_language_model:
        inputs = transformers_inputs(batch, theirs.config.num_query_tokens)
        logits, labels = logits[:, :-1], inputs["labels"][:, 1:]
    else:
        labels = seq2seq_inputs(batch, theirs.config.num_query_tokens)["labels"]
    expected = torch.nn.functional.cross_entropy(
        logits[labels != -100], labels[labels != -100], reduction="none"
    )
    torch.testing.assert_close(ours.language.loss(joined), expected, rtol=1e-5, atol=1e-5)
    sums = torch.stack([part.sum() for part in expected.split(batch.response_mask.sum(1).tolist())])
    torch.testing.assert_close(result.sample_losses, sums, rtol=1e-5, atol=1e-4)


def test_gradients_of_the_trainable_set(pair):
    theirs, ours = pair
    batch = tiny_batch(theirs.config)
    their_loss(theirs, batch).loss.backward()
    result = ours.loss(batch)
    (result.loss_sum / result.num_tokens).backward()
    their_parameters = dict(theirs.named_parameters())
    checked = 0
    for name, parameter in ours.trainable_parameters():
        grad, expected = parameter.grad, their_parameters[name].grad
        assert grad is not None, name
        difference = (grad - expected).norm()
        # The gradient of a key bias is zero, as softmax ignores a common shift: what is left is the
        # rounding of terms as large as those that sum up to the gradient of the key's weights.
        terms = name.replace("key.bias", "key.weight")
        scale = float(their_parameters[terms].grad.norm())
        assert difference / scale < 1e-5, f"{name}: {difference / scale}"
        checked += 1
    assert checked > 20


def liven(model):
    """Let the answers depend on the input: a random T5 repeats one token whatever it reads."""
    language = model.language_model
    with torch.no_grad():
        model.language_projection.weight.mul_(10)
        if language.config.model_type == "t5":
            language.shared.weight.mul_(3)
            generator = torch.Generator().manual_seed(0)
            language.decoder.final_layer_norm.weight.normal_(0, 1, generator=generator)


def test_greedy_generation_is_token_identical(pair):
    theirs, ours = pair
    for model in pair:
        liven(model)
    batch = tiny_batch(theirs.config, seed=4)
    num_queries = theirs.config.num_query_tokens
    answers = generate_responses(ours, batch, decoding=GREEDY.override(max_new_tokens=8))
    ends = theirs.config.text_config.eos_token_id
    pictures = picture_inputs(batch)
    for sample, answer in enumerate(answers):
        # One at a time: transformers gets no padding that could move a position.
        prompt = batch.prompt_ids[sample][batch.prompt_mask[sample].bool()].tolist()
        ids = torch.tensor([[theirs.config.image_token_index] * num_queries + prompt])
        length = int(batch.qformer_mask[sample].sum())
        expected = theirs.generate(
            pixel_values=pictures["pixel_values"][sample : sample + 1],
            qformer_input_ids=batch.qformer_ids[sample : sample + 1, :length],
            qformer_attention_mask=batch.qformer_mask[sample : sample + 1, :length],
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
        )[0].tolist()
        decoder_only = theirs.config.use_decoder_only_language_model
        expected = expected[ids.shape[1] :] if decoder_only else expected[1:]
        expected = expected[: expected.index(ends)] if ends in expected else expected
        assert answer == expected
