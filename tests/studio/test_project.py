"""The folder of a studio: what is read, what is written, and who is refused."""

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from instructblip.data.custom.folder import read_sides
from instructblip.data.prepared.near import look_of
from instructblip.data.reading.records import RUN_FILES
from instructblip.studio.findings import find
from instructblip.studio.project import Conflict, Project, opened, safe_name
from instructblip.studio.runs import Runs, start_of, usual_out
from tests.conftest import greedy_engine
from tests.testing import write_json_lines, write_picture


def project_of(root: Path, images: int = 0) -> Project:
    for number in range(images):
        write_picture(root / f"{number}.png", seed=number)
    return Project(root, root / "tuned")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_rows_are_what_tune_reads(tmp_path: Path) -> None:
    project = project_of(tmp_path, images=5)
    for number in range(5):
        project.save(f"{number}.png", "what is it?", f"thing {number}")
    project.save("0.png", "", "a caption\u2028of <b>two</b> lines")
    project.save("1.png", "no answer yet?", "")
    examples = [
        e for side in vars(read_sides(tmp_path)).values() for e in getattr(side, "examples", [])
    ]
    assert {(e.images[0], e.task, e.answers) for e in examples} == {
        *((f"{n}.png", "vqa", (f"thing {n}",)) for n in range(5)),
        ("0.png", "caption", ("a caption\u2028of <b>two</b> lines",)),
    }
    again = project_of(tmp_path).annotations()
    assert [row.text("question") for row in again][-1] == "no answer yet?"
    assert len(again) == 7


def test_a_row_moves_between_the_files(tmp_path: Path) -> None:
    project = project_of(tmp_path, images=1)
    row = project.save("0.png", "what?", "")
    assert row is not None
    assert not (tmp_path / "metadata.jsonl").read_text()
    row = project.save("0.png", "what?", "this", row.id, row.version)
    assert row is not None
    assert [r["answer"] for r in rows_of(tmp_path / "metadata.jsonl")] == ["this"]
    assert not (tmp_path / ".studio/unanswered.jsonl").read_text()
    assert project.save("0.png", "", "", row.id, row.version) is None
    assert project_of(tmp_path).annotations() == []


def test_two_windows_lose_nothing(tmp_path: Path) -> None:
    project = project_of(tmp_path, images=1)
    row = project.save("0.png", "q?", "one")
    assert row is not None
    project.save("0.png", "q?", "two", row.id, row.version)
    with pytest.raises(Conflict) as refused:
        project.save("0.png", "q?", "three", row.id, row.version)
    current = refused.value.current
    assert current is not None
    assert current.text("answer") == "two"
    project.save("0.png", "", "", row.id, current.version)
    with pytest.raises(Conflict) as refused:
        project.save("0.png", "q?", "four", row.id, current.version)
    assert refused.value.current is None


def test_two_windows_that_begin_the_same_row(tmp_path: Path) -> None:
    project = project_of(tmp_path, images=1)
    project.save("0.png", "q?", "")
    row = project.save("0.png", "q?", "yellow")
    assert row == project.save("0.png", "q?", "yellow")
    with pytest.raises(Conflict) as refused:
        project.save("0.png", "q?", "red")
    assert refused.value.current == row
    assert project.annotations() == [row]


CSV = "file_name,question,answer,patient_id,split\na.png,q?,yes,p1,train\nb.png,q?,no,p2,val\n"


@pytest.mark.parametrize(
    ("files", "kept", "gone"),
    [
        ({"metadata.csv": CSV}, "metadata.csv.before", "metadata.csv"),
        ({"mine.csv": CSV}, "mine.csv", ""),
        ({"a.txt": "one caption\nanother", "b.txt": "a third"}, "a.txt", ""),
        ({"metadata.jsonl": '{"file_name":"a.png","caption":"c"}\n'}, "metadata.jsonl.before", ""),
    ],
)
def test_other_forms_are_opened_and_kept(
    files: dict[str, str], kept: str, gone: str, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_picture(tmp_path / name, seed=ord(name[0]))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    project = project_of(tmp_path)
    before = {(row.images, row.text("answer")) for row in project.annotations()}
    versions = {row.id: row.version for row in project.annotations()}
    assert before
    assert {path.name for path in tmp_path.glob("*.*")} >= files.keys(), "nothing is written yet"
    project.save("c.png", "q?", "new")
    after = project_of(tmp_path).annotations()
    assert before < {(row.images, row.text("answer")) for row in after}
    assert versions.items() <= {row.id: row.version for row in after}.items()
    assert (tmp_path / kept).read_text() == files.get(kept.removesuffix(".before"))
    assert not gone or not (tmp_path / gone).exists()
    if "split" in str(files):
        assert {r["split"] for r in rows_of(tmp_path / "metadata.jsonl")} == {"train", "val"}
        assert "p1" in (tmp_path / "metadata.jsonl").read_text()
        assert len(read_sides(tmp_path).validation) == 1


def test_tables_of_splits_become_one(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_picture(tmp_path / f"{split}.png", seed=len(split))
        write_json_lines(
            tmp_path / f"{split}.jsonl", {"file_name": f"{split}.png", "caption": split}
        )
    project_of(tmp_path).settle()
    assert {(r["file_name"], r["split"]) for r in rows_of(tmp_path / "metadata.jsonl")} == {
        ("train.png", "train"),
        ("val.png", "val"),
    }
    sides = read_sides(tmp_path)
    assert (len(sides.training), len(sides.validation)) == (1, 1)


def test_tables_of_folders_become_one(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        write_picture(tmp_path / name / "x.png", seed=ord(name[0]))
        table = tmp_path / name / "metadata.jsonl"
        write_json_lines(table, {"file_name": "x.png", "caption": name})
    project_of(tmp_path).settle()
    written = rows_of(tmp_path / "metadata.jsonl")
    assert [row["file_name"] for row in written] == ["cats/x.png", "dogs/x.png"]
    assert len(project_of(tmp_path).annotations()) == 2, "each row once"
    assert (tmp_path / "cats/metadata.jsonl.before").is_file()


def split_folder(root: Path) -> None:
    """Tables of splits that count their rows from 0, one of them a CSV, and images without any."""
    for name in ("train/a.png", "train/deep/b.png", "valid/c.png", "test/d.png", "beside.png"):
        write_picture(root / name, seed=ord(name[-5]))
    table = "id,file_name,question,answer,site\n0,a.png,q?,yes,s1\n1,deep/b.png,q?,no,s2\n"
    (root / "train/metadata.csv").write_text(table)
    held = {"id": 0, "file_name": "c.png", "question": "q?", "answer": "yes", "site": "s3"}
    write_json_lines(root / "valid/metadata.jsonl", held)
    write_json_lines(root / "mine.jsonl", {"file_name": "beside.png", "caption": "c"})


def files_of(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def test_folders_of_splits_are_read_and_written_in_their_place(tmp_path: Path) -> None:
    split_folder(tmp_path)
    before = files_of(tmp_path)
    project = project_of(tmp_path)
    assert project.images() == ["train/a.png", "train/deep/b.png", "valid/c.png", "test/d.png"]
    first = {row.images[0]: row for row in project.annotations()}
    assert {name: row.text("answer") for name, row in first.items()} == {
        "train/a.png": "yes",
        "train/deep/b.png": "no",
        "valid/c.png": "yes",
    }
    assert len({row.id for row in first.values()}) == 3
    splits = [project.split_of(name, ()) for name in project.images()]
    assert splits == ["train", "train", "val", "test"]
    assert files_of(tmp_path) == before, "nothing is written yet"
    held = first["valid/c.png"]
    project.save("valid/c.png", "q?", "maybe", held.id, held.version)
    project.save("test/d.png", "q?", "no")
    project.save("train/a.png", "why?", "so")
    assert project.add_image("a.png", write_picture(tmp_path / "o.png", seed=9).read_bytes()) == (
        "train/a-2.png",
        True,
    )
    after = files_of(tmp_path)
    assert {before[name] for name in before} <= {*after.values()}, "all is still there"
    assert after["train/metadata.csv.before"] == before["train/metadata.csv"]
    assert after["valid/metadata.jsonl.before"] == before["valid/metadata.jsonl"]
    assert after["mine.jsonl"] == before["mine.jsonl"]
    assert rows_of(tmp_path / "valid/metadata.jsonl") == [
        {"id": 0, "file_name": "c.png", "question": "q?", "answer": "maybe", "site": "s3"}
    ]
    table = rows_of(tmp_path / "train/metadata.jsonl")
    assert [(row["file_name"], row["answer"]) for row in table] == [
        ("a.png", "yes"),
        ("deep/b.png", "no"),
        ("a.png", "so"),
    ]
    assert {row.get("site") for row in table} == {"s1", "s2", None}
    again = {row.id for row in project_of(tmp_path).annotations()}
    assert {row.id for row in first.values()} <= again
    sides = read_sides(tmp_path)
    assert sides.by == "files"
    assert sides.test is not None
    shown = [sorted(side.images) for side in (sides.training, sides.validation, sides.test)]
    assert shown == [["train/a.png", "train/deep/b.png"], ["valid/c.png"], ["test/d.png"]]
    with pytest.raises(ValueError, match="is in none of the folders"):
        project.save("beside.png", "q?", "x")


def test_a_split_without_answers_does_not_stop_tuning(tmp_path: Path) -> None:
    split_folder(tmp_path)
    project_of(tmp_path).settle()
    sides = read_sides(tmp_path)
    assert (len(sides.training), len(sides.validation), sides.test) == (2, 1, None)


def test_a_split_that_tune_would_train_on_is_refused(tmp_path: Path) -> None:
    for name in ("x.png", "val/y.png"):
        write_picture(tmp_path / name)
    with pytest.raises(ValueError, match=r"none called train.*rename val"):
        project_of(tmp_path)


def test_a_row_about_an_image_of_another_split_is_refused(tmp_path: Path) -> None:
    split_folder(tmp_path)
    row = {"file_name": str(tmp_path / "train/a.png"), "caption": "c"}
    write_json_lines(tmp_path / "valid/metadata.jsonl", row)
    with pytest.raises(ValueError, match=r"metadata.jsonl.*expected one below .*valid"):
        project_of(tmp_path)


def test_a_folder_that_is_split_meanwhile_loses_nothing(tmp_path: Path) -> None:
    project = project_of(tmp_path, images=1)
    row = project.save("0.png", "q?", "one")
    write_picture(tmp_path / "train/x.png")
    assert row is not None
    with pytest.raises(ValueError, match=r"were added .* start it again"):
        project.save("0.png", "q?", "two", row.id, row.version)
    assert [row["answer"] for row in rows_of(tmp_path / "metadata.jsonl")] == ["one"]


def test_folders_that_are_labels_are_answers(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        for number in range(2):
            write_picture(tmp_path / name / f"{number}.png", seed=number)
    project = project_of(tmp_path)
    answers = {row.images[0]: row.text("answer") for row in project.annotations()}
    project.settle()
    after = {row.images[0]: row.text("answer") for row in project_of(tmp_path).annotations()}
    names = [f"{name}/{number}.png" for name in ("cats", "dogs") for number in range(2)]
    assert answers == after == {name: name.split("/")[0] for name in names}


def test_a_broken_table_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"\n')
    with (
        pytest.raises(ValueError, match=r"metadata.jsonl.*line 1"),
        opened(tmp_path, tmp_path / "o"),
    ):
        pass
    assert (tmp_path / "metadata.jsonl").read_text() == '{"file_name": "a.png"\n'


def test_an_edit_by_hand_is_seen(tmp_path: Path) -> None:
    project = project_of(tmp_path, images=1)
    project.save("0.png", "q?", "one")
    write_json_lines(tmp_path / "metadata.jsonl", {"file_name": "0.png", "caption": "by hand"})
    assert [row.text("answer") for row in project.annotations()] == ["by hand"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd.png", "passwd"),
        ("C:\\Users\\me\\photo.PNG", "photo"),
        ("<img src=x onerror=alert(1)>.png", "_img src=x onerror=alert(1)_"),
        ("a|b\0c\u202ed.png", "a_bcd"),
        (".hidden", "hidden"),
        ("..", "picture"),
        ("照片.jpg", "照片"),
        ("\ud800x.png", "x"),
    ],
)
def test_names_are_safe(name: str, safe: str) -> None:
    assert safe_name(name) == safe
    assert len(safe_name("长" * 300 + ".png").encode()) <= 120


def test_images_are_added_once_and_replace_nothing(tmp_path: Path) -> None:
    project = project_of(tmp_path)
    first, other = (write_picture(tmp_path / "o" / f"{n}.png", seed=n).read_bytes() for n in (1, 2))
    (tmp_path / "o/1.png").unlink()
    (tmp_path / "o/2.png").unlink()
    assert project.add_image("a.png", first) == ("a.png", True)
    assert project.add_image("b.png", first) == ("a.png", False)
    assert project.add_image("A.PNG", other) == ("A-2.PNG", True)
    assert (tmp_path / "a.png").read_bytes() == first
    with pytest.raises(ValueError, match="not an image"):
        project.add_image("a.png", b"PK\3\4")


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("Ampel 0.JPG", "Ampel 0.JPG"),
        ("a.jpeg", "a.jpeg"),
        ("a.JPEG", "a.JPEG"),
        ("a.png", "a.jpg"),
        ("a", "a.jpg"),
    ],
)
def test_a_name_keeps_the_suffix_of_its_format(name: str, stored: str, tmp_path: Path) -> None:
    """A table that names the originals fits the stored images."""
    data = io.BytesIO()
    Image.new("RGB", (9, 9)).save(data, "JPEG")
    project = project_of(tmp_path)
    assert project.add_image(name, data.getvalue()) == (stored, True)
    assert project.images() == [stored]


def test_a_row_of_a_missing_image_can_be_emptied_and_removed(tmp_path: Path) -> None:
    project = project_of(tmp_path, images=1)
    row = project.save("0.png", "q?", "one")
    (tmp_path / "0.png").unlink()
    assert row is not None
    row = project.save("0.png", "q?", "", row.id, row.version)
    assert row is not None
    assert not (tmp_path / "metadata.jsonl").read_text()
    assert project.save("0.png", "", "", row.id, row.version) is None
    assert project.annotations() == []
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        project.save("0.png", "q?", "a new row")


def test_no_path_leaves_the_folder(tmp_path: Path) -> None:
    project = project_of(tmp_path / "in", images=1)
    outside = write_picture(tmp_path / "out.png")
    (tmp_path / "in/link.png").symlink_to(outside)
    for name in ("../out.png", str(outside), "link.png", ".studio/lock", "no.png", ""):
        with pytest.raises((ValueError, FileNotFoundError)):
            project.path_of(name)
    assert project.images() == ["0.png", "link.png"]


def test_images_of_runs_are_not_of_the_folder(tmp_path: Path) -> None:
    for name in ("tuned/run/curves.png", "tuned-2/run/curves.png", ".x/a.png", "tuned.png"):
        write_picture(tmp_path / name)
    assert project_of(tmp_path).images() == ["tuned.png"]


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = project_of(tmp_path, images=1)
    row = project.save("0.png", "q?", "one")
    assert row is not None
    image = write_picture(tmp_path / "o.png", seed=9).read_bytes()
    (tmp_path / "o.png").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(path: Path, *_: Any, **__: Any) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            project.save("0.png", "q?", "two", row.id, row.version)
        with pytest.raises(OSError, match="No space"):
            project.add_image("new.png", image)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert project.save("0.png", "q?", "two", row.id, row.version) is not None


KILLED = """
import os, signal, sys
from pathlib import Path
from instructblip.studio.project import Project
def half(path, data, **_):
    with path.open("wb") as file:
        file.write((data if isinstance(data, bytes) else data.encode())[:9])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = Path.write_text = half
root = Path(sys.argv[1])
project = Project(root, root / "tuned")
if sys.argv[2] == "image":
    project.add_image("new.png", (root / "0.png").read_bytes() + b"x")
else:
    row = project.annotations()[0]
    project.save("0.png", "q?", "two", row.id, row.version)
"""


@pytest.mark.parametrize("what", ["image", "row"])
def test_a_kill_while_writing_leaves_no_part(what: str, tmp_path: Path) -> None:
    project_of(tmp_path, images=1).save("0.png", "q?", "one")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), what], env=env)
    assert killed.returncode == -signal.SIGKILL
    project = project_of(tmp_path)
    assert project.images() == ["0.png"]
    assert [row.text("answer") for row in project.annotations()] == ["one"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]


def test_two_studios_on_one_folder(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "x", tmp_path / "o"),
        pytest.raises(ValueError, match=r"another studio is open on .*Ctrl-C"),
        opened(tmp_path / "x", tmp_path / "o"),
    ):
        pass
    with opened(tmp_path / "x", tmp_path / "o"):
        pass


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may write everywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_folder_without_write_permission(
    has_folder: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    for path in (tmp_path, *list(tmp_path.parents)[:3]):
        path.chmod(path.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    folder.chmod(0o555)
    request.getfixturevalue("as_nobody")
    place = folder if has_folder else folder / "new"
    with pytest.raises(ValueError, match="may not be written by you"), opened(place, folder / "o"):
        pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    for place in (tmp_path / "x", tmp_path / "no" / "y"):
        with pytest.raises(ValueError, match="is not a folder"), opened(place, tmp_path / "o"):
            pass


def test_findings_stand_at_their_image(tmp_path: Path, model_folder: Path) -> None:
    project = project_of(tmp_path, images=4)
    Image.open(tmp_path / "0.png").save(tmp_path / "copy.bmp")
    project.save("0.png", "q?", "yes")
    project.save("copy.bmp", "q?", "no")
    project.save("1.png", "q?", "TODO")
    project.save("2.png", "q?", "x" * 400)
    project.save("3.png", "q?", "a")
    project.save("3.png", "Q?", "b")
    names = project.images()
    looks = {name: look_of(Image.open(tmp_path / name)) for name in names}
    (tmp_path / "1.png").unlink()
    tokens = greedy_engine(model_folder).tokens
    found = find(project, project.annotations(), project.images(), looks, {"2.png": "cut"}, tokens)
    assert {(f.image, f.kind, f.bad) for f in found} == {
        ("copy.bmp", "conflict", False),
        ("1.png", "placeholder", True),
        ("1.png", "missing", True),
        ("2.png", "over-long answer", False),
        ("2.png", "unreadable", True),
        ("3.png", "twice", False),
    }
    (tmp_path / "3.png").unlink()
    for row in project.annotations()[-2:]:
        project.save("3.png", row.text("question"), "", row.id, row.version)
    found = find(project, project.annotations(), project.images(), {}, {}, tokens)
    missing = [(f.image, f.bad) for f in found if f.kind == "missing"]
    assert missing == [("1.png", True), ("3.png", False), ("3.png", False)], "by `tune` unread"


def test_runs_are_numbered_and_never_replaced(tmp_path: Path) -> None:
    project = project_of(tmp_path)
    runs = Runs(project, tmp_path / "tuned", "starter")
    assert runs.latest is None
    for name in ("tuned", "tuned-2", "tuned-10", "tuned-x"):
        (tmp_path / name / "run").mkdir(parents=True)
    assert runs.latest == tmp_path / "tuned-10"
    assert runs._next() == tmp_path / "tuned-11"
    assert runs.state()["status"] == "stopped"
    (tmp_path / "tuned-2/report.html").touch()
    assert runs.finished == tmp_path / "tuned-2"


def test_the_newest_run_of_a_folder_is_opened(tmp_path: Path) -> None:
    """Where `tune --out` wrote it: in the folder, or beside it, but not of another folder."""
    root = tmp_path / "mine"
    root.mkdir()
    assert [usual_out(one).name for one in (root, tmp_path / "new")] == ["tuned", "tuned"]
    for age, (place, data) in enumerate(
        [("other", tmp_path / "o"), ("mine/first", root), ("second", root)]
    ):
        run = tmp_path / place
        write_picture(run / "run/curves.png")
        for name in RUN_FILES:
            (run / "run" / name).touch()
        recipe = f"data: {{root: {data}}}\nmodel: {{start: small}}\n"
        (run / "recipe.yaml").write_text(recipe)
        os.utime(run / "recipe.yaml", (age, age))
    assert usual_out(root) == tmp_path / "second"
    assert start_of(tmp_path / "second") == "small"
    (tmp_path / "second/recipe.yaml").unlink()
    assert usual_out(root) == root / "first"
    assert Project(root, tmp_path / "x").images() == [], "the curves are no image of the folder"
    (root / "first").rename(root / "tuned-2")
    assert usual_out(root) == root / "tuned"
    assert start_of(root / "tuned") is None
