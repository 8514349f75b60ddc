"""What saves memory or time changes no gradient: checkpoints, chunks of the loss, loading."""

import pytest
import torch

from instructblip.core.batch import Batch
from instructblip.experiment.memory import saved_bytes
from instructblip.model.checkpoints import transformers as pretrained
from instructblip.model.checkpoints.weights import NoRandomWeights
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import checkpoint_layers
from instructblip.model.language.fast import head, t5
from tests.model.test_language import tiny_model
from tests.parity.tiny import tiny_batch, tiny_transformers


def full_batch(model: InstructBlip, samples: int, lengths: tuple[int, int, int]) -> Batch:
    """A batch without padding, from stored features."""
    vision = model.config.vision

    def ids(length: int) -> torch.Tensor:
        return torch.randint(4, 30, (samples, length))

    instruction, prompt, response = (ids(length) for length in lengths)
    return Batch(
        image_features=torch.randn(samples, vision.num_tokens, vision.hidden_size),
        image_index=torch.arange(samples)[:, None],
        qformer_ids=instruction,
        qformer_mask=torch.ones_like(instruction),
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt),
        response_ids=response,
        response_mask=torch.ones_like(response),
    )


@pytest.fixture(params=["llama", "opt", "t5"])
def model(request: pytest.FixtureRequest, tmp_path) -> InstructBlip:
    tiny_transformers(request.param).save_pretrained(tmp_path)
    return InstructBlip.from_pretrained(tmp_path)  # eval mode: no dropout


def gradients(model: InstructBlip, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(batch).loss_sum.backward()
    return {n: p.grad.clone() for n, p in model.trainable_parameters() if p.grad is not None}


def test_checkpoints_change_no_gradient_and_keep_less(model: InstructBlip):
    batch = tiny_batch(model.config)
    before = gradients(model, batch)
    kept = saved_bytes(lambda: model.loss(batch).loss_sum, model)
    checkpoint_layers(model.language_model)
    after = gradients(model, batch)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert saved_bytes(lambda: model.loss(batch).loss_sum, model) < kept


def test_chunks_of_the_loss_change_no_gradient(
    model: InstructBlip, monkeypatch: pytest.MonkeyPatch
):
    batch = tiny_batch(model.config)
    before, loss = gradients(model, batch), model.loss(batch)
    monkeypatch.setattr(head, "LOSS_CHUNK", 2)
    assert torch.allclose(model.loss(batch).sample_losses, loss.sample_losses, atol=1e-5)
    for name, value in gradients(model, batch).items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-6)


def test_loading_draws_no_weights_and_loads_them_all(tmp_path, monkeypatch: pytest.MonkeyPatch):
    theirs = tiny_transformers("llama")
    theirs.save_pretrained(tmp_path)
    for draw in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_"):
        weight = torch.nn.Parameter(torch.full((3, 3), 7.0))
        with NoRandomWeights():
            getattr(torch.nn.init, draw)(weight)
        assert (weight == 0).all(), draw
    torch.nn.init.normal_(weight)
    assert (weight != 0).any()
    entered = []
    monkeypatch.setattr(
        pretrained, "NoRandomWeights", lambda: entered.append(True) or NoRandomWeights()
    )
    ours = InstructBlip.from_pretrained(tmp_path)
    assert entered
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("language", ["t5", "gpt2"])
def test_gelu_is_one_operation(language: str, monkeypatch: pytest.MonkeyPatch):
    fused = tiny_model(language)
    batch = tiny_batch(fused.config)
    with monkeypatch.context() as patch:
        patch.setattr(t5, "fuse_gelu", lambda model: None)
        plain = tiny_model(language)
    expected = gradients(plain, batch)
    for name, value in gradients(fused, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    kept, before = (saved_bytes(lambda m=m: m.loss(batch).loss_sum, m) for m in (fused, plain))
    assert kept < 0.9 * before
