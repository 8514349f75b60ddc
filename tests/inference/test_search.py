"""Search of a folder: the order of what is found, and what is embedded again."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from instructblip.cli.main import main
from instructblip.inference.embedder import AFTER, Embedder
from instructblip.inference.search import BLOCK, open_gallery, similarities
from tests.testing import add_heads, write_model, write_picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return add_heads(write_model(tmp_path_factory.mktemp("search") / "model", "instructblip"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shown" / "below").mkdir(parents=True)
    for seed in range(5):
        write_picture(tmp_path / "shown" / f"{seed}.png", seed=seed)
    write_picture(tmp_path / "shown" / "below" / "5.png", seed=5)
    return tmp_path / "shown"


def test_the_order_is_that_of_similarity_and_then_of_matching(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    embedder = Embedder.from_pretrained(model, device="cpu")
    gallery = open_gallery(embedder, folder, tmp_path / "cache")
    paths, text = gallery.paths, "a small red circle"
    vectors = embedder.embed(images=list(paths)).to(torch.bfloat16).float()
    cosine = (vectors @ embedder.embed(texts=text)[0]).amax(1)
    similar = gallery.find(text, limit=3, rerank=0)
    assert [each.path for each in similar] == [
        paths[i] for i in cosine.argsort(descending=True)[:3]
    ]
    assert all(each.match is None for each in similar)
    index = torch.arange(len(paths))
    logits = embedder.match_features(embedder.features(paths), [text] * len(paths), index)
    best = (logits[:, 1] + cosine).argsort(descending=True)
    found = gallery.find(text, limit=3)
    assert [each.path for each in found] == [paths[i] for i in best[:3]]
    assert found[0].match == pytest.approx(float(embedder.match(found[0].path, text)[0]), abs=1e-5)
    one = gallery.find(text, limit=6, rerank=1)
    assert [each.match is None for each in one] == [False, *[True] * 5]


def test_a_comparison_matches_the_most_similar_both_ways(model: Path, folder: Path) -> None:
    embedder = Embedder.from_pretrained(model, device="cpu")
    images, texts = sorted(folder.glob("*.png")), ["a red circle", "what is on the left?", "blue"]
    cosine = (embedder.embed(images=images) @ embedder.embed(texts=texts).T).amax(1)
    to_text, to_image = embedder.compare(images, texts, rerank=2)
    for i, image in enumerate(images):
        logits = embedder.match_features(
            embedder.features([image]), texts, torch.zeros(3, dtype=torch.long)
        )
        read = set(cosine[i].topk(2).indices.tolist())
        for t in range(3):
            whole = cosine[i, t] + logits[t, 1]
            expected = whole if t in read else cosine[i, t] - AFTER
            assert to_text[i, t] == pytest.approx(float(expected), abs=1e-4)
            near = i in cosine[:, t].topk(2).indices
            expected = whole if near else cosine[i, t] - AFTER
            assert to_image[i, t] == pytest.approx(float(expected), abs=1e-4)


def test_an_image_is_most_like_itself(model: Path, folder: Path, tmp_path: Path) -> None:
    gallery = open_gallery(
        Embedder.from_pretrained(model, device="cpu"), folder, tmp_path / "cache"
    )
    best, *others = gallery.like(folder / "3.png")
    assert best.path == folder / "3.png"
    assert best.similarity == pytest.approx(1.0, abs=0.01)
    assert all(each.similarity < 0.999 for each in others)


def test_only_new_and_changed_images_are_embedded(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[int] = []
    run = Embedder.embed_features

    def watch(self, features, instruction=None):
        embedded.append(len(features))
        return run(self, features, instruction)

    monkeypatch.setattr(Embedder, "embed_features", watch)
    embedder = Embedder.from_pretrained(model, device="cpu")

    def search() -> list[str]:
        embedded.clear()
        gallery = open_gallery(embedder, folder, tmp_path / "cache")
        return sorted(path.relative_to(folder).as_posix() for path in gallery.paths)

    search()
    assert sum(embedded) == 6
    search()
    assert sum(embedded) == 0
    (folder / "1.png").rename(folder / "below" / "moved.png")
    (folder / "2.png").unlink()
    write_picture(folder / "0.png", seed=100)
    assert search() == ["0.png", "3.png", "4.png", "below/5.png", "below/moved.png"]
    assert sum(embedded) == 1


def test_a_broken_image_is_left_out(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
    gallery = open_gallery(
        Embedder.from_pretrained(model, device="cpu"), folder, tmp_path / "cache"
    )
    assert len(gallery.paths) == 6
    assert "1 images are left out; broken.png" in capsys.readouterr().out


def test_blocks_change_no_score() -> None:
    stored = [torch.randn(7, 3, 8).bfloat16(), torch.randn(BLOCK // 24 + 5, 3, 8).bfloat16()]
    text = torch.randn(8)
    whole = (torch.cat(stored).float() @ text).amax(1)
    assert torch.allclose(similarities(stored, text), whole, atol=1e-5)


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0


def test_the_command_prints_and_writes_what_it_finds(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", str(folder), "a <b>red</b> circle", "--model", str(model), "--limit", "4"]
    command += ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--out"]
    run([*command, str(tmp_path / "page.html")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["1", "2", "3", "4"]
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 4
    assert "<b>" not in page
    run([*command, str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").width > 4 * 224


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["red"], "expected a folder of images"),
        ([], "give either words"),
        (["red", "--like", "a.png"], "give either words"),
        ([" "], "are empty"),
        (["red", "--out", "a.txt"], "ends in .html, .png"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["search", "nowhere", *arguments, "--model", str(model)])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_heads_is_refused_with_the_remedy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["search", str(folder), "red", "--model", "dense"])
    assert "pretrain retrieval_scenes --stage retrieval" in " ".join(
        capsys.readouterr().err.split()
    )
