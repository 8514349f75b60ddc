"""The picture world, on packages that the tests make: what is held out stays out of training."""

import itertools
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from instructblip.cli.main import main
from instructblip.data.sources import SOURCES
from instructblip.scenes.pictures import world as pictures
from instructblip.scenes.pictures.catalog import EMOJI, STAMPS, noun, read_catalog
from instructblip.scenes.pictures.packages import PACKAGES, fetch
from instructblip.scenes.pictures.world import (
    SETS,
    UNSEEN_STYLE,
    World,
    page_captions,
    write_pictures,
)

GROUPS = {"animal-mammal": "mammal", "food-fruit": "fruit", "tool": "tool", "clothing": "clothing"}
SYLLABLES = [f"{a}{b}" for a, b in itertools.product("bdfgklmn", ("ab", "ep", "ir", "ok", "un"))]
NAMES = {
    word: list(GROUPS)[i % len(GROUPS)]
    for i, word in enumerate([*SYLLABLES, *(f"{s}{s}" for s in SYLLABLES)])
}
COLOURS = {
    "google": (200, 0, 0),
    "twitter": (0, 200, 0),
    "openmoji": (200, 200, 0),
    "fluent": (0, 0, 200),
    "tux": (90, 90, 90),
}
SOURCE_OF = {
    "composites": "coco_caption",
    "named": "okvqa",
    "places": "okvqa",
    "kind_new": "okvqa",
    "photos": "aokvqa",
    "compare": "gqa",
}


def picture(style: str, path) -> None:
    """A disc in the colour of its style, on nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 40">'
            f'<ellipse cx="20" cy="20" rx="12" ry="16" fill="rgb{COLOURS[style]}"/></svg>'
        )
        return
    image = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(image).ellipse((8, 4, 31, 35), fill=COLOURS[style])
    image.save(path, lossless=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    root = tmp_path_factory.mktemp("packages")
    english = root / "emojibase" / "package" / "en"
    english.mkdir(parents=True)
    groups = [{"key": key, "order": i} for i, key in enumerate([*GROUPS, "face-smiling"])]
    records = [
        {"label": name, "hexcode": f"{1000 + i:X}", "subgroup": list(GROUPS).index(group)}
        for i, (name, group) in enumerate(NAMES.items())
    ]
    records.append({"label": "grin", "hexcode": "1F600", "subgroup": len(GROUPS)})
    (english / "messages.json").write_text(json.dumps({"subgroups": groups}))
    (english / "data.json").write_text(json.dumps(records))
    for style, (folder, suffix) in EMOJI.items():
        for record in records:
            code = record["hexcode"] if style == "openmoji" else record["hexcode"].lower()
            picture(style, root / style / folder / f"{code}{suffix}")
    for i, name in enumerate([*NAMES][:20]):
        stem = root / "tux" / STAMPS / "household" / "tools" / f"{i}"
        picture("tux", stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(f"A {name}.\nde.utf8=Ein {name}.\n")
    return root


@pytest.fixture(scope="module")
def world(packages, tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("world"), packages, scale=0.05)


def examples_of(world, name: str, split: str):
    return list(SOURCES[SOURCE_OF.get(name, name)].read(world[name], split))


def colours_in(path) -> set[str]:
    """The styles that an image shows."""
    pixels = np.asarray(Image.open(path).convert("RGB"), int).reshape(-1, 3)
    return {
        style
        for style, colour in COLOURS.items()
        if (np.abs(pixels - colour).max(1) < 30).sum() > 100
    }


@pytest.mark.parametrize("name", SETS)
def test_official_readers_read_every_set(world, name):
    for split in SETS[name][1]:
        examples = examples_of(world, name, split)
        assert len(examples) >= 2
        for example in examples:
            assert example.answers
            assert (world[name] / "images" / example.images[0]).is_file()
            assert not example.choices or example.answers[0] in example.choices


def test_training_shows_neither_held_out_names_nor_the_unseen_style(packages, world):
    new = World(read_catalog(packages)).new_names
    assert len(new) > 5
    trained = [name for name, (_, sizes) in SETS.items() if "train" in sizes]
    assert len(trained) == 6
    for name in trained:
        for example in examples_of(world, name, "train"):
            texts = [example.question, *example.answers, *example.choices]
            assert not {*new} & {*" ".join(texts).replace("?", " ").split()}
            assert UNSEEN_STYLE not in colours_in(world[name] / "images" / example.images[0])


def test_what_is_evaluated_was_not_trained_on(packages, world):
    worlds = World(read_catalog(packages))
    for name in ("vizwiz", "scienceqa", "nocaps"):
        split = next(iter(SETS[name][1]))
        answers = {answer for e in examples_of(world, name, split) for answer in e.answers}
        assert all({*a.replace(",", "").split()} & {*worlds.new_names} for a in answers)
    for name in ("named", "places", "vsr", "gqa", "iconqa", "compare"):
        split = [*SETS[name][1]][-1]
        for example in examples_of(world, name, split):
            assert colours_in(world[name] / "images" / example.images[0]) == {UNSEEN_STYLE}
    photos = {p.path for p in worlds.photos}
    assert photos
    assert not photos & {p.path for p in worlds.train}


def test_statements_comparisons_and_counts_are_true_half_of_the_time(packages):
    worlds = World(read_catalog(packages))
    rng = pictures.random.Random(0)
    for _ in range(30):
        _, shown = pictures.composite(worlds, worlds.train, rng)
        asked = pictures.ask_composite(worlds, shown, rng)
        names = {p.name for p in shown.values()}
        if asked.kind == "count":
            assert asked.answer == str(len(shown))
        elif asked.kind == "where":
            assert (
                shown[asked.question.removeprefix("what is at the ").rstrip("?")].name
                == asked.answer
            )
        else:
            named = any(f"{pictures.named(name)} in the" in asked.question for name in names)
            assert (asked.answer == "yes") == named


def test_the_seed_determines_the_world(packages, world, tmp_path):
    again = write_pictures(tmp_path, packages, scale=0.05)
    for name in ("vqav2", "iconqa"):
        files = sorted(p for p in world[name].rglob("*") if p.is_file())
        assert files
        for file in files:
            assert (again[name] / file.relative_to(world[name])).read_bytes() == file.read_bytes()


def test_a_name_is_one_to_three_plain_words():
    assert noun("cow face") == "cow"
    assert noun("woman’s boot") == "woman's boot"
    assert not any(map(noun, ("Statue of Liberty", "map of the whole world", "pool 8 ball")))


def test_missing_packages_are_named_with_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pictures", "write", str(tmp_path / "out"), "--packages", str(tmp_path / "none")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "tuxpaint-stamps-default" in message
    assert "pictures fetch" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Programs called npm, apt-get and dpkg-deb that install what the test made."""
    tools, made = tmp_path / "tools", tmp_path / "made"
    (made / "package").mkdir(parents=True)
    (made / "package" / "LICENSE").write_text("free")
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as archive:
        archive.add(made / "package", "package")
    tools.mkdir()
    scripts = {
        "npm": f'echo "$@" >> {tmp_path}/log; cp {tmp_path}/made.tgz here.tgz',
        "apt-get": f'echo "$@" >> {tmp_path}/log; touch here.deb',
        "dpkg-deb": 'mkdir -p "$3/usr" && touch "$3/usr/copyright"',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tools


def test_fetch_installs_each_package_once_with_its_licence(tmp_path, registry):
    fetch(tmp_path / "packages")
    fetch(tmp_path / "packages")
    log = (tmp_path / "log").read_text()
    assert log.count("emojibase-data@17.0.0") == 1
    assert log.count("download tuxpaint") == 1
    assert (tmp_path / "packages" / "google" / "package" / "LICENSE").read_text() == "free"
    assert (tmp_path / "packages" / "tux" / "usr" / "copyright").is_file()


def test_fetch_asks_first(tmp_path, registry, monkeypatch, capsys):
    monkeypatch.setattr("typer.confirm", lambda *_args, **_kwargs: exit(1))
    with pytest.raises(SystemExit):
        main(["pictures", "fetch", "--packages", str(tmp_path / "packages")])
    assert "GPL-2" in capsys.readouterr().out
    assert not (tmp_path / "log").exists()


def test_a_package_writes_only_below_its_folder(tmp_path, registry):
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as archive:
        archive.add(tmp_path / "made/package/LICENSE", "package/../../../evil")
    with pytest.raises(ValueError, match=r"evil' leads out of the package"):
        fetch(tmp_path / "packages")
    assert not list(tmp_path.rglob("evil"))


def test_a_failed_download_leaves_nothing_half_installed(tmp_path, registry):
    (registry / "npm").write_text("#!/bin/sh\necho no such package >&2\nexit 3\n")
    with pytest.raises(ValueError, match=r"ended with 3 \(no such package\)"):
        fetch(tmp_path / "packages")
    assert not [p for p in (tmp_path / "packages").iterdir() if p.name in PACKAGES]


def test_a_missing_tool_is_named_before_anything_is_installed(tmp_path, registry, monkeypatch):
    (registry / "npm").unlink()
    monkeypatch.setenv("PATH", str(registry))
    with pytest.raises(ValueError, match="npm, which is not on this machine"):
        fetch(tmp_path / "packages")
    assert not (tmp_path / "log").exists()


def test_a_page_is_captioned_by_place_name_and_number():
    shown = {"top left": "owl", "bottom left": "cup", "bottom right": "red apple"}
    assert page_captions(shown) == [
        "an owl at the top left, a cup at the bottom left, a red apple at the bottom right",
        "an owl, a cup and a red apple",
        "three things: an owl, a cup and a red apple",
    ]
    assert page_captions({"top left": "owl"})[1:] == ["an owl", "one thing: an owl"]


def test_quickstart_on_real_images_compares_with_all_baselines(packages, tmp_path, capsys):
    out = tmp_path / "real"
    settings = ["model.start=starter", "training.steps=2", "training.warmup_steps=1"]
    settings += ["training.precision=fp32", "evaluation.limit=6", "training.batch_size=4"]
    arguments = ["--real", "--packages", str(packages), "--out", str(out), "--scale", "0.05"]
    with pytest.raises(SystemExit) as ended:
        main(["quickstart", *settings, *arguments, "--debug"])
    assert ended.value.code == 0
    results = json.loads((out / "results.json").read_text())["models"]
    assert {*results} == {"blip2", "instructblip", "instructblip_blind", "constant", "linear_probe"}
    assert {*results["linear_probe"]["datasets"]} == {"known_names", "photos", "new_kinds"}
    assert len(results["constant"]["datasets"]) == len(results["instructblip"]["datasets"]) == 10
    printed = capsys.readouterr().out
    assert "linear_probe" in printed
    assert "linear_probe" in (out / "report.html").read_text()
