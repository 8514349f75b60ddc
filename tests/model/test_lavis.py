"""The official code's checkpoints: official names and shapes, both ways, bit for bit."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from instructblip.cli import main as cli
from instructblip.cli.models import ModelForm, combine, export, import_
from instructblip.data.tokens import Tokens
from instructblip.experiment.build import with_commit
from instructblip.inference.embedder import Embedder
from instructblip.model.checkpoints.directory import check_output, model_directory, with_revision
from instructblip.model.checkpoints.inspection import inspect_checkpoint
from instructblip.model.checkpoints.lavis import (
    export_lavis,
    from_lavis,
    import_lavis,
    language_parts,
    language_tokenizer,
    to_lavis,
)
from instructblip.model.checkpoints.weights import write_weights
from instructblip.model.config import InstructBlipConfig, LoraConfig, QFormerConfig, VisionConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import build_language_model
from instructblip.model.lora import add_lora
from instructblip.model.retrieval import similarity
from instructblip.recipe.load import load_recipe
from instructblip.release.assemble import import_checkpoint
from tests.parity.tiny import LANGUAGES, tiny_batch, tiny_config, tiny_transformers
from tests.testing import llama_like, t5_like, wordpiece, write_picture


def official(
    width: int, depth: int, mlp: int, vision: int, language: int, words: int, of: Any
) -> dict:
    """Names and shapes of a trimmed InstructBLIP file as the official code writes them."""
    base = "Qformer.bert."
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, 32, width)}
    shapes |= {f"ln_vision.{end}": (vision,) for end in ("weight", "bias")}
    shapes |= {"llm_proj.weight": (language, width), "llm_proj.bias": (language,)}
    shapes[base + "embeddings.position_ids"] = (1, 512)
    shapes[base + "embeddings.word_embeddings.weight"] = (words, width)
    shapes[base + "embeddings.position_embeddings.weight"] = (512, width)
    norms = [base + "embeddings.LayerNorm"]
    for i in range(depth):
        layer = f"{base}encoder.layer.{i}."
        for kind in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            for name in ("query", "key", "value"):
                wide = vision if kind == "crossattention" and name != "query" else width
                shapes[f"{layer}{kind}.self.{name}.weight"] = (width, wide)
                shapes[f"{layer}{kind}.self.{name}.bias"] = (width,)
            shapes[f"{layer}{kind}.output.dense.weight"] = (width, width)
            shapes[f"{layer}{kind}.output.dense.bias"] = (width,)
            norms.append(f"{layer}{kind}.output.LayerNorm")
        for end in ("", "_query"):
            shapes[f"{layer}intermediate{end}.dense.weight"] = (mlp, width)
            shapes[f"{layer}intermediate{end}.dense.bias"] = (mlp,)
            shapes[f"{layer}output{end}.dense.weight"] = (width, mlp)
            shapes[f"{layer}output{end}.dense.bias"] = (width,)
            norms.append(f"{layer}output{end}.LayerNorm")
    shapes |= {f"{norm}.{end}": (width,) for norm in norms for end in ("weight", "bias")}
    return {name: of(shape) for name, shape in shapes.items()}


def eva(width: int, mlp: int, blocks: int, patch: int, tokens: int, of: Any) -> dict[str, Any]:
    """Names and shapes of ``eva_vit_g.pth``: no prefix, no key bias, a head."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width)}
    shapes |= {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(blocks):
        block = f"blocks.{i}."
        shapes |= {f"{block}norm{n}.{end}": (width,) for n in (1, 2) for end in ("weight", "bias")}
        shapes |= {block + "attn.q_bias": (width,), block + "attn.v_bias": (width,)}
        shapes |= {block + "attn.qkv.weight": (3 * width, width)}
        shapes |= {block + "attn.proj.weight": (width, width), block + "attn.proj.bias": (width,)}
        shapes |= {block + "mlp.fc1.weight": (mlp, width), block + "mlp.fc1.bias": (mlp,)}
        shapes |= {block + "mlp.fc2.weight": (width, mlp), block + "mlp.fc2.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "head.weight": (10, width)}
    return {name: of(shape) for name, shape in shapes.items()}


def random(shape: tuple[int, ...]) -> Tensor:
    if shape == (1, 512):
        return torch.arange(512)[None]
    return torch.randn(shape) * 0.1 + (1.0 if len(shape) == 1 else 0.0)


def test_official_names_and_shapes_are_all_of_ours() -> None:
    def of(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device="meta")

    weights = official(768, 12, 3072, 1408, 4096, 30523, of) | eva(1408, 6144, 39, 14, 257, of)
    ours = from_lavis(weights)
    with torch.device("meta"):
        config = InstructBlipConfig(
            vision=VisionConfig(),
            qformer=QFormerConfig(vocab_size=30523),
            language={**LANGUAGES["llama"], "vocab_size": 60, "hidden_size": 4096},
        )
        model = InstructBlip(config)
    expected = {n: v.shape for n, v in model.state_dict().items() if "language_model" not in n}
    assert {n: v.shape for n, v in ours.items()} == expected
    # 188.84 M with Vicuna-7B: what the official code trains
    trained = sum(v.numel() for n, v in ours.items() if not re.match("vision_model.e", n))
    assert trained == 185_660_160 + 24_576 + 2_816 + 3_149_824


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """Synthetic files: trimmed checkpoint, image encoder, language model, BERT's tokenizer."""
    torch.manual_seed(0)
    files = {name: tmp_path / name for name in ("ib.pth", "eva.pth", "vicuna", "bert")}
    torch.save({"model": official(24, 2, 40, 16, 24, 90, random), "config": {}}, files["ib.pth"])
    torch.save(eva(16, 30, 2, 8, 5, random), files["eva.pth"])
    write_language(files["vicuna"], "llama")
    wordpiece().save_pretrained(files["bert"])
    return files


def write_language(folder: Path, kind: str) -> None:
    folder.mkdir()
    tokenizer = llama_like() if kind == "llama" else t5_like()
    config = {**LANGUAGES[kind], "vocab_size": len(tokenizer)}
    if kind == "t5":
        config["feed_forward_proj"] = "gated-gelu"
    model = build_language_model(config)
    write_weights(model.state_dict(), folder / "model.safetensors")
    values = model.config.to_dict()
    values["pad_token_id"] = 0
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(folder)


def test_lavis_to_ours_to_lavis_is_bit_identical(parts: dict[str, Path], tmp_path: Path) -> None:
    model = import_lavis(parts["ib.pth"], parts["eva.pth"], parts["vicuna"], 2, 2)
    model.save_pretrained(tmp_path / "ours")
    export_lavis(
        InstructBlip.from_pretrained(tmp_path / "ours"), tmp_path / "again.pth", image_encoder=True
    )
    before = torch.load(parts["ib.pth"], weights_only=True)["model"]
    encoder = torch.load(parts["eva.pth"], weights_only=True)
    before |= {
        f"visual_encoder.{n}": v for n, v in encoder.items() if n[:4] not in ("norm", "head")
    }
    after = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    export_lavis(model, tmp_path / "trimmed.pth")
    trimmed = torch.load(tmp_path / "trimmed.pth", weights_only=True)["model"]
    assert not [n for n in trimmed if n.startswith(("visual_encoder", "llm_model"))]
    assert "llm_proj.weight" in trimmed


def test_quirks(parts: dict[str, Path], tmp_path: Path) -> None:
    model = import_lavis(parts["ib.pth"], parts["eva.pth"], parts["vicuna"], 2, 2)
    block = model.vision_model.encoder.layers[0]
    assert not block.self_attn.qkv.bias[16:32].any()
    assert block.self_attn.qkv.bias[:16].any()
    assert block.layer_norm1.eps == 1e-6
    assert model.vision_model.post_layernorm.eps == 1e-5
    assert model.qformer.embeddings.layernorm.eps == 1e-12
    model.save_pretrained(tmp_path / "ours")
    again = InstructBlip.from_pretrained(tmp_path / "ours")
    assert again.vision_model.post_layernorm.eps == 1e-5
    batch = tiny_batch(model.config)
    assert torch.equal(again.loss(batch).loss_sum, model.loss(batch).loss_sum)
    with torch.no_grad():
        block.self_attn.qkv.bias[16:32] = 1
    with pytest.raises(ValueError, match="has a bias for keys"):
        to_lavis(model.state_dict(), "llm_proj", image_encoder=True)


def test_the_released_encoder_has_a_block_too_many(parts: dict[str, Path]) -> None:
    torch.save(eva(16, 30, 40, 8, 5, random), parts["eva.pth"])
    model = import_lavis(parts["ib.pth"], parts["eva.pth"], parts["vicuna"], 2, 2)
    assert model.config.vision.num_hidden_layers == 39


def test_vicuna_begins_with_its_end_token_and_has_a_row_for_padding(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    before = json.loads((parts["vicuna"] / "config.json").read_text())
    text, weights = language_parts(parts["vicuna"])
    size = before["vocab_size"]
    assert (text["vocab_size"], text["pad_token_id"], text["bos_token_id"]) == (size + 1, size, 2)
    assert len(weights["model.embed_tokens.weight"]) == size + 1
    tokenizer = language_tokenizer(parts["vicuna"])
    assert tokenizer.convert_tokens_to_ids("[PAD]") == size
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokens = Tokens.from_pretrained(tmp_path / "tokenizer")
    assert tokens.prompt("red")[0] == 2, "</s>, not <s>"
    assert tokens.response("red")[-1] == 2
    assert 2 not in tokens.response("red")[:-1]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_language_model_in_the_file_is_the_one_taken(parts: dict[str, Path], rows: int) -> None:
    """Trained with the official code, which has given it the row of [PAD], or merged outside it."""
    size = json.loads((parts["vicuna"] / "config.json").read_text())["vocab_size"]
    content = torch.load(parts["ib.pth"], weights_only=True)
    head, gate = torch.randn(size + rows, 24), torch.randn(40, 24)
    content["model"] |= {
        "llm_model.lm_head.weight": head,
        "llm_model.model.layers.0.mlp.gate_proj.weight": gate,
        "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    torch.save(content, parts["ib.pth"])
    language = import_lavis(parts["ib.pth"], parts["eva.pth"], parts["vicuna"], 2, 2).language_model
    assert torch.equal(language.model.layers[0].mlp.gate_proj.weight, gate)
    assert language.lm_head.weight.shape == (size + 1, 24)
    assert torch.equal(language.lm_head.weight[: size + rows], head)
    plain = build_language_model(language_parts(parts["vicuna"])[0])
    plain.load_state_dict(language_parts(parts["vicuna"])[1])
    assert torch.equal(language.model.norm.weight, plain.model.norm.weight)


def test_files_that_are_no_parts_are_named(parts: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"ib\.pth holds no image encoder.*eva_vit_g\.pth"):
        import_lavis(parts["ib.pth"], parts["ib.pth"], parts["vicuna"])
    with pytest.raises(ValueError, match=r"eva\.pth holds no Q-Former"):
        import_lavis(parts["eva.pth"], parts["eva.pth"], parts["vicuna"])


def test_a_lavis_file_that_would_lose_what_was_trained_is_refused(tmp_path: Path) -> None:
    def export_trained(trainable: list[str], image_encoder: bool = False) -> None:
        recipe = {"training": {"trainable": trainable}}
        (tmp_path / "model" / "recipe.yaml").write_text(json.dumps(recipe))
        out = tmp_path / f"{len(trainable)}.pth"
        export(str(tmp_path / "model"), out, "lavis", image_encoder=image_encoder)

    tiny_transformers("llama").save_pretrained(tmp_path / "model")
    for part in ("lora", "language_model"):
        with pytest.raises(ValueError, match=rf"\['{part}'\] .* no place .*--format transformers"):
            export_trained(["qformer", part])
    with pytest.raises(ValueError, match=r"\['vision_tower'\].*--image-encoder"):
        export_trained(["qformer", "vision_tower"])
    export_trained(["qformer"])
    (tmp_path / "model" / "recipe.yaml").unlink()
    model = InstructBlip.from_pretrained(tmp_path / "model")
    add_lora(model.language_model, LoraConfig())
    model.save_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match="'lora'"):
        export(str(tmp_path / "adapted"), tmp_path / "x.pth", "lavis")


def test_flan_t5_uses_the_exact_gelu(tmp_path: Path) -> None:
    write_language(tmp_path / "t5", "t5")
    text, _ = language_parts(tmp_path / "t5")
    plain = json.loads((tmp_path / "t5" / "config.json").read_text())
    x = torch.linspace(-3, 3, 50)
    for config, exact in ((text, True), (plain, False)):
        act = build_language_model(config).encoder.block[0].layer[-1].DenseReluDense.act
        assert torch.equal(act(x), torch.nn.functional.gelu(x)) == exact


def test_commands(parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--debug"])
        assert not stop.value.code
        return capsys.readouterr().out

    output = call("inspect", str(parts["ib.pth"]))
    assert "LAVIS checkpoint" in output
    assert "missing: language_model." in output
    # heads do not show in tensors: 12 and 16 as in the official model
    torch.save({"model": official(24, 2, 40, 16, 24, 90, random)}, parts["ib.pth"])
    options = ["--vision", str(parts["eva.pth"]), "--language", str(parts["vicuna"])]
    out = str(tmp_path / "ours")
    with pytest.raises(ValueError, match="--qformer-tokenizer"):
        cli.main(["import", str(parts["ib.pth"]), *options, "--out", out, "--debug"])
    tokenizer = ["--qformer-tokenizer", str(parts["bert"])]
    output = call("import", str(parts["ib.pth"]), *options, *tokenizer, "--out", out)
    assert "InstructBLIP" in output
    assert "tokenizers: language, Q-Former" in output
    assert "missing" not in output
    call("export", out, str(tmp_path / "back.pth"), "--format", "lavis")
    first = torch.load(parts["ib.pth"], weights_only=True)["model"]
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert all(torch.equal(first[n], back[n]) for n in first)
    call("export", out, str(tmp_path / "copy"))
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "InstructBlipForConditionalGeneration" in card
    assert "| language_projection" in card or "| projection" in card
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", out, out, "--format", "gguf", "--debug"])
    assert stop.value.code == 2


def stage1(parts: dict[str, Path]) -> Blip2ForImageTextRetrieval:
    """A model of transformers, and the same weights as files of stage 1 of the official code."""
    torch.manual_seed(0)
    arguments = tiny_config()
    del arguments["image_token_index"]
    arguments["vision_config"] |= {"num_attention_heads": 16}  # as `import` expects them
    arguments["qformer_config"] |= {"hidden_size": 24, "num_attention_heads": 12}
    arguments["qformer_config"] |= {"vocab_size": 90, "use_qformer_text_input": True}
    model = Blip2ForImageTextRetrieval(Blip2Config(**arguments, image_text_hidden_size=8)).eval()
    model.vision_model.post_layernorm.eps = 1e-5  # the official ln_vision
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.15)
            if name.endswith("qkv.bias"):
                parameter[16:32] = 0  # keys have none
    theirs = {n.replace("qformer.layernorm", "embeddings.layernorm"): v
              for n, v in model.state_dict().items()}  # fmt: skip
    heads = {f"{head}.{end}": theirs.pop(f"{head}ection.{end}")
             for head in ("vision_proj", "text_proj") for end in ("weight", "bias")}  # fmt: skip
    named = {f"qformer.{n}" if n.startswith("embeddings.") else n: v for n, v in theirs.items()}
    files = to_lavis(named, "llm_proj", image_encoder=True) | heads | {"temp": torch.tensor(0.05)}
    files["Qformer.cls.predictions.bias"] = torch.zeros(90)
    encoder = {n.partition(".")[2]: v for n, v in files.items() if n.startswith("visual_encoder.")}
    torch.save(encoder, parts["eva.pth"])
    trimmed = {n: v for n, v in files.items() if not n.startswith("visual_encoder.")}
    torch.save({"model": trimmed}, parts["ib.pth"])
    return model


def test_an_imported_stage_1_searches_as_transformers(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    model, out = stage1(parts), tmp_path / "ours"
    import_checkpoint(parts["ib.pth"], parts["eva.pth"], parts["vicuna"], parts["bert"], out)
    embedder = Embedder.from_pretrained(out, device="cpu")
    assert embedder.retriever.log_temperature.exp() == pytest.approx(0.05)
    images = [Image.open(write_picture(tmp_path / f"{i}.png", seed=i)) for i in range(3)]
    texts = ["a red cat", "what is blue?", "the cat"]
    ids, mask = embedder.ids(texts)
    pixels = torch.stack([embedder.pixels(image) for image in images])
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        cosine = model(**given).logits_per_image
        fits = model(**given, use_image_text_matching_head=True).logits_per_image.softmax(1)[:, 1]
    scores = similarity(embedder.embed(images=images), embedder.embed(texts=texts))
    assert (scores - cosine).abs().max() < 1e-5
    assert (embedder.match(images, texts) - fits).abs().max() < 1e-5
    projection = InstructBlip.from_pretrained(out).language_projection
    assert projection.weight.std() > 0, "stage 1 has none: a new one is drawn"


@pytest.mark.parametrize(
    ("existing", "form"),
    [
        ("notes/keep.txt", "transformers"),
        ("best/config.json", "transformers"),
        ("image.png", "transformers"),
        ("new.pth", "transformers"),
        ("old.pth", "lavis"),
        ("notes/keep.txt", "lavis"),
    ],
)
def test_nothing_that_stands_at_out_is_lost(
    tmp_path: Path, existing: str, form: ModelForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InstructBlip, "from_pretrained", pytest.fail)
    file = tmp_path / "tuned" / existing
    if file.name != "new.pth":
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    out = tmp_path / "tuned" / Path(existing).parts[0]
    match = "--format lavis" if file.name == "new.pth" else f"{out} exists"
    with pytest.raises(ValueError, match=match):
        export("starter", out, form)
    if file.name != "new.pth":
        assert file.read_text() == "mine"


def test_import_and_combine_take_no_directory_in_use(tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    for _ in range(2):
        check_output(used)  # an empty one will do
    (used / "config.json").write_text("{}")
    none = tmp_path / "none"
    with pytest.raises(ValueError, match="exists"):
        import_(none, none, none, used)
    with pytest.raises(ValueError, match="exists"):
        combine(none, none, used, none)


def test_inspect_names_what_is_missing(parts: dict[str, Path], tmp_path: Path) -> None:
    model = import_lavis(parts["ib.pth"], parts["eva.pth"], parts["vicuna"], 2, 2)
    model.save_pretrained(tmp_path / "ours")
    whole = inspect_checkpoint(tmp_path / "ours")
    assert not whole.missing
    assert not whole.unexpected
    assert whole.parts.total() == sum(p.numel() for p in model.parameters())
    weights = model.state_dict()
    weights["extra"] = weights.pop("query_tokens")
    write_weights(weights, tmp_path / "ours" / "model.safetensors")
    broken = inspect_checkpoint(tmp_path / "ours")
    assert broken.missing == ["query_tokens [1, 32, 24]"]
    assert broken.unexpected == ["extra [1, 32, 24]"]
    assert "missing: query_tokens" in broken.describe()


def test_a_pickle_with_code_is_refused(parts: dict[str, Path]) -> None:
    class Bad:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"model": Bad()}, parts["ib.pth"])
    with pytest.raises(ValueError, match="needs code to run"):
        inspect_checkpoint(parts["ib.pth"])


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    text = tmp_path / "passwd"
    text.write_text("root:x:0:0:root:/root:/bin/bash\n" * 9)
    with pytest.raises(ValueError, match="passwd cannot be read as tensors"):
        inspect_checkpoint(text)


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_weights({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_hub_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        assert "*.bin" not in options["allow_patterns"], "no pickles"
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "config.json").write_text("{}")
    assert model_directory("hf://owner/name@v1") == tmp_path
    assert model_directory("hf://owner/name") == tmp_path
    assert asked == [("owner/name", "v1"), ("owner/name", None)]
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("hf://owner/name", "hf://owner/name@main"):
        assert with_revision(name) == name  # a folder that is no commit's
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: f"/x/{commit}")
            assert with_revision(name) == f"hf://owner/name@{commit}"
            assert (
                with_commit(load_recipe("quickstart", [f"model.start={name}"]))
                .to_yaml()
                .count(f"hf://owner/name@{commit}")
            )
            assert capsys.readouterr().err == f"{name} is commit {commit}\n", "once"
            assert with_revision(f"hf://owner/name@{commit}") == f"hf://owner/name@{commit}"
            assert capsys.readouterr().err == ""
    assert with_revision("starter") == "starter"
    del asked[2:]
    with pytest.raises(ValueError, match="expected hf://OWNER/NAME"):
        model_directory("hf://../name")
    with pytest.raises(FileNotFoundError, match="hf://OWNER/NAME for a model of the Hub"):
        model_directory(tmp_path / "owner" / "name")
    assert len(asked) == 2


def test_hub_names_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_args: Any, **_options: Any) -> str:
        raise LocalEntryNotFoundError("no network and no copy on the disk\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError) as error:
        model_directory("hf://owner/name")
    assert str(error.value) == (
        "hf://owner/name could not be fetched: no network and no copy on the disk"
    )
