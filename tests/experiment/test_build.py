"""Every variant of a run takes the samples, shows the images and writes the files it should."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from instructblip.core import distributed
from instructblip.core.batch import Batch
from instructblip.data.chat_format import chat_note
from instructblip.data.custom.folder import read_folder, split_by_image
from instructblip.data.images import ImageTransform
from instructblip.data.loader import Loader
from instructblip.data.reading.images import load_image
from instructblip.experiment.build import Run, Variant, build
from instructblip.experiment.draw import Drawing
from instructblip.experiment.evaluate import load_engine
from instructblip.experiment.folder import SET
from instructblip.experiment.pretrain import Pretraining
from instructblip.experiment.train import train
from instructblip.experiment.tune import FolderTuning
from instructblip.inference.engine import Engine
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from instructblip.serving.config import ServeConfig
from instructblip.serving.decoder import decode
from instructblip.training.run_directory import claim
from tests.data.test_chat_format import FORMATS, chat_tokens
from tests.testing import write_model, write_picture, write_vqa

IMAGES = 6
"""Images of a sample, more than the four that are shown by default."""
FILES = {"recipe.yaml", "data.json", "features.json"}
DRAW = [
    "drawing.conditioner={num_queries: 2, num_layers: 1, width: 8, num_heads: 2}",
    "drawing.decoder={kind: native, image_size: 64, patch_size: 16, width: 8, num_layers: 1,"
    " num_heads: 2, condition_width: 8}",
    "drawing.validation_prompts=1",
    "training.trainable=[drawing, qformer]",
]


@dataclass(frozen=True)
class Case:
    """A variant, and the recipe and settings that lead to it."""

    recipe: str
    variant: Callable[[Path], Variant]
    overrides: tuple[str, ...] = ()


def folder_tuning(root: Path) -> FolderTuning:
    return FolderTuning(*split_by_image(read_folder(root)))


CASES = {
    "train": Case("quickstart", lambda root: Variant()),
    "tune": Case("quickstart", folder_tuning),
    "stage1": Case("pretrain_scenes", lambda root: Pretraining(1)),
    "align": Case("pretrain_scenes", lambda root: Pretraining("align")),
    "stage2": Case("pretrain_scenes", lambda root: Pretraining(2)),
    "draw": Case("draw", lambda root: Drawing(), tuple(DRAW)),
    "draw_and_understand": Case(
        "draw", lambda root: Drawing(), (*DRAW, "drawing.understanding=0.5")
    ),
}
READS_DATA = [name for name in CASES if name != "draw"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("start"), "instructblip")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose samples have six images each."""
    root = tmp_path_factory.mktemp("custom")
    rows = []
    for row in range(10):
        names = [f"{row}_{number}.png" for number in range(IMAGES)]
        for number, name in enumerate(names):
            write_picture(root / name, seed=row * IMAGES + number)
        rows.append({"file_name": names, "caption": f"a row of {row} cups"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def recipe_of(case: Case, start: Path, root: Path, *more: str) -> Recipe:
    settings = [
        f"model.start={start}",
        f"data.root={root}",
        f"data.sets={{{SET}: {{format: imagefolder, root: .}}}}",
        f"data.num_frames={IMAGES}",
        "data.max_instruction=40",
        "data.check=run",
        "training.batch_size=8",
        "training.steps=4",
        "training.accumulate=2",
        "training.warmup_steps=1",
        "training.save_every=2",
        "training.validate_every=2",
        "training.precision=fp32",
        "evaluation.validation=[]",
        "evaluation.benchmarks=[]",
    ]
    return load_recipe(case.recipe, [*settings, *case.overrides, *more])


def run_of(name: str, start: Path, root: Path, *more: str) -> Run:
    case = CASES[name]
    return build(recipe_of(case, start, root, *more), case.variant(root))


def first_steps(run: Run, steps: int = 2) -> Iterator[Batch]:
    return chain.from_iterable(islice(run.batches.iterate(0), steps))


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_samples_that_the_recipe_asks_for(name: str, start: Path, root: Path):
    sizes = [len(batch) for batch in first_steps(run_of(name, start, root))]
    assert sizes == [4, 4, 4, 4]


def test_two_runs_in_one_folder_are_refused(start: Path, root: Path, tmp_path: Path):
    """Both would end without an error, and the result of one would be lost."""
    recipe = recipe_of(CASES["train"], start, root)
    with claim(tmp_path), pytest.raises(ValueError, match="another process is at work"):
        train(recipe, tmp_path)
    assert train(recipe, tmp_path).stopped == "finished"


@pytest.mark.parametrize("name", READS_DATA)
def test_training_sees_all_images_of_a_sample(name: str, start: Path, root: Path):
    batches = list(first_steps(run_of(name, start, root)))
    read = [batch for batch in batches if batch.target_values is None]
    assert read
    assert {batch.image_index.shape[1] for batch in read} == {IMAGES}


@pytest.mark.parametrize("name", CASES)
def test_ranks_share_a_step(name: str, start: Path, root: Path, monkeypatch: pytest.MonkeyPatch):
    off = "features.cache=off"
    whole = [i for batch in first_steps(run_of(name, start, root, off)) for i in identify(batch)]
    shared = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = list(first_steps(run_of(name, start, root, off)))
        assert {len(batch) for batch in batches} == {2}
        shared += [i for batch in batches for i in identify(batch)]
    assert sorted(shared) == sorted(whole)


@pytest.mark.parametrize("name", CASES)
def test_workers_change_no_batch(name: str, start: Path, root: Path):
    alone = list(first_steps(run_of(name, start, root)))
    fetched = list(first_steps(run_of(name, start, root, "training.workers=1")))
    assert [identify(batch) for batch in alone] == [identify(batch) for batch in fetched]
    for one, other in zip(alone, fetched, strict=True):
        assert torch.equal(one.qformer_ids, other.qformer_ids)


@pytest.mark.parametrize("name", CASES)
def test_patience_needs_validations(name: str, start: Path, root: Path):
    more = "training.early_stopping_patience=2"
    if name in ("tune", "draw", "draw_and_understand"):  # they validate without benchmarks
        assert run_of(name, start, root, more).validate is not None
        return
    with pytest.raises(ValueError, match=r"early_stopping_patience 2 .*evaluation\.validation"):
        run_of(name, start, root, more)


def test_a_missing_tracker_is_refused_before_the_data_are_read(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("train", "stage1", "draw"):
        variant, more = CASES[name].variant(tmp_path), "training.report_to=[wandb]"
        recipe = recipe_of(CASES[name], start, tmp_path / "absent", more)
        with pytest.raises(ValueError, match="pip install wandb"):
            build(recipe, variant, tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_a_run_that_is_shorter_than_its_warmup_says_so(
    start: Path, root: Path, capsys: pytest.CaptureFixture[str]
):
    text = "warmup_steps 1000 does not fit into 40 steps: the learning rate rises over 4 instead"
    run_of("train", start, root, "training.steps=40", "training.warmup_steps=1000")
    assert text in capsys.readouterr().out
    run_of("train", start, root, "training.steps=40", "training.warmup_steps=39")
    assert "does not fit" not in capsys.readouterr().out


def identify(batch: Batch) -> list[str]:
    """Data set and example of each sample, with its texts."""
    texts = [row.tolist() for row in batch.response_ids]
    named = zip(batch.datasets, batch.ids, texts, strict=True)
    return [f"{dataset}/{example} {[t for t in text if t]}" for dataset, example, text in named]


@pytest.mark.parametrize("name", READS_DATA)
def test_length_buckets_and_stored_features_reach_every_variant(
    name: str, start: Path, root: Path, tmp_path: Path
):
    more = ("data.bucket_steps=2", "features.cache=on", f"features.root={tmp_path / 'features'}")
    batches = list(first_steps(run_of(name, start, root, *more)))
    read = [batch for batch in batches if batch.target_values is None]
    assert all(batch.pixel_values is None for batch in read)
    assert all(batch.image_features is not None for batch in read)
    assert any((tmp_path / "features").rglob("*"))


@pytest.mark.parametrize("name", [name for name in READS_DATA if name != "tune"])
def test_unchecked_data_are_refused(name: str, start: Path, root: Path, tmp_path: Path):
    more = (f"data.prepared={tmp_path}", "data.check=required")
    with pytest.raises(ValueError, match="instructblip check"):
        run_of(name, start, root, *more)


@pytest.mark.parametrize("name", CASES)
def test_files_lie_beside_the_weights_and_resuming_is_exact(
    name: str, start: Path, root: Path, tmp_path: Path
):
    case, out = CASES[name], tmp_path / "run"
    recipe, variant = recipe_of(case, start, root), case.variant(root)
    assert build(recipe, variant, out).train(out).step == 4
    whole = weights(out)
    for folder in (out, out / "last", out / "checkpoints" / "step_000004"):
        files = {path.name for path in folder.iterdir()}
        assert files >= FILES
        assert ("templates.json" in files) == variant.instructs
    with pytest.raises(ValueError, match="already holds a run"):
        build(recipe, variant, out)
    shutil.rmtree(out / "checkpoints" / "step_000004")  # as if it had been killed after step 2
    shutil.rmtree(out / "last")
    assert build(recipe, variant, out, resume=True).train(out, resume=True).step == 4
    resumed = weights(out)
    assert whole.keys() == resumed.keys()
    assert [n for n, value in whole.items() if not torch.equal(value, resumed[n])] == []


def test_chat_format_is_on_where_the_tokenizer_has_one_and_is_recorded(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    start, out = write_model(tmp_path / "start", "instructblip", rows=280), tmp_path / "out"
    tokens = chat_tokens()
    tokens.language.chat_template = tokens.chat_template
    tokens.language.save_pretrained(start)
    control = tokens.language.convert_tokens_to_ids("<|im_start|>")

    def recorded(name: str, *more: str) -> str | None:
        """The template in the files of a run, once its batches agree with it."""
        run = run_of(name, start, root, "features.cache=off", *more)
        (batch, *_) = first_steps(run, 1)
        note = run.files.get("chat_format.json")
        template = json.loads(note)["chat_template"] if note else None
        assert bool((batch.prompt_ids == control).any()) == bool(template)
        assert bool((batch.response_ids == tokens.eos_id).any()) == bool(template)
        if template:
            settings = json.loads(run.files["generation_config.json"])
            assert settings["eos_token_id"] == [259, tokens.eos_id]
            assert run.files["chat_template.jinja"] == template
        return template

    assert recorded("train") == tokens.chat_template
    assert "in chat format (<|im_end|> ends a response)" in capsys.readouterr().out
    plain = "plain text: model.chat_template is auto, and"
    assert recorded("train", "model.chat_template=off") is None
    assert recorded("stage2") is None
    assert plain not in capsys.readouterr().out, "nobody expects a chat format there"
    custom = tmp_path / "mine.jinja"
    custom.write_text(FORMATS["qwen2.5"][0])
    assert recorded("train", f"model.chat_template={custom}") == FORMATS["qwen2.5"][0]
    with pytest.raises(FileNotFoundError, match=r"model\.chat_template: no file missing\.jinja"):
        recorded("train", "model.chat_template=missing.jinja")
    # What a start records holds; what was tuned before there was a record has no chat format.
    (start / "templates.json").write_text("{}")
    assert recorded("train") is None
    assert f"{plain} {start} has no chat format" in capsys.readouterr().out
    (start / "chat_format.json").write_text(chat_note(tokens.chat_template))
    assert recorded("train") == tokens.chat_template
    # A run that began without a record resumes without chat format.
    recipe = recipe_of(CASES["train"], start, root, "features.cache=off")
    out.mkdir()
    resumed = build(recipe, Variant(), out, resume=True)
    assert json.loads(resumed.files["chat_format.json"]) == {"chat_template": None}
    assert "chat_template: auto" in resumed.files["recipe.yaml"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "last").rglob("*.safetensors"))
    assert files
    return {f"{f.parent.name}/{n}": value for f in files for n, value in load_file(f).items()}


def test_tuning_validates_on_what_it_shows_in_training(start: Path, root: Path, tmp_path: Path):
    """Six images in both: training on four and evaluating on six compares two models."""
    run = run_of("tune", start, root)
    assert run.validate is not None
    scores = run.validate(run.model)
    assert set(scores) == {"score", "own_caption"}
    with pytest.raises(ValueError, match=r"6 images and data\.num_frames=4 shows fewer"):
        run_of("tune", start, root, "data.num_frames=4")


def test_micro_batches_and_ranks_of_unlike_samples_train_alike(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Samples of one to three images: gradients of a step, however it is divided."""
    rows = []
    for row in range(10):
        names = [f"{row}_{number}.png" for number in range(1 + row % 3)]
        for number, name in enumerate(names):
            write_picture(tmp_path / name, seed=row * 3 + number)
        rows.append({"file_name": names, "caption": f"a row of {row} cups"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def gradients(accumulate: int, ranks: int, *more: str) -> torch.Tensor:
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        total, widths = [], set()
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            run = run_of("train", start, tmp_path, f"training.accumulate={accumulate}", *more)
            model = run.model.eval()  # no dropout
            for batch in first_steps(run, 1):
                widths.add(batch.image_index.shape[1])
                model.loss(batch).loss_sum.backward()
            trained = [p.grad for _, p in model.trainable_parameters() if p.grad is not None]
            total.append(torch.cat([gradient.flatten() for gradient in trained]))
        assert len(widths) > 1 or accumulate * ranks < 8
        return torch.stack(total).sum(0)

    off = ("features.cache=off",)
    on = ("features.cache=on", f"features.root={tmp_path / 'features'}")
    for features, divided in ((off, ((1, 1), (1, 2), (4, 2))), (on, ((1, 1),))):
        expected = gradients(8, 1, *features)
        for accumulate, ranks in divided:
            other = gradients(accumulate, ranks, *features)
            torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
        for ranks in (1, 3) if features is off else (1,):  # three do not divide eight samples
            for tokens in (60, "auto"):
                cut = f"training.tokens_per_micro_batch={tokens}"
                other = gradients(1, ranks, cut, *features)
                torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


def augmentations(settings: list[str]) -> dict[str, tuple[bool, bool]]:
    sets = "data.sets={vqav2: {}, mine: {format: imagefolder}}"
    data = load_recipe("instructblip_vicuna7b", [sets, *settings]).data
    return {name: data.augmentation(name) for name in data.sets}


def test_custom_data_are_neither_cropped_nor_mirrored_unless_asked():
    published, both, none = (True, True), (True, True), (False, False)
    assert augmentations([]) == {"vqav2": published, "mine": none}
    assert augmentations(["data.augment=true"]) == {"vqav2": both, "mine": both}
    assert augmentations(["data.augment=false"]) == {"vqav2": none, "mine": none}
    mirror = augmentations(["data.mirror=false"])
    assert mirror == {"vqav2": (True, False), "mine": none}
    assert augmentations(["data.crop=true"])["mine"] == (True, False)
    assert augmentations(["data.augment=true", "data.mirror=false"])["mine"] == (True, False)


def test_each_set_of_a_mixture_has_its_own_augmentation(start: Path, root: Path, tmp_path: Path):
    write_vqa(tmp_path / "vqav2", 8)
    shutil.copytree(root, tmp_path / "mine")
    settings = [
        f"data.root={tmp_path}",
        "data.sets={mine: {format: imagefolder}, vqav2: {}}",
        "data.cache_images_mb=8",
        "features.cache=auto",
        "features.views=1",
    ]
    case = Case("instructblip_vicuna7b", lambda root: Variant())
    run = build(recipe_of(case, start, tmp_path, *settings))
    loader = run.batches
    assert isinstance(loader, Loader)
    exact = ImageTransform.from_pretrained(start)
    exact = replace(exact, filter="torch", image_size=loader.images["mine"].transform.image_size)
    kinds = {"mine": 0, "vqav2": 0}
    for slot in range(32):
        sample = loader.sample(slot)
        example, _ = loader.rendered(slot)
        assert sample.pixels is not None
        name = "mine" if sample.dataset == "mine" else "vqav2"
        kinds[name] += 1
        folder = tmp_path / name / ("images" if name == "vqav2" else "")
        whole = exact(load_image(folder / example.images[0]))
        assert torch.equal(sample.pixels[0], whole) == (name == "mine")
    assert all(kinds.values())
    assert loader.images["mine"].cache_images_mb == loader.images["vqav2"].cache_images_mb == 4


def test_a_window_holds_wherever_images_are_read(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """12-bit images of a set whose brightness means something."""
    rows = []
    for i in range(8):
        ramp = np.linspace(0, 1000 + 300 * i, 256).reshape(16, 16).astype(np.uint16)
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "caption": f"a ramp to {i}"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    case = Case("quickstart", lambda root: Variant())
    plain = build(recipe_of(case, start, tmp_path))
    assert f"data.window=auto: 8 of {SET} use a small part" in capsys.readouterr().out
    build(recipe_of(CASES["tune"], start, tmp_path), folder_tuning(tmp_path))
    assert f"of {SET} use a small part of their grey values" in capsys.readouterr().out
    assert isinstance(plain.batches, Loader)
    assert plain.batches.images[SET].transform.window == "auto"
    out, window = tmp_path / "run", "data.window=[0, 4095]"
    recipe = recipe_of(case, start, tmp_path, window, "features.cache=on")
    run = build(recipe, out=out)
    assert "data.window" not in capsys.readouterr().out
    run.train(out)
    engine = Engine.from_pretrained(out / "last", device="cpu")
    assert engine.images.transform.window == (0.0, 4095.0)
    expected = engine.images.load(str(tmp_path / "7.png"), None, False)
    brightest = (3100 / 4095 - engine.images.transform.mean[0]) / engine.images.transform.std[0]
    assert abs(float(expected[0].max()) - brightest) < 0.01
    # training reads the features of these pixels
    loader = run.batches
    assert isinstance(loader, Loader)
    features = loader.images[SET].features
    assert features is not None
    with torch.no_grad():
        stored = engine.model.encode_image(expected[None])[0]
    assert torch.allclose(features(str(tmp_path / "7.png"), 0), stored, atol=1e-5)
    # the server reads them, and an evaluation by the recipe
    data = (tmp_path / "7.png").read_bytes()
    shown = decode(data, ServeConfig().max_pixels, "here", engine.images.transform.window)
    assert torch.equal(engine.images.transform(shown), expected)
    assert torch.equal(engine._pixels(Image.open(tmp_path / "7.png"), "x"), expected)
    before = load_engine(recipe, str(start))
    assert before.images.transform.window == (0.0, 4095.0)
    assert (
        before.fingerprint != load_engine(recipe_of(case, start, tmp_path), str(start)).fingerprint
    )
    # `auto` in a later recipe keeps the window of the model
    later = recipe_of(case, out / "last", tmp_path)
    assert load_engine(later, str(out / "last")).images.transform.window == (0.0, 4095.0)
    again = build(later).batches
    assert isinstance(again, Loader)
    assert again.images[SET].transform.window == (0.0, 4095.0)


def test_wrong_windows_are_refused_when_the_recipe_is_read():
    for window in ("[4095, 0]", "[1]", "wide", "[0, .nan]", "[5, 5]"):
        with pytest.raises(ValueError, match=r"data\.window"):
            load_recipe("quickstart", [f"data.window={window}"])
