"""The batch at step s is a function of (seed, s); mixture, order and collation."""

import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instructblip.core.batch import (
    Batch,
    Sample,
)
from instructblip.data.features import Features, FeatureStore
from instructblip.data.images import ImageTransform
from instructblip.data.loader import Loader, cut, deal
from instructblip.data.order import (
    CYCLE,
    Mixture,
    Order,
    mix,
    permute,
    share_out,
)
from instructblip.data.prepared.dataset import (
    DatasetView,
)
from instructblip.data.prepared.prepare import prepare
from instructblip.data.samples import Examples, ImageReader, collate
from instructblip.data.tokens import Tokens
from tests.testing import write_picture, write_vqa


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Examples]:
    folder = tmp_path_factory.mktemp("sets")
    root = write_vqa(folder / "vqav2", 10)
    return {
        name: prepare(name, root, "train", folder / "out") for name in ("vqav2", "vqav2_question")
    }


def make(sets: dict[str, Examples], tokens: Tokens, **options: Any) -> Loader:
    augment = options.pop("augment", True)
    transform = ImageTransform(image_size=8, crop=augment, mirror=augment)
    names = ("features", "cache_images_mb")
    reader = {name: options.pop(name) for name in names if name in options}
    mixture = Mixture({name: len(data) for name, data in sets.items()})
    options = {"batch_size": 8, "seed": 5} | options
    return Loader(sets, mixture, tokens, ImageReader(transform, **reader), **options)


def same(a: Batch, b: Batch) -> bool:
    for f in fields(Batch):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if not (torch.equal(x, y) if isinstance(x, Tensor) else x == y):
            return False
    return True


def test_a_batch_depends_on_seed_and_step_alone(sets: dict[str, Examples], tokens: Tokens) -> None:
    loader = make(sets, tokens)
    third = loader.batch(3)
    assert not same(third, loader.batch(2))
    for _ in range(3):
        loader.batch(random.randrange(100))
    assert same(third, loader.batch(3))
    assert same(third, make(sets, tokens).batch(3))
    assert same(third, next(make(sets, tokens).iterate(3))[0])
    assert not same(third, make(sets, tokens, seed=6).batch(3))


def test_workers_change_nothing(sets: dict[str, Examples], tokens: Tokens) -> None:
    alone = list(make(sets, tokens).iterate(2, stop=5))
    helped = list(make(sets, tokens, workers=1).iterate(2, stop=5))
    assert len(alone) == len(helped) == 3
    for one, other in zip(alone, helped, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))


def test_ctrl_c_leaves_the_workers_to_their_parent(
    sets: dict[str, Examples], tokens: Tokens
) -> None:
    """A terminal sends it to all processes: the parent needs its batches to finish the step."""
    batches = make(sets, tokens, workers=1).iterate(2, stop=20)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 17


def test_ranks_and_micro_batches_share_the_same_samples(
    sets: dict[str, Examples], tokens: Tokens
) -> None:
    whole = make(sets, tokens).batch(7)
    for ranks, accumulate in [(2, 1), (1, 4), (2, 2)]:
        parts = []
        for rank in range(ranks):
            options = {"rank": rank, "world_size": ranks, "accumulate": accumulate}
            parts += next(make(sets, tokens, **options).iterate(7, stop=8))
        assert len(parts) == ranks * accumulate
        assert tuple(i for part in parts for i in part.ids) == whole.ids
        assert torch.equal(torch.cat([of_samples(p) for p in parts]), of_samples(whole))
    with pytest.raises(ValueError, match="does not divide into 3 ranks"):
        make(sets, tokens, world_size=3)


def test_a_window_of_buckets_has_the_samples_of_its_steps(
    sets: dict[str, Examples], tokens: Tokens
) -> None:
    plain, loader = make(sets, tokens), make(sets, tokens, bucket_steps=4)
    windows = [[loader.slots(step) for step in range(start, start + 4)] for start in (0, 4)]
    for number, window in enumerate(windows):
        drawn = sorted(slot for batch in window for slot in batch)
        assert drawn == list(range(number * 32, number * 32 + 32))
    lengths = [[loader._length(slot) for slot in batch] for batch in windows[1]]
    assert all(step == sorted(step) for step in lengths)
    by_length = sorted(lengths)
    assert lengths != by_length  # the batches are shuffled
    assert all(a[-1] <= b[0] for a, b in pairwise(by_length))
    assert all(loader.step_of(s) == 4 + i for i, batch in enumerate(windows[1]) for s in batch)
    assert plain.step_of(17) == 2
    late = make(sets, tokens, bucket_steps=4)
    assert same(late.batch(6), loader.batch(6))  # resumed in the middle of a window
    assert same(next(make(sets, tokens, bucket_steps=4).iterate(6))[0], loader.batch(6))
    assert loader.slots(6) != make(sets, tokens, bucket_steps=4, seed=6).slots(6)
    assert padding(loader, 4) < padding(plain, 4)


def test_buckets_keep_images_and_videos_apart(
    sets: dict[str, Examples], tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(sets, tokens, bucket_steps=4)
    plain = loader.rendered

    def some_videos(slot: int) -> Any:
        example, rendered = plain(slot)
        return (replace(example, images=example.images * 2) if slot % 4 == 0 else example), rendered

    monkeypatch.setattr(loader, "rendered", some_videos)
    kinds = [{slot % 4 == 0 for slot in loader.slots(step)} for step in range(4)]
    assert sorted(map(sorted, kinds)) == [[False], [False], [False], [True]]


def padding(loader: Loader, steps: int) -> float:
    batches = [loader.batch(step) for step in range(steps)]
    masks = [(b.prompt_mask, b.response_mask) for b in batches]
    slots = sum(mask.numel() for pair in masks for mask in pair)
    return 1 - sum(float(mask.sum()) for pair in masks for mask in pair) / slots


@pytest.mark.parametrize("steps", [1, 4])
def test_buckets_go_to_ranks_and_micro_batches_by_length(
    sets: dict[str, Examples], tokens: Tokens, steps: int
) -> None:
    whole = make(sets, tokens, bucket_steps=steps)
    if steps == 1:
        assert sorted(whole.slots(3)) == list(make(sets, tokens).slots(3))
    for ranks, accumulate in [(2, 1), (1, 4), (2, 2)]:
        options = {"world_size": ranks, "accumulate": accumulate, "bucket_steps": steps}
        loaders = [make(sets, tokens, rank=rank, **options) for rank in range(ranks)]
        parts = [list(one.slots(3, micro)) for micro in range(accumulate) for one in loaders]
        assert [slot for part in parts for slot in part] == list(whole.slots(3))


def of_samples(batch: Batch) -> Tensor:
    assert batch.pixel_values is not None
    return batch.pixel_values[batch.image_index[:, 0]]


def test_cache_and_shared_images(sets: dict[str, Examples], tokens: Tokens) -> None:
    plain = make(sets, tokens, augment=False)
    batch = plain.batch(0)
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) < len(batch)  # ten questions on five images
    assert same(batch, plain.batch(0))
    assert plain.images["vqav2"]._recent.nbytes == 8 * 8 * 3 * len(
        plain.images["vqav2"]._recent.values
    )
    small = make(sets, tokens, augment=False, cache_images_mb=0)
    assert same(batch, small.batch(0))
    assert not small.images["vqav2"]._recent.values


def test_cache_is_bounded(tmp_path: Path) -> None:
    images = ImageReader(ImageTransform(image_size=400), cache_images_mb=1)  # two of 0.5 MB
    for i in (0, 1, 0, 2):
        path = tmp_path / f"{i}.png"
        images.load(str(path if path.exists() else write_picture(path)), None, True)
    assert [Path(key).stem for key in images._recent.values] == ["0", "2"]
    assert images._recent.nbytes == 2 * 400 * 400 * 3


def test_features_replace_pixels(sets: dict[str, Examples], tokens: Tokens, tmp_path: Path) -> None:
    class Stored(Features):
        def __call__(self, path: str, view: int, first: str | None = None) -> torch.Tensor:
            return torch.full((4, 2), float(len(path) + view))

    features = Stored(FeatureStore(tmp_path, "fp32"), digests={}, views=2)
    batch = make(sets, tokens, augment=False, features=features).batch(0)
    assert batch.pixel_values is None
    assert batch.image_features is not None
    assert batch.image_features.shape[1:] == (4, 2)


@pytest.mark.parametrize("kind", ["pixels", "augmented", "int8", "bf16"])
def test_a_gpu_is_sent_8_bits_and_computes_the_same(
    kind: str,
    sets: dict[str, Examples],
    tokens: Tokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stored(Features):
        def key(self, path: str, view: int, first: str | None = None) -> str:
            return Path(path).name

    options: dict[str, Any] = {"augment": kind == "augmented"}
    if kind in ("int8", "bf16"):
        names = sorted({Path(n).name for data in sets.values() for e in data for n in e.images})  # type: ignore[attr-defined]
        store = FeatureStore(tmp_path, kind)  # type: ignore[arg-type]
        store.write(
            names, torch.randn(len(names), 4, 6, generator=torch.Generator().manual_seed(0))
        )
        store.refresh()
        options["features"] = Stored(store, digests={})
    loader = make(sets, tokens, **options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (sent,) = next(loader.iterate(1))
    images = sent.image_features if sent.pixel_values is None else sent.pixel_values
    assert images is not None
    assert images.element_size() == (2 if kind == "bf16" else 1)
    assert same(sent.to("cpu"), loader.batch(1))


def test_templates_of_one_set(sets: dict[str, Examples], tokens: Tokens) -> None:
    loader = make(sets, tokens, templates={"vqav2": ["{question} Hm:"]})
    batch = loader.batch(0)
    for i, name in enumerate(batch.datasets):
        text = tokens.decode(batch.prompt_ids[i][batch.prompt_mask[i] == 1].tolist())
        assert text.endswith("Hm:") is (name == "vqav2")
    with pytest.raises(ValueError, match="no place"):
        make(sets, tokens, templates={"vqav2": ["{nonsense}"]})


def test_an_unreadable_image_names_record_and_file(tmp_path: Path, tokens: Tokens) -> None:
    data = prepare("vqav2", write_vqa(tmp_path, 2), "train", tmp_path / "out")
    (tmp_path / "images" / "COCO_train2014_000000000000.jpg").write_bytes(b"\xff\xd8 half")
    with pytest.raises(ValueError, match=r"questions\.json:record \d: image .*000\.jpg"):
        make({"vqav2": data}, tokens).batch(0)


def test_mixture() -> None:
    mixture = Mixture({"a": 100, "b": 400, "c": 900}, {"c": 2.0})
    assert mixture.probabilities == pytest.approx({"a": 1 / 9, "b": 2 / 9, "c": 6 / 9})
    rows = mixture.table(1800)
    assert [row.epochs for row in rows] == pytest.approx([2.0, 1.0, 4 / 3])
    assert Mixture({"a": 100, "b": 300}, temperature=1.0).probabilities["b"] == pytest.approx(0.75)
    assert Mixture({"a": 100, "b": 300}, temperature=0.0).probabilities["b"] == pytest.approx(0.5)
    for bad in ({"d": 1.0}, {"a": -1.0}, {"a": 0.0, "b": 0.0, "c": 0.0}):
        with pytest.raises(ValueError, match=r"mixture|expected"):
            Mixture({"a": 1, "b": 1, "c": 1}, bad)
    with pytest.raises(ValueError, match="'a' is empty"):
        Mixture({"a": 0})


def test_permute_is_a_permutation_that_depends_on_its_key() -> None:
    for size in (1, 2, 3, 10, 100, 1000):
        for key in (0, 1, 1 << 63):
            assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))
    moved = [permute(i, 1000, 7) for i in range(1000)]
    assert moved != [permute(i, 1000, 8) for i in range(1000)]
    assert abs(sum(moved[:100]) / 100 - 500) < 100


def test_order_visits_every_set_evenly() -> None:
    sizes, probabilities = [7, 1000, 50], [0.1, 0.6, 0.3]
    order = Order(sizes, probabilities, seed=1)
    drawn = Counter(order[n] for n in range(2 * CYCLE))
    for k, (size, p) in enumerate(zip(sizes, probabilities, strict=True)):
        counts = [n for draw, n in drawn.items() if draw.dataset == k]
        assert sum(counts) == pytest.approx(2 * CYCLE * p, abs=2)
        assert len(counts) == size
        assert max(counts) - min(counts) <= 1
    first = Counter(order[n].dataset for n in range(400))
    assert 180 < first[1] < 300


def test_every_epoch_has_another_order() -> None:
    one_set = Order([CYCLE], [1.0], seed=1)
    epochs: list[dict[int, int]] = [{}, {}]
    for cycle, seen in enumerate(epochs):
        for place in range(CYCLE):
            # Slots are shuffled by cycle as well; this looks behind that, at draw after draw.
            drawn_as = permute(place, CYCLE, mix(1, 1, cycle))
            seen[drawn_as] = one_set[cycle * CYCLE + place].example
    assert sorted(epochs[0].values()) == sorted(epochs[1].values()) == list(range(CYCLE))
    assert sum(epochs[0][i] == epochs[1][i] for i in range(CYCLE)) < 20


def test_shares_sum_to_the_slots_and_none_is_empty() -> None:
    assert share_out([0.5, 0.5], 5) in ([3, 2], [2, 3])
    assert share_out([0.0, 1.0], 8) == [0, 8]
    shares = share_out([1e-9, 1e-9, 1 - 2e-9], 100)
    assert shares == [1, 1, 98]


def sample(keys: Iterable[str], **text: Any) -> Sample:
    keys = tuple(keys)
    pixels = tuple(torch.full((3, 2, 2), float(ord(key))) for key in keys)
    return Sample(image_keys=keys, pixels=pixels, dataset="d", id="".join(keys), **text)


def test_collate_encodes_equal_images_once() -> None:
    batch = collate(
        [
            sample("ab", prompt_ids=[5, 6], response_ids=[7], qformer_ids=[]),
            sample("bc", prompt_ids=[8], response_ids=[9, 3], qformer_ids=[]),
        ]
    )
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (3, 3, 2, 2)
    assert batch.image_index.tolist() == [[0, 1], [1, 2]]
    assert batch.prompt_ids.tolist() == [[5, 6], [8, 0]]
    assert batch.prompt_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.response_ids.tolist() == [[7, 0], [9, 3]]
    assert batch.qformer_ids.shape == (2, 0)
    assert batch.num_response_tokens == 3


def test_a_batch_of_images_and_videos_repeats_no_frame() -> None:
    batch = collate([sample("a"), sample("bacd"), sample("de")])
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == 5
    assert batch.image_index.tolist() == [[0, -1, -1, -1], [1, 0, 2, 3], [3, 4, -1, -1]]


def test_collate_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="d : no image, others in the batch have 3"):
        collate([sample("bcd"), sample("")])
    with pytest.raises(ValueError, match="some samples have pixels and some have features"):
        collate([sample("a"), replace(sample("b"), pixels=None, features=(torch.ones(1, 2),))])
    with pytest.raises(ValueError, match="2 image keys and 1 images"):
        collate([replace(sample("a"), image_keys=("a", "b"))])
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_of_more_images_than_frames_evenly_spaced_ones_are_seen(tmp_path: Path) -> None:
    images = ImageReader(ImageTransform(image_size=4), num_frames=4)
    for names, seen in (("abcdefgh", "bdfh"), ("abcd", "abcd"), ("abc", "abc"), ("a", "a")):
        assert images.select(tuple(names)) == tuple(seen)
    video = tuple(f"{i}.png" for i in range(8))
    assert images.paths(video, tmp_path) == tuple(str(tmp_path / f"{i}.png") for i in (1, 3, 5, 7))


def test_a_view_has_the_chosen_examples(sets: dict[str, Examples]) -> None:
    view = DatasetView(sets["vqav2"], [9, 0, 4, 5, 2])
    assert [view[i].id for i in range(len(view))] == ["9", "0", "4", "5", "2"]
    assert view.images() == {sets["vqav2"][i].images for i in view.indices}


def test_a_step_is_dealt_and_cut_by_tokens() -> None:
    lengths = [9, 8, 5, 4, 2]
    hands = deal(lengths, 2)
    assert hands == [[0, 3, 4], [1, 2]]
    assert cut([9, 4, 2], 9) == [[0], [1, 2]]  # two rows of 4
    assert cut([2, 9, 4], 27) == [[1, 2, 0]]
    assert cut([9, 4, 2], 1) == [[0], [1], [2]]  # longer than a part may be


@pytest.mark.parametrize("buckets", [0, 2])
def test_any_number_of_ranks_shares_the_samples_of_a_step_by_tokens(
    sets: dict[str, Examples], tokens: Tokens, buckets: int
) -> None:
    whole = make(sets, tokens, bucket_steps=buckets).batch(7)
    for ranks in (1, 2, 3, 8):
        options = {"world_size": ranks, "bucket_steps": buckets, "tokens_per_image": 4}
        options["tokens_per_micro_batch"] = 60
        loaders = [make(sets, tokens, rank=rank, **options) for rank in range(ranks)]
        steps = [loader.step(7) for loader in loaders]
        ids = [i for step in steps for batch in step for i in batch.ids]
        assert sorted(ids) == sorted(whole.ids)
        for batch in (batch for step in steps for batch in step):
            rows = batch.prompt_mask.sum(1) + batch.response_mask.sum(1) + 4
            assert len(batch) == 1 or rows.max() * len(batch) <= 60
    assert len(make(sets, tokens, tokens_per_micro_batch=10**6).step(7)) == 1
