"""Crash every writer at every change that it makes to the disk: a reader finds old or new."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from instructblip.core import files
from instructblip.core.files import (
    current,
    cut_last_line,
    locked,
    put_directory,
    recover,
    remove_directory,
    replacing,
    replacing_directory,
    whole_lines,
    write_json,
    write_text,
)
from instructblip.data.features import FeatureStore
from instructblip.evaluation.predictions import PredictionLog, read_predictions
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.checkpoints.weights import read_weights, write_pickle
from instructblip.model.instructblip import InstructBlip
from instructblip.training.checkpoint import load_latest, save_checkpoint
from instructblip.training.run_directory import RunFiles
from tests.core.crash import crashes, in_child
from tests.parity.tiny import tiny_transformers


class Case(NamedTuple):
    """A thing that is written as a version and read back as one; None if there is none.

    ``left`` are the names that the folder has afterwards, if they are known.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], int | None]
    left: set[str]


def next_process(write: Callable[[], object]) -> None:
    """What the next process does: this one forgets which folders it has recovered."""
    files._recover_once.cache_clear()
    write()


def write_directory(folder: Path, version: int) -> None:
    with replacing_directory(folder / "thing") as directory:
        (directory / "inside").mkdir()
        for name in ("a", "inside/b"):
            (directory / name).write_text(str(version))


def read_directory(folder: Path) -> int | None:
    directory = current(folder / "thing")
    if not directory.is_dir():
        return None
    first, second = ((directory / name).read_text() for name in ("a", "inside/b"))
    assert first == second
    return int(first)


def write_filled(folder: Path, version: int) -> None:
    """As ``prepare`` does: a folder that is filled by one process after the other, then put."""
    part = folder / ".thing.part"
    (part / "inside").mkdir(parents=True, exist_ok=True)
    for name in ("a", "inside/b"):
        (part / name).write_text(str(version))
    recover(folder)
    put_directory(part, folder / "thing")


def write_file(folder: Path, version: int) -> None:
    write_text(folder / "thing", str(version) * 9)


def read_file(folder: Path) -> int | None:
    path = folder / "thing"
    if not path.exists():
        return None
    text = path.read_text()
    assert len(text) == 9
    return int(text[0])


def write_torch(folder: Path, version: int) -> None:
    write_pickle({"version": version}, folder / "thing.pth")


def read_torch(folder: Path) -> int | None:
    path = folder / "thing.pth"
    return torch.load(path)["version"] if path.exists() else None


def write_step(folder: Path, version: int) -> None:
    recover(folder)
    values = {"a": torch.full((3,), float(version))}
    save_checkpoint(folder, version, values, {"version": version}, {"version": version})


def read_step(folder: Path) -> int | None:
    checkpoint = load_latest(folder)
    if checkpoint is None:
        return None
    version = checkpoint.progress["version"]
    assert checkpoint.optimizer["version"] == version
    assert torch.equal(checkpoint.parameters["a"], torch.full((3,), float(version)))
    return version


def write_best(folder: Path, version: int) -> None:
    """What a validation with a new best score does in a run directory."""

    def export(path: Path) -> None:
        (path / "config.json").write_text(str(version))
        (path / "model.safetensors").write_text(str(version))

    run = RunFiles(folder, keep_last=1, export=export, notes={"recipe.yaml": str(version)})
    run.restore({}, torch.optim.SGD([torch.zeros(1)]), resume=True)
    run.export_to("best")


def read_best(folder: Path) -> int | None:
    try:
        directory = model_directory(folder)
    except FileNotFoundError:
        return None
    files = ("config.json", "model.safetensors", "recipe.yaml")
    versions = {(directory / name).read_text() for name in files}
    assert len(versions) == 1
    return int(versions.pop())


def write_features(folder: Path, version: int) -> None:
    """A second shard beside the first; a shard itself never changes."""
    store = FeatureStore(folder, "fp32")
    store.write([f"image {version}"], torch.full((1, 2, 3), float(version)))
    recover(folder)


def read_features(folder: Path) -> int | None:
    store = FeatureStore(folder, "fp32")
    for version in range(1, len(store) + 1):
        assert torch.equal(store.read(f"image {version}"), torch.full((2, 3), float(version)))
    return len(store) or None


CASES = {
    "file": Case(write_file, read_file, {"thing"}),
    "torch file": Case(write_torch, read_torch, {"thing.pth"}),
    "directory": Case(write_directory, read_directory, {"thing"}),
    "filled directory": Case(write_filled, read_directory, {"thing"}),
    "checkpoint": Case(write_step, read_step, {"step_000001", "step_000002"}),
    "best of a run": Case(write_best, read_best, {"best"}),
    "features": Case(write_features, read_features, set()),
}


@pytest.mark.parametrize("before", [None, 1], ids=["nothing before", "over an old one"])
@pytest.mark.parametrize("name", CASES)
def test_a_crash_at_any_moment_leaves_the_old_one_or_the_new_one(tmp_path, name, before):
    case, new = CASES[name], (before or 0) + 1
    start, folder = tmp_path / "start", tmp_path / "folder"
    start.mkdir()
    if before:
        case.write(start, before)
    shutil.copytree(start, folder)
    seen = set()
    for moment in crashes(lambda: case.write(folder, new)):
        version = case.read(folder)
        seen.add(version)
        assert version in (before, new), f"after a crash in front of change {moment}"
        next_process(lambda: case.write(folder, new))
        assert case.read(folder) == new
        hidden = {path.name for path in folder.rglob(".*")}
        assert not hidden, f"left after a crash in front of change {moment}"
        assert not case.left or {path.name for path in folder.iterdir()} <= case.left
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
    assert seen == {before, new}, "the crashes reach past the moment at which the new one counts"


def test_a_crash_in_an_export_over_an_export(tmp_path):
    """A whole model with its files, written over one of other weights."""
    tiny_transformers("opt").save_pretrained(tmp_path / "source")
    models = []
    for value in (1.0, 2.0):
        model = InstructBlip.from_pretrained(tmp_path / "source")
        torch.nn.init.constant_(model.query_tokens, value)
        models.append(model)
    out = tmp_path / "out" / "model"
    models[0].save_pretrained(out)
    names = {path.name for path in out.iterdir()}
    kept = set()
    for _ in crashes(lambda: models[1].save_pretrained(out)):
        directory = model_directory(out)
        value = read_weights(directory)["query_tokens"].unique().item()
        kept.add(value)
        assert {path.name for path in directory.iterdir()} == names
        next_process(lambda: models[0].save_pretrained(out))
        assert [path.name for path in out.parent.iterdir()] == ["model"]
        assert read_weights(out)["query_tokens"].unique().item() == 1.0
    assert kept == {1.0, 2.0}


def test_a_crash_while_a_directory_is_removed(tmp_path):
    write_directory(tmp_path, 1)
    for _ in crashes(lambda: remove_directory(tmp_path / "thing")):
        assert read_directory(tmp_path) in (None, 1)  # never one that lacks a file
        next_process(lambda: write_directory(tmp_path, 1))
        assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_crash_cuts_at_most_the_last_line_of_a_growing_file(tmp_path):
    def add(number: int) -> None:
        with PredictionLog(tmp_path, {"model": "m"}) as log:
            if str(number) not in log.done:
                log.add([{"id": str(number), "index": number}])

    add(0)
    path = tmp_path / "predictions.jsonl"
    start = path.read_bytes()
    for _ in crashes(lambda: add(1)):
        assert [p["id"] for p in read_predictions(path)] in (["0"], ["0", "1"])
        path.write_bytes(start)
    with path.open("ab") as file:
        file.write(b'{"id": "2", "ind')
    assert len(read_predictions(path)) == 2
    add(3)
    assert [p["id"] for p in read_predictions(path)] == ["0", "1", "3"]


def test_a_line_is_whole_with_its_line_feed(tmp_path):
    path = tmp_path / "lines"
    assert whole_lines(path) == []
    cut_last_line(path)
    for content, whole in ((b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"a", b"")):
        path.write_bytes(content)
        assert whole_lines(path) == whole.split(b"\n")[:-1]
        cut_last_line(path)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("number", range(14))
def test_an_error_at_any_moment_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch, number):
    """The process continues, and what it could not remove is removed by the next writer."""
    write_directory(tmp_path, 1)
    calls = 0

    def failing(function):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == number + 1:
                raise OSError(28, "No space left on device")
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "fsync", "rename"):
            patch.setattr(os, name, failing(getattr(os, name)))
        try:
            write_directory(tmp_path, 2)
        except OSError:
            assert read_directory(tmp_path) in (1, 2)
    assert calls > 0
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert read_directory(tmp_path) in (1, 2)


# --- processes side by side ----------------------------------------------------------------------


def test_what_a_live_process_writes_is_left_alone(tmp_path):
    with replacing(tmp_path / "file") as file, replacing_directory(tmp_path / "thing") as directory:
        file.write_text("mine")
        for name in ("a", "b"):
            (directory / name).write_text("mine")

        def others() -> None:
            recover(tmp_path)
            write_text(tmp_path / "file", "theirs")
            write_directory(tmp_path, 7)

        in_child(others)
        recover(tmp_path)
        assert (tmp_path / "file").read_text() == "theirs"
        assert read_directory(tmp_path) == 7
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thing"]
    assert (tmp_path / "thing" / "b").read_text() == "mine"


def test_processes_that_replace_one_directory_at_a_time(tmp_path):
    write_directory(tmp_path, 1)
    children = []
    for version in (2, 3, 4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(40):
                    write_directory(tmp_path, version)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert read_directory(tmp_path) in (2, 3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_leftovers_of_another_machine_count_as_dead_after_a_day(tmp_path, monkeypatch):
    (tmp_path / ".thing.0123abcd-1-0.new").write_text("half")
    recover(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(files, "DEAD_SECONDS", -1.0)
    recover(tmp_path)
    assert not list(tmp_path.iterdir())


# --- what earlier versions left ------------------------------------------------------------------


@pytest.mark.parametrize("old", [".old-thing", ".thing.old", ".thing.4711.old"])
def test_a_directory_that_an_earlier_version_moved_aside_is_read(tmp_path, monkeypatch, old):
    write_directory(tmp_path, 1)
    (tmp_path / "thing").rename(tmp_path / old)
    for name in (".new-thing", ".thing.new"):
        (tmp_path / name).mkdir()
    (tmp_path / ".notes.txt.4711.tmp").write_text("half")
    assert read_directory(tmp_path) == 1
    monkeypatch.setattr(files, "DEAD_SECONDS", -1.0)  # as a day later
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert read_directory(tmp_path) == 1


def test_a_run_whose_best_was_moved_aside_holds_a_model(tmp_path):
    """What the last version left after a kill between the two renames of best/."""
    best = tmp_path / ".old-best"
    best.mkdir()
    (best / "config.json").write_text("{}")
    assert model_directory(tmp_path) == best


def test_hidden_files_of_the_user_are_left_alone(tmp_path):
    names = {".bashrc.old", ".profile.new", ".old-mail", ".cache.123.tmp"}
    for name in names:
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "answers.jsonl", "{}")
    write_directory(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == names | {"answers.jsonl", "thing"}


# --- special cases -------------------------------------------------------------------------------


def test_a_file_is_not_replaced_by_a_directory(tmp_path):
    (tmp_path / "thing").write_text("a file")
    with pytest.raises(FileExistsError, match=r"thing is a file.*choose another name"):
        write_directory(tmp_path, 1)


def test_a_directory_behind_a_link_is_replaced_where_it_is(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "thing").symlink_to(tmp_path / "disk" / "thing")
    write_directory(tmp_path, 1)
    write_directory(tmp_path, 2)
    assert (tmp_path / "thing").is_symlink()
    (tmp_path / "disk" / "thing").rename(tmp_path / "disk" / ".thing.old")
    assert read_directory(tmp_path) == 2


def test_json_that_others_cannot_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"score": float("nan")})
    write_json(tmp_path / "b" / "a.json", {"score": "ä"})
    assert json.loads((tmp_path / "b" / "a.json").read_text(encoding="utf-8")) == {"score": "ä"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_lock_is_refused_while_it_is_held_and_free_after_a_kill(tmp_path):
    """What the killed process had forked is alive and does not keep the lock."""
    lock, (reader, writer) = tmp_path / "run" / ".lock", os.pipe()
    if (process := os.fork()) == 0:
        with locked(lock):
            child = os.fork()
            if child:
                os.write(writer, str(child).encode())
            time.sleep(600)
        os._exit(1)
    child = int(os.read(reader, 20))
    try:
        refused = pytest.raises(ValueError, match=r"another process is at work in .*run: wait")
        with refused, locked(lock, wait=False):
            pass
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.kill(child, 0)
        with locked(lock, wait=False):
            shutil.rmtree(lock.parent)
    finally:
        os.kill(child, signal.SIGKILL)
    with locked(lock, wait=False):
        assert lock.is_file()
