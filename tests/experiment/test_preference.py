"""Training from preferences: the objectives, the pairs and their references, exact resume."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from instructblip.core import distributed
from instructblip.core.batch import Batch
from instructblip.evaluation.captions import cider, document_frequency
from instructblip.experiment.build import build
from instructblip.experiment.preference import Preference, drawn, pair_of, read_pairs
from instructblip.experiment.train import train
from instructblip.model.decoding import GREEDY
from instructblip.model.instructblip import InstructBlip
from instructblip.model.preference import DirectPreference, SelfCritical, select, with_responses
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from tests.parity.test_instructblip import their_loss
from tests.parity.tiny import tiny_batch, tiny_transformers
from tests.testing import read_custom, write_json_lines, write_model, write_picture

REWARDED = "preference={rewards: {my_reward:short: 1}, num_responses: 8, max_new_tokens: 64}"
CRITICAL = "preference={objective: self_critical, rewards: {my_reward:short: 1}, max_new_tokens: 6}"
OF_DATA = "preference={rpo: 0.1}"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("start"), "instructblip")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preferences")
    rows = []
    for i in range(12):
        write_picture(root / f"{i}.png", seed=i)
        row = {"image": f"{i}.png", "prompt": f"What is {i}?", "rejected": "a cup of tea"}
        rows.append({**row, "chosen": f"a dog number {i}"})
    write_json_lines(root / "train.jsonl", *rows)
    reward = "def short(prediction, answers):\n    return 1 / (1 + len(prediction))\n"
    (root / "my_reward.py").write_text(reward)
    return root


def recipe_of(start: Path, root: Path, *more: str) -> Recipe:
    settings = [
        *(f"model.start={start}", f"data.root={root}", f"code={root}"),
        "data.sets={mine: {format: table, root: ., path: train.jsonl}}",
        *("data.check=run", "data.max_instruction=40", "features.cache=off"),
        *("training.batch_size=4", "training.steps=4", "training.accumulate=2"),
        *("training.warmup_steps=1", "training.save_every=2", "training.precision=fp32"),
        *("training.learning_rate=0.001", "training.workers=0"),
        *("evaluation.validation=[]", "evaluation.benchmarks=[]"),
    ]
    return load_recipe("quickstart", [*settings, *more])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in sorted((out / "last").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def single(batch: Batch, row: int, response: list[int]) -> Batch:
    return with_responses(select(batch, torch.tensor([row])), [response])


@pytest.mark.parametrize("language", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.7, "per_token": True, "rpo": 0.3}], ids=str)
def test_dpo_equals_an_independent_computation(
    language: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Loss and gradients, from transformers' loss of each response by itself."""
    theirs = tiny_transformers(language)
    theirs.save_pretrained(tmp_path)
    ours = DirectPreference(InstructBlip.from_pretrained(tmp_path), **options).train()
    batch = tiny_batch(theirs.config)
    responses = [[10, 11, 2], [12, 13, 14, 2], [15, 2], [20, 2], [21, 22, 2], [23, 24, 25, 26, 2]]
    reference = torch.tensor([-9.0, -12.0, -7.0, -5.0, -10.0, -16.0])
    expected = torch.zeros(())
    beta, rpo = options.get("beta", 0.1), options.get("rpo", 0.0)
    for row in range(3):
        ratios, nll = [], []
        for half in range(2):
            ids = responses[3 * half + row]
            inputs = single(batch, row, ids)
            mean = their_loss(theirs, inputs).loss
            scale = len(ids) if options.get("per_token") else 1
            ratios.append((-mean * len(ids) - reference[3 * half + row]) / scale)
            nll.append(mean)
        margin = beta * (ratios[0] - ratios[1])
        expected = expected + torch.log(1 + torch.exp(-margin)) + rpo * nll[0]
    expected.backward()
    doubled = with_responses(select(batch, torch.tensor([0, 1, 2, 0, 1, 2])), responses)
    counts = torch.tensor([1, 1, 1, 0, 0, 0])
    output = ours.loss(replace(doubled, reference=reference, counts=counts))
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(expected.item(), abs=1e-5)
    assert int(output.num_tokens) == 3
    found = dict(theirs.named_parameters())
    for name, parameter in ours.instructblip.trainable_parameters():
        other = found[name.removeprefix("model.")] if name in found else found[f"model.{name}"]
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_self_critical_is_reinforce_with_the_greedy_baseline(tmp_path: Path) -> None:
    """The gradient from the log-likelihoods of the responses that it sampled."""
    tiny_transformers("llama").save_pretrained(tmp_path)
    model = InstructBlip.from_pretrained(tmp_path)
    batch = replace(tiny_batch(model.config), counts=torch.ones(3, dtype=torch.int64))
    seen: list[list[list[int]]] = []

    def reward(_batch: Batch, responses: Any) -> list[float]:
        seen.append([list(ids) for ids in responses])
        return [float(sum(ids) % 7) for ids in responses]

    sampling = GREEDY.override(temperature=1.0, max_new_tokens=5)
    objective = SelfCritical(model, reward, 2, sampling, num=2).train()
    torch.manual_seed(0)
    output = objective.loss(batch)
    output.loss_sum.backward()
    gradient = model.query_tokens.grad.clone()
    model.zero_grad()
    greedy, sampled = seen
    assert len(greedy) == 3
    assert len(sampled) == 6
    expected = torch.zeros(())
    for i, ids in enumerate(sampled):
        row = i // 2
        advantage = sum(ids) % 7 - sum(greedy[row]) % 7
        ended = ids if len(ids) == 5 else [*ids, 2]
        expected = expected + advantage * model.loss(single(batch, row, ended)).loss_sum / 2
    expected.backward()
    assert output.loss_sum.item() == pytest.approx(expected.item(), abs=1e-4)
    torch.testing.assert_close(gradient, model.query_tokens.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [REWARDED, CRITICAL, OF_DATA])
def test_a_resumed_run_is_the_uninterrupted_one(
    settings: str, start: Path, root: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "run", recipe_of(start, root, settings)
    assert train(recipe, out).step == 4
    whole, pairs = weights(out), read_pairs(out)
    shutil.rmtree(out / "checkpoints" / "step_000004")
    shutil.rmtree(out / "last")
    assert train(recipe, out, resume=True).step == 4
    assert pairs == read_pairs(out)
    assert bool(pairs) == (settings != CRITICAL)
    resumed = weights(out)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    first = InstructBlip.from_pretrained(str(start)).state_dict()
    moved = {name for name, value in whole.items() if not torch.equal(value, first[name])}
    assert moved
    assert not any(name.startswith(("vision_model.encoder", "language_model")) for name in moved)


def test_pairs_are_ordered_by_the_reward_and_keep_their_references(
    start: Path, root: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(start, root, REWARDED)
    run = build(recipe, Preference(tmp_path), tmp_path)
    pairs = read_pairs(tmp_path)
    assert pairs
    assert all(len(pair.chosen) < len(pair.rejected) for pair in pairs)
    batches = next(run.batches.iterate(0))
    assert [batch.num_response_tokens for batch in batches] == [2, 2]  # pairs
    with torch.no_grad():
        for batch in batches:  # templates and crops are those of the references
            torch.testing.assert_close(run.model.responses(batch), batch.reference)
            assert run.model.loss(batch).loss_sum.item() == pytest.approx(2 * 0.6931, abs=1e-3)


def test_the_response_of_the_data_may_be_the_chosen_one(
    start: Path, root: Path, tmp_path: Path
) -> None:
    more = "num_responses: 8, max_new_tokens: 64, references: true"
    settings = f"preference={{rewards: {{exact_match: 1}}, {more}}}"
    build(recipe_of(start, root, settings), Preference(tmp_path), tmp_path)
    pairs = read_pairs(tmp_path)
    assert pairs
    assert all(pair.chosen == f"a dog number {pair.example}" for pair in pairs)
    assert not any(pair.rejected.startswith("a dog") for pair in pairs)


def test_training_prefers_what_the_data_prefer(start: Path, root: Path, tmp_path: Path) -> None:
    more = ("training.steps=30", "training.batch_size=12", "training.log_every=1")
    train(recipe_of(start, root, "preference={}", *more), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    terms = [json.loads(line)["terms"] for line in lines if "terms" in line]
    assert terms[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert terms[-1]["margin"] > 1
    assert terms[-1]["preferred"] == 1


def test_ranks_share_pairs(start: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(start, root, OF_DATA)
    whole = [i for b in next(build(recipe, Preference()).batches.iterate(0)) for i in b.ids]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shared: list[str] = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine])
        with pytest.MonkeyPatch.context() as patch:  # both ranks know all references
            patch.setattr("instructblip.experiment.preference.make_pairs", made_alone)
            batches = next(build(recipe, Preference()).batches.iterate(0))
        shared += [i for batch in batches for i in batch.ids]
    assert sorted(shared) == sorted(whole)


def made_alone(recipe: Recipe, loader: Any, model: Any) -> Any:
    return [replace(pair_of(loader, d), reference=(0.0, 0.0)) for d in drawn(loader, 16)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("preference={objective: self_critical}", "needs rewards"),
        ("preference={rewards: {mrr: 1}}", "scores candidates"),
        ("preference={rewards: {rouge: 1}}", "did you mean rouge_l"),
        ("preference={rewards: {chair nothing.txt: 1}}", "no such file"),
        ("preference={rewards: {rouge_l: 1}, num_responses: 1}", "needs 2"),
    ],
)
def test_wrong_settings_are_refused(settings: str, message: str, start: Path, root: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recipe_of(start, root, settings)


def test_data_without_pairs_and_equal_responses_are_refused(
    start: Path, root: Path, tmp_path: Path
) -> None:
    write_picture(tmp_path / "0.png")
    write_json_lines(tmp_path / "train.jsonl", {"image": "0.png", "caption": "a dog"})
    recipe = recipe_of(start, tmp_path, OF_DATA)
    with pytest.raises(ValueError, match="give columns chosen and rejected, or rewards"):
        build(recipe, Preference())
    never = "preference={rewards: {exact_match: 1}, pairs: 4, max_new_tokens: 4}"
    with pytest.raises(ValueError, match="had the same reward"):
        build(recipe_of(start, root, never), Preference())


TURN = {"role": "user", "content": "What is it?"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is it?", "chosen": "a dog", "rejected": "a cat"},
        {
            "prompt": [TURN],
            "chosen": [{"role": "assistant", "content": "a dog"}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
        },
        {
            "chosen": [TURN, {"role": "assistant", "content": "a dog"}],
            "rejected": [TURN, {"role": "assistant", "content": "a cat"}],
        },
        {
            "conversations": [{"from": "human", "value": "<image>What is it?"}],
            "chosen": {"from": "gpt", "value": "a dog"},
            "rejected": {"from": "gpt", "value": "a cat"},
        },
        {"instruction": "What is it?", "chosen": "a dog", "rejected": "a cat"},
        {
            "messages": [TURN, {"role": "assistant", "content": "a dog"}],
            "rejected_response": "a cat",
        },
    ],
    ids=["trl", "trl_turns", "trl_implicit", "llama_factory", "alpaca", "swift"],
)
def test_preference_data_of_other_trainers(row: dict[str, Any], tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    write_json_lines(tmp_path / "train.jsonl", {"images": ["a.png"], **row})
    (example,) = read_custom(tmp_path, "sharegpt")
    assert (example.question, example.answers) == ("What is it?", ("a dog",))
    assert example.extra["rejected"] == "a cat"


def test_of_a_dialogue_only_the_last_answer_has_a_pair(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    turns = [TURN, {"role": "assistant", "content": "a dog"}, {**TURN, "content": "Which?"}]
    row = {"images": ["a.png"], "messages": turns, "chosen": "a poodle", "rejected": "a cat"}
    write_json_lines(tmp_path / "train.jsonl", row)
    (example,) = read_custom(tmp_path, "sharegpt")
    assert example.answers == ("a poodle",)
    assert example.history == (("What is it?", "a dog"),)


def test_a_column_rejected_of_another_meaning_is_left_alone(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    write_json_lines(tmp_path / "train.jsonl", {"image": "a.png", "caption": "b", "rejected": True})
    (example,) = read_custom(tmp_path, "table")
    assert (example.answers, example.extra) == (("b",), {})


def test_cider_of_one_caption_has_the_frequencies_of_the_corpus() -> None:
    captions = ["a red dog runs", "a blue cat sits here", "two green birds fly away"]
    references = [["a red dog runs fast", "the dog runs"], ["a cat sits"], ["birds fly"]]
    whole = cider(captions, references)
    frequency = document_frequency(references)
    single = [
        cider([c], [r], frequency=frequency).value
        for c, r in zip(captions, references, strict=True)
    ]
    assert single == pytest.approx(whole.per_image)
