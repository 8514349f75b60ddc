"""The programs behind docs/dense.md: pre-training, conditions, attention and the page."""

import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import differences
from instructblip.scenes.dense import DenseScene, Item, sample_dense, write_dense
from runs.claims import measure
from runs.dense import attention, balancing, claim, write
from tests.test_claims import write_results

HEART = Item("red", "heart", "large", "7", 1, 3)


def test_conditions_differ_in_reading_alone(tmp_path: Path) -> None:
    plan = claim.DensePlan(tmp_path, seeds=2, queries=(2, 4))
    jobs = {job.name: job for job in plan.jobs()}
    assert len(jobs) == 2 + 2 * 2 * 4
    for queries in plan.queries:
        for seed in (0, 1):
            reads, not_read = (
                measure.recipe_of(plan, jobs[f"{name}_{queries}/seed{seed}"])
                for name in ("reads", "does_not_read")
            )
            assert differences(reads, not_read) == ["model.instruction_aware: True -> False"]
            assert reads.model.start == str(plan.start_with(queries))
            assert reads.training.seed == reads.data.seed == seed
    withheld, other = (jobs[f"{name}_4/seed1"] for name in ("withheld", "of_another"))
    assert withheld.model == other.model == f"{tmp_path}/reads_4/seed1/last"
    assert (withheld.reads, other.reads) == ("none", "other")


def test_a_misread_q_former_reads_the_instruction_of_another_row() -> None:
    torch.manual_seed(0)
    model = InstructBlip.from_pretrained("starter", instruction_aware=True).eval()
    ids = torch.randint(5, 300, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    features = torch.randn(1, 64, model.config.vision.hidden_size).expand(4, -1, -1)
    with torch.no_grad():
        own = model.query_image(features, ids, mask)
        measure.misread(model)
        other = model.query_image(features, ids, mask)
    assert torch.allclose(other, own[[2, 3, 0, 1]], atol=1e-5)
    assert not torch.allclose(other, own, atol=1e-2)


def test_attention_on_a_cell() -> None:
    maps = torch.zeros(2, 10, 10)
    maps[0, 2:4, 6:8] = 0.25  # all on the cell of the heart
    maps[1] = 0.01  # even
    assert attention.shares(maps, HEART).tolist() == pytest.approx([1, 0.04])
    for kind in attention.KINDS:
        for scene, item, instruction in attention.asked(kind, 5):
            assert item in scene.items
            named = item.place if kind == "place" else item.look
            assert instruction.startswith("Question: ")
            assert named in instruction


@pytest.fixture
def hidden_words(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the pre-training; its folder has names that others have, too."""
    root = Path(__file__).parents[1] / "runs"
    for folder in ("starter", "dense"):
        monkeypatch.syspath_prepend(str(root / folder))
    import hidden_words  # pyright: ignore[reportMissingImports]

    return hidden_words


def test_a_hidden_word_fits_and_is_hidden(hidden_words: ModuleType) -> None:
    for kind, forms in hidden_words.FORMS.items():
        for form, key in forms:
            value = str(
                getattr(HEART, key) + 1 if key in ("row", "column") else getattr(HEART, key)
            )
            words = form(HEART).replace(",", " ").split()
            assert words.count(hidden_words.HIDDEN) == 1, kind
            assert value in [str(v) for v in hidden_words.KINDS[key]]
            assert key in ("row", "column", "digit") or value not in words
    seen = [hidden_words.opened("x", random.Random(seed)) for seed in range(100)]
    assert all(text.endswith("x") for text in seen)
    assert 30 < seen.count("x") < 70
    assert len(set(seen)) == 1 + len(hidden_words.OPENERS)


def test_few_things_of_a_scene_keep_their_place(hidden_words: ModuleType) -> None:
    scene = sample_dense(random.Random(1))
    few = hidden_words.thinned(scene, 3, random.Random(2))
    assert isinstance(few, DenseScene)
    assert len(few.items) == 3
    assert [item for item in scene.items if item in few.items] == list(few.items)
    assert hidden_words.thinned(scene, 25, random.Random(2)).items == scene.items


def test_the_page_follows_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"scenes_vqav2": "held_in", "scenes_vizwiz": "held_out", "scenes_gqa": "held_out"}
    shares = {
        "reads": 0.9,
        "does_not_read": 0.4,
        "withheld": 0.4,
        "of_another": 0.2,
        "untuned": 0.2,
    }
    for name, share in shares.items():
        for seed in range(1 if name == "untuned" else 3):
            write_results(tmp_path / f"{name}_4" / f"seed{seed}", share, seed, names)
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 9, "limit": 60}))
    share = {"mean": 30.0, "interval": [25.0, 35.0]}
    found = {
        "before tuning": {"with the instruction": {"place": share}, "without": {"place": share}}
    }
    (tmp_path / "attention.json").write_text(json.dumps({"queries": 4, "shares": found}))
    docs = tmp_path / "docs"
    docs.mkdir()
    monkeypatch.setattr(sys, "argv", ["write", str(tmp_path), str(docs)])
    write.main()
    text = (docs / "dense.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| 4 |")]
    assert ["**holds**" in row for row in rows] == [True, True, False, False]
    assert "| 37 |" in rows[0]  # the limit of four queries
    assert all(row.count("| -") == 2 for row in rows[2:])  # both lose
    assert "3 seeds, 9 steps" in text
    assert "30.0 [25.0, 35.0]" in text
    for name in ("dense.svg", "dense_attention.svg"):
        assert f"]({name})" in text
        assert (docs / name).read_text().rstrip().endswith("</svg>")


def test_only_the_sizes_of_training_sets_are_unequal(tmp_path: Path) -> None:
    balancing.write_unequal(tmp_path / "unequal", 0.01)
    write_dense(tmp_path / "as_always", scale=0.01)

    def questions(world: str, split: str) -> list[dict]:
        (path,) = (tmp_path / world / "vqav2").rglob(f"*OpenEnded*{split}2014*.json")
        return json.loads(path.read_text())["questions"]

    assert questions("unequal", "val") == questions("as_always", "val")
    assert len(questions("unequal", "train")) > 2 * len(questions("as_always", "train"))
    assert max(balancing.SIZES.values()) > 1500 * min(balancing.SIZES.values())
