"""What only a GPU would punish, checked without one: no question to the device, the memory layout
that its kernels want, features that are the same for training and evaluation."""

import os
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import DynamicCache, T5Config, T5EncoderModel

from instructblip.cli import main as cli
from instructblip.core import distributed
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.fast.packing import Packing
from instructblip.model.language.fast.t5 import ALIGNED, _bias
from instructblip.model.language.quantize import QuantizedLinear
from instructblip.model.language.ranking import Layout, select_cache
from tests.parity.tiny import tiny_batch, tiny_config

CONFIG = {"model_type": "instructblip", **tiny_config("llama")}


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_cudnn_attention_is_off_on_a_gpu(two_gpus: None) -> None:
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        distributed.resolve_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert distributed.resolve_device("auto").type == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(("local_rank", "chosen"), [(1, [1]), (5, [])])
def test_ranks_on_gpus_wait_on_the_cpu(
    local_rank: int, chosen: list[int], two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank without a GPU of its own, such as one of many with ``device=cpu``, joins as well."""
    joined: list[tuple[str, float]] = []
    devices: list[int] = []
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setitem(os.environ, name, str(local_rank))
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)

    def init(backend: str, timeout: Any) -> None:
        joined.append((backend, timeout.total_seconds() / 3600))

    monkeypatch.setattr(distributed.dist, "init_process_group", init)
    with distributed.process_group():
        pass
    ((backend, hours),) = joined
    assert backend == "cpu:gloo,cuda:nccl"
    assert hours >= 12, "the first rank may check, encode or export for hours"
    assert devices == chosen


@pytest.mark.parametrize("lengths", [[3, 5], [16, 2], [17]])
def test_the_bias_of_t5_has_the_layout_of_fused_attention(lengths: list[int]) -> None:
    config = T5Config(d_model=8, d_kv=4, num_heads=2, num_layers=1, d_ff=8, vocab_size=8)
    attention = T5EncoderModel(config).encoder.block[0].layer[0].SelfAttention  # type: ignore
    width = max(lengths)
    packing = Packing.of(torch.arange(width) < torch.tensor(lengths)[:, None])
    bias = _bias(attention, packing)
    assert bias.shape[-2:] == (width, width)
    assert bias.stride(-1) == 1
    assert bias.stride(-2) % ALIGNED == 0
    torch.testing.assert_close(bias, attention.compute_bias(width, width), rtol=0, atol=0)


def test_ranking_asks_the_device_nothing() -> None:
    """A tensor without data cannot answer."""
    cache = DynamicCache()
    for layer in range(2):
        keys = torch.zeros(3, 2, 4, 5, device="meta")
        cache.update(keys, keys, layer)
    for samples in ([1, 1, 1], [0, 2]):
        none = torch.zeros(len(samples), 1, device="meta")
        layout = Layout(
            sample=torch.tensor(samples, device="meta"),
            ids=none.long(),
            depth=none.long(),
            real=none.bool(),
            visible=None,
            place=none[:, 0].long(),
            of_one_sample=len(samples) > 1 and len(set(samples)) == 1,
        )
        selected = select_cache(cache, layout)
        assert selected.layers[1].keys.shape == (len(samples), 2, 4, 5)


def test_nf4_copies_no_table_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear(torch.nn.Linear(64, 4).requires_grad_(False), "nf4")
    inputs = torch.randn(2, 64)
    expected = layer(inputs)
    monkeypatch.setattr(torch, "tensor", pytest.fail)
    assert torch.equal(layer(inputs), expected)


def test_training_and_evaluation_share_stored_features() -> None:
    """On a GPU training computes in bf16 with an encoder in bf16; evaluation has the same encoder
    and leaves the rest in fp32."""
    model = InstructBlip(InstructBlipConfig.from_transformers(CONFIG))
    model.to_training_dtypes(torch.bfloat16, torch.bfloat16)
    training = model.encoder_fingerprint()
    model.compute_dtype = None
    assert model.encoder_fingerprint() == training
    model.vision_model.float()  # here the arithmetic decides
    plain = model.encoder_fingerprint()
    model.compute_dtype = torch.bfloat16
    assert model.encoder_fingerprint() != plain


def test_a_batch_is_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = tiny_batch(InstructBlip(InstructBlipConfig.from_transformers(CONFIG)).config)
    again = batch.pin_memory()
    tensors = [v for f in fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)]
    assert pinned == [id(tensor) for tensor in tensors]
    assert torch.equal(again.prompt_ids, batch.prompt_ids)
    assert again.ids == batch.ids


def test_memory_leaves_room_for_what_it_does_not_count(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 100 * 2**30))
    with pytest.raises(SystemExit):
        cli.main(["memory", "quickstart", "training.device=cpu"])
    assert "of 93.0 GiB" in capsys.readouterr().out
