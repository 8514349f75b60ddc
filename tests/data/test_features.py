"""Stored image features are exact, survive a kill and are never stale."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from instructblip.core import distributed, files
from instructblip.data import features as features_module
from instructblip.data.features import (
    Costs,
    Features,
    FeatureStore,
    FeatureType,
    fill,
    hash_images,
    measure,
    quantize,
    store_name,
)
from instructblip.data.images import ImageTransform
from instructblip.data.prepared.images import gather_facts
from instructblip.data.reading.images import load_image
from tests.core.crash import crashes
from tests.testing import write_picture

TRANSFORM = ImageTransform(image_size=8)


class Encoder:
    """Two tokens of four features for each image, and a count of the images encoded."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return pixels.flatten(1)[:, :8].unflatten(1, (2, 4)) * 3


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Five images; the last has the bytes of the first."""
    paths = [str(write_picture(tmp_path / "images" / f"{i}.png", seed=i)) for i in range(5)]
    Path(paths[4]).write_bytes(Path(paths[0]).read_bytes())
    return paths


def stored(
    folder: Path, paths: list[str], kind: FeatureType = "fp32", views: int = 1
) -> tuple[Features, Encoder]:
    transform = TRANSFORM if views == 1 else TRANSFORM.for_training()
    encoder = Encoder()
    features = Features(FeatureStore(folder / "store", kind), hash_images(paths, {}), views)
    fill(features, transform, encoder, batch_size=2, workers=0)
    return features, encoder


def test_features_are_exact_and_equal_images_are_stored_once(tmp_path: Path, paths: list[str]):
    features, encoder = stored(tmp_path, paths)
    assert encoder.seen == len(features.store) == 4
    for path in paths:
        expected = Encoder()(TRANSFORM(load_image(path))[None])[0]
        assert torch.equal(features(path, 0), expected)
    again, encoder = stored(tmp_path, paths)
    assert encoder.seen == 0
    copy = pickle.loads(pickle.dumps(again))
    assert torch.equal(copy(paths[2], 0), features(paths[2], 0))
    assert again.view(7) == 0


def test_a_changed_image_is_encoded_again(tmp_path: Path, paths: list[str]):
    before, _ = stored(tmp_path, paths)
    old = before(paths[1], 0).clone()
    write_picture(Path(paths[1]), seed=99)
    after, encoder = stored(tmp_path, paths)
    assert encoder.seen == 1
    assert not torch.equal(after(paths[1], 0), old)
    assert torch.equal(after(paths[2], 0), before(paths[2], 0))


def test_a_missing_image_is_named(tmp_path: Path, paths: list[str]):
    stored(tmp_path, paths)
    Path(paths[3]).unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png does not exist any more"):
        stored(tmp_path, paths)


def test_an_image_without_features_is_named(tmp_path: Path, paths: list[str]):
    features, _ = stored(tmp_path, paths[:2])
    with pytest.raises(ValueError, match=r"3\.png has no stored features.*instructblip cache"):
        features(paths[3], 0)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_smaller_types_are_close(tmp_path: Path, paths: list[str], kind: FeatureType):
    features, _ = stored(tmp_path, paths, kind)
    exact, _ = stored(tmp_path / "exact", paths)
    for path in paths:
        assert features(path, 0).dtype == torch.bfloat16
        expected = exact(path, 0)
        close = {"rtol": 2**-7, "atol": float(expected.max()) / 127}
        torch.testing.assert_close(features(path, 0).float(), expected, **close)


def test_each_token_has_its_own_scale():
    small, large = torch.randn(1, 1, 64) * 1e-3, torch.randn(1, 1, 64) * 1e3
    values, scale = quantize(torch.cat([small, large], dim=1))
    back = values.float() * scale[:, :, None]
    assert (back[0, 0] - small[0, 0]).abs().max() <= small.abs().max() / 254 * 1.01
    assert torch.isfinite(quantize(torch.zeros(1, 1, 4))[1]).all()


def test_views_are_crops_and_never_mirrored(tmp_path: Path):
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
    path = tmp_path / "ramp.png"
    Image.fromarray(np.stack([ramp] * 3, axis=2)).save(path)
    features, encoder = stored(tmp_path, [str(path)], views=6)
    assert encoder.seen == 6
    views = [features(str(path), view) for view in range(6)]
    assert len({tuple(view.flatten().tolist()) for view in views}) >= 4
    assert all(view.flatten()[7] > view.flatten()[0] for view in views), "a view is mirrored"
    assert {features.view(seed) for seed in range(100)} == set(range(6))


def test_the_frames_of_a_video_share_each_crop(tmp_path: Path):
    """Frames with the same pixels but other bytes are cropped alike, and otherwise as an image."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    paths = []
    for number in range(3):
        pixels[0, 0, 0] = number
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    shown = frozenset((path, paths[0]) for path in paths) | {(paths[1], paths[1])}

    def crops(frames: frozenset[tuple[str, str]]) -> tuple[Features, list[str]]:
        seen: list[str] = []

        def encode(pixels: Tensor) -> Tensor:
            boxes = pixels[:, :, 2:6, 2:6].flatten(1)[:, None]
            seen.extend(str(box.tolist()) for box in boxes)
            return boxes

        store = FeatureStore(tmp_path / "store", "fp32")
        features = Features(store, hash_images(paths, {}), 2, frames)
        fill(features, TRANSFORM.for_training(), encode, batch_size=2, workers=0)
        return features, seen

    separate, seen = crops(frozenset())
    assert len(seen) == 6
    features, seen = crops(shown)
    assert len(seen) == 4, "the first frame and the single image were stored before"
    for view in range(2):
        first = features(paths[0], view)
        close = {"rtol": 0, "atol": 0.1}
        torch.testing.assert_close(features(paths[1], view, paths[0]), first, **close)
        torch.testing.assert_close(features(paths[2], view, paths[0]), first, **close)
        assert (features(paths[1], view, paths[1]) - first).abs().max() > 0.5
        assert torch.equal(features(paths[1], view, paths[1]), separate(paths[1], view))


def test_a_kill_loses_only_the_shard_being_written(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(features_module, "SHARD_BYTES", 1)  # a shard for each batch
    encoder = Encoder()
    features = Features(FeatureStore(tmp_path / "store", "fp32"), hash_images(paths, {}))

    def dies(pixels: Tensor) -> Tensor:
        if encoder.seen:
            raise KeyboardInterrupt
        return encoder(pixels)

    with pytest.raises(KeyboardInterrupt):
        fill(features, TRANSFORM, dies, batch_size=2, workers=0)
    assert len(FeatureStore(tmp_path / "store", "fp32")) == 2
    _, encoder = stored(tmp_path, paths)
    assert encoder.seen == 2


def test_a_damaged_shard_is_replaced(tmp_path: Path, paths: list[str]):
    stored(tmp_path, paths)
    (shard,) = (tmp_path / "store").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.warns(RuntimeWarning, match="is damaged.*encoded again"):
        features, encoder = stored(tmp_path, paths)
    assert encoder.seen == 4
    assert features(paths[0], 0).shape == (2, 4)


def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
):
    def full(_tensors: object, path: Path, metadata: object = None) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features_module, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*features\.dtype=int8"):
        stored(tmp_path, paths)
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch, ranks: int
):
    seen = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        digests = {path: str(i) for i, path in enumerate(paths)}
        features = Features(FeatureStore(tmp_path / "store", "fp32"), digests)
        monkeypatch.setattr(FeatureStore, "__contains__", lambda self, key: False)
        monkeypatch.setattr(FeatureStore, "wait_for", lambda self, keys: self.refresh())
        encoder = Encoder()
        fill(features, TRANSFORM, encoder, batch_size=2, workers=0)
        monkeypatch.undo()
        seen.append(encoder.seen)
    assert sum(seen) == 5
    assert max(seen) - min(seen) <= 1
    assert len(FeatureStore(tmp_path / "store", "fp32")) == 5


def test_a_folder_that_lists_late_is_waited_for(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
):
    """A network disk shows what another machine wrote only after a while."""
    stored(tmp_path, paths[:3])  # by the other rank
    digests = hash_images(paths[:3], {})
    late = FeatureStore(tmp_path / "elsewhere", "fp32")
    features = Features(late, digests)
    listings = iter([[], [], [*(tmp_path / "store").iterdir()]])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 9)  # nothing is left for this rank
    monkeypatch.setattr(features_module, "LISTED_SECONDS", 0.1)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: next(listings, []))
    fill(features, TRANSFORM, Encoder(), batch_size=2, workers=0)
    assert features(paths[0], 0).shape == (2, 4)
    absent = Features(FeatureStore(tmp_path / "elsewhere", "fp32"), digests)
    with pytest.raises(OSError, match=r"features of 3 images.*set features\.root to a folder that"):
        fill(absent, TRANSFORM, Encoder(), batch_size=2, workers=0)


def test_the_name_of_a_store_depends_on_all_that_changes_features():
    names = {
        store_name(TRANSFORM, "a", "fp32"),
        store_name(TRANSFORM, "b", "fp32"),
        store_name(TRANSFORM, "a", "bf16"),
        store_name(ImageTransform(image_size=16), "a", "fp32"),
        store_name(TRANSFORM.for_training(), "a", "fp32"),
        store_name(replace(TRANSFORM.for_training(), filter="pillow"), "a", "fp32"),
        store_name(replace(TRANSFORM, window="full"), "a", "fp32"),
        store_name(replace(TRANSFORM, window=(0.0, 4095.0)), "a", "fp32"),
    }
    assert len(names) == 8
    # the name of earlier versions, so that their stores are read
    assert store_name(TRANSFORM, "a", "fp32") == "fe12a5fc272a105b"
    mirrored = TRANSFORM.for_training(crop=False).for_features()
    assert store_name(mirrored, "a", "fp32") == "fe12a5fc272a105b"


def test_features_of_a_narrow_range_are_not_those_of_earlier_versions(tmp_path: Path):
    """These clipped it to a few dark values."""
    path = tmp_path / "scan.png"
    Image.fromarray(np.linspace(0, 3459, 64).reshape(8, 8).astype(np.uint16)).save(path)
    assert hash_images([str(path)], {})[str(path)].endswith("~window")


def test_costs_show_whether_storing_saves_time(tmp_path: Path, paths: list[str]):
    dear = Costs(load=1.0, encode=10.0, write=1.0, read=1.0, nbytes=1)
    assert dear.saving(missing=10, reads=10) < 0 < dear.saving(missing=10, reads=40)
    cheap = Costs(load=1.0, encode=1.0, write=1.0, read=2.0, nbytes=1)
    assert cheap.saving(missing=1, reads=10**6) < 0
    features = Features(FeatureStore(tmp_path / "store", "fp32"), hash_images(paths, {}))
    costs = measure(features, TRANSFORM, Encoder(), 3)
    assert min(costs.load, costs.encode, costs.write, costs.read) > 0
    assert costs.nbytes >= 2 * 4 * 4
    assert not list((tmp_path / "store").iterdir())


def test_reading_is_measured_past_the_page_cache(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
):
    """The shard was just written, and memory would answer."""
    events: list[str] = []
    read = FeatureStore.read

    def advise(file: int, begin: int, end: int, advice: int) -> None:
        assert (begin, end, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        assert os.fstat(file).st_size > 3 * 2 * 4 * 4
        events.append("forget")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(
        FeatureStore, "read", lambda store, key: (events.append("read"), read(store, key))[1]
    )
    features = Features(FeatureStore(tmp_path / "store", "fp32"), hash_images(paths, {}))
    measure(features, TRANSFORM, Encoder(), 3)
    assert events[:2] == ["forget", "read"]


def test_a_kill_while_costs_are_measured_leaves_nothing(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = tmp_path / "store"
    (store / f".trial.{10**9}").mkdir(parents=True)  # as an earlier version left it
    features = Features(FeatureStore(store, "fp32"), hash_images(paths, {}))
    left = set()
    for _ in crashes(lambda: measure(features, TRANSFORM, Encoder(), 3)):
        left |= {path.name for path in store.iterdir()}
        files._recover_once.cache_clear()  # as in the next process
        measure(features, TRANSFORM, Encoder(), 3)
        assert {path.name for path in store.iterdir()} == {f".trial.{10**9}"}
    assert len(left) > 1
    monkeypatch.setattr(files, "DEAD_SECONDS", -1)  # as a day later
    fill(features, TRANSFORM, Encoder(), batch_size=2, workers=0)
    assert {path.suffix for path in store.iterdir()} == {".safetensors"}


def test_an_unchanged_image_is_not_read_again(paths: list[str]):
    known = dict(gather_facts(paths, Path(), {}))
    first = hash_images(paths, known)
    assert first == hash_images(paths, {})
    path = Path(paths[0])
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hash_images(paths, known) == first
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert hash_images(paths, known)[paths[0]] != first[paths[0]]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_a_flipped_bit_is_detected(kind: FeatureType, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, kind)
    store.write(["a#0", "b#0"], torch.randn(2, 3, 4))
    store.refresh()
    before = store.read("a#0").clone()
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last image, or in its factors
    path.write_bytes(data)
    store = FeatureStore(tmp_path, kind)
    assert torch.equal(store.read("a#0"), before)
    with pytest.raises(ValueError, match=r"image 1 are not what was written.*Delete the file"):
        store.read("b#0")


def test_stores_without_checksums_are_read(tmp_path: Path) -> None:
    features = torch.randn(1, 3, 4)
    save_file({"features": features}, tmp_path / "a.safetensors", {"keys": '["a#0"]'})
    assert torch.equal(FeatureStore(tmp_path, "fp32").read("a#0"), features[0])
