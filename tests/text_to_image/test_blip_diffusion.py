"""Checkpoints of BLIP-Diffusion in both layouts, on synthetic files with the official names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from instructblip.text_to_image.blip_diffusion import (
    Projection,
    load_subject_encoder,
    splice_context,
)

D, V, F, LAYERS, QUERIES = 64, 64, 24, 2, 3


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.1


def dense(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.weight": tensor(out, into), f"{name}.bias": tensor(out)}


def norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + tensor(width), f"{name}.bias": tensor(width)}


def lavis_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(blip_weight.pt, proj_weight.pt) of a tiny model, with heads that drawing does not read."""
    torch.manual_seed(0)
    bert = "Qformer.bert"
    blip = {
        "query_tokens": tensor(1, QUERIES, D),
        f"{bert}.embeddings.position_ids": torch.arange(8)[None],
        f"{bert}.embeddings.word_embeddings.weight": tensor(20, D),
        f"{bert}.embeddings.position_embeddings.weight": tensor(8, D),
        **norm(f"{bert}.embeddings.LayerNorm", D),
        "visual_encoder.class_embedding": tensor(V),
        "visual_encoder.positional_embedding": tensor(5, V),
        "visual_encoder.conv1.weight": tensor(V, 3, 4, 4),
        **norm("visual_encoder.ln_pre", V),
        **norm("ln_vision", V),
        "Qformer.cls.predictions.bias": tensor(20),
        **dense("itm_head", 2, D),
        **dense("vision_proj", 4, D),
        **dense("text_proj", 4, D),
        "temp": torch.tensor(0.07),
    }
    for i in range(LAYERS):
        layer = f"{bert}.encoder.layer.{i}"
        for kind, width in (("attention", D), ("crossattention", V)):
            blip |= dense(f"{layer}.{kind}.self.query", D, D)
            blip |= dense(f"{layer}.{kind}.self.key", D, width)
            blip |= dense(f"{layer}.{kind}.self.value", D, width)
            blip |= dense(f"{layer}.{kind}.output.dense", D, D)
            blip |= norm(f"{layer}.{kind}.output.LayerNorm", D)
        for tail in ("", "_query"):
            blip |= dense(f"{layer}.intermediate{tail}.dense", F, D)
            blip |= dense(f"{layer}.output{tail}.dense", D, F)
            blip |= norm(f"{layer}.output{tail}.LayerNorm", D)
        block = f"visual_encoder.transformer.resblocks.{i}"
        blip[f"{block}.attn.in_proj_weight"] = tensor(3 * V, V)
        blip[f"{block}.attn.in_proj_bias"] = tensor(3 * V)
        blip |= dense(f"{block}.attn.out_proj", V, V)
        blip |= norm(f"{block}.ln_1", V) | norm(f"{block}.ln_2", V)
        blip |= dense(f"{block}.mlp.c_fc", F, V) | dense(f"{block}.mlp.c_proj", V, F)
    projection = dense("dense1", 4 * D, D) | dense("dense2", D, 4 * D) | norm("LayerNorm", D)
    return blip, projection


def write_lavis(folder: Path) -> Path:
    blip, projection = lavis_weights()
    (folder / "blip_model").mkdir(parents=True)
    (folder / "proj_layer").mkdir()
    torch.save(blip, folder / "blip_model" / "blip_weight.pt")
    torch.save(projection, folder / "proj_layer" / "proj_weight.pt")
    return folder


def write_diffusers(folder: Path) -> Path:
    """The same tensors as diffusers' conversion script stores them."""
    blip, projection = lavis_weights()
    renamed = {f"proj_layer.{n}": t for n, t in projection.items()}
    for name, value in blip.items():
        n = name.replace("Qformer.bert.", "").replace("attention.self.", "attention.attention.")
        n = n.replace("visual_encoder.class_", "visual_encoder.embeddings.class_")
        n = n.replace("positional_embedding", "embeddings.position_embedding")
        n = n.replace("conv1", "embeddings.patch_embedding").replace("ln_pre", "pre_layernorm")
        n = n.replace("transformer.resblocks", "encoder.layers").replace(
            "attn.in_proj_", "self_attn.qkv."
        )
        n = n.replace("attn.out_proj", "self_attn.projection").replace(".ln_", ".layer_norm")
        n = n.replace("c_fc", "fc1").replace("c_proj", "fc2")
        n = n.replace("ln_vision", "visual_encoder.post_layernorm")
        if n.startswith(("query", "embeddings", "encoder", "visual_encoder")):
            leading = n.endswith(("class_embedding", "position_embedding"))
            renamed[n] = value.reshape(1, -1, V) if leading else value
    (folder / "qformer").mkdir(parents=True)
    save_file(renamed, folder / "qformer" / "diffusion_pytorch_model.safetensors")
    return folder


def test_both_layouts_are_the_same_model(tmp_path: Path):
    lavis = load_subject_encoder(write_lavis(tmp_path / "lavis"))
    diffusers = load_subject_encoder(write_diffusers(tmp_path / "diffusers"))
    pixels, ids = torch.randn(2, 3, 8, 8), torch.randint(1, 20, (2, 4))
    with torch.no_grad():
        tokens = [m(pixels, ids, torch.ones_like(ids)) for m in (lavis, diffusers)]
        other = lavis(pixels, ids.flip(0), torch.ones_like(ids))
    assert tokens[0].shape == (2, QUERIES, D)
    assert torch.equal(*tokens)
    assert not torch.allclose(tokens[0], other)


def test_the_projection_is_that_of_diffusers():
    modeling = pytest.importorskip("diffusers.pipelines.deprecated.blip_diffusion.modeling_blip2")
    theirs = modeling.ProjLayer(in_dim=D, out_dim=D, hidden_dim=96).eval()
    ours = Projection(D, 96)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 3, D)
    torch.testing.assert_close(ours(hidden), theirs(hidden))


def test_context_stands_behind_the_first_two_words():
    words, context = torch.zeros(1, 6, 4), torch.ones(1, 3, 4)
    spliced = splice_context(words, context)[0, :, 0]
    assert spliced.tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"75 words and 3 context tokens.*cut the words to 74"):
        splice_context(torch.zeros(1, 75, 4), context)


def test_missing_files_and_tensors_are_named(tmp_path: Path):
    folder = write_lavis(tmp_path / "a")
    (folder / "proj_layer" / "proj_weight.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"proj_layer/proj_weight\.pt missing"):
        load_subject_encoder(folder)
    folder = write_lavis(tmp_path / "b")
    blip, _ = lavis_weights()
    del blip["Qformer.bert.encoder.layer.1.crossattention.self.key.weight"]
    torch.save(blip, folder / "blip_model" / "blip_weight.pt")
    with pytest.raises(ValueError, match=r"missing: .*layer\.1\.crossattention\.attention\.key"):
        load_subject_encoder(folder)
    torch.save({"a": torch.zeros(1)}, folder / "blip_model" / "blip_weight.pt")
    with pytest.raises(ValueError, match="no BLIP-Diffusion checkpoint: it has no tensor"):
        load_subject_encoder(folder)
