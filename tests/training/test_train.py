"""The loop on a toy: it learns, resumes bit for bit, and stops when and how it should."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from instructblip.core.batch import Batch, LossOutput
from instructblip.training.log import read_metrics, without_timings
from instructblip.training.train import NonFiniteLossError, TrainResult, train
from tests.training.toy import Toy, ToyBatches, toy_config, toy_score


def run(folder: Path, model: Toy | None = None, resume: bool = False, **changes: object):
    config = toy_config(**changes)
    model = model or Toy()
    result = train(
        model,
        ToyBatches(config),
        toy_score,
        config,
        folder,
        resume=resume,
        export=model.save_pretrained,
        notes={"recipe.yaml": "a: 1\n"},
    )
    return model, result


def weights(model: Toy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def lines(folder: Path) -> list[dict]:
    return [without_timings(line) for line in read_metrics(folder / "metrics.jsonl")]


def stop_at(step: int, batches: ToyBatches, name: signal.Signals = signal.SIGTERM):
    """The same batches, with a signal sent to this process while step ``step`` is prepared."""

    class Stopping:
        def iterate(self, start: int):
            for offset, batch in enumerate(batches.iterate(start)):
                if start + offset == step:
                    signal.raise_signal(name)
                yield batch

    return Stopping()


def test_learns_and_leaves_what_it_promises(tmp_path: Path):
    before = weights(Toy())
    model, result = run(tmp_path, steps=120, validate_every=40)
    after = weights(model)
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])
    assert isinstance(result, TrainResult)
    assert (result.step, result.stopped, result.best_step) == (120, "finished", 120)
    recorded = lines(tmp_path)
    losses = [line["loss"] for line in recorded if "loss" in line]
    assert losses[0] > 2.0
    assert losses[-1] < 0.8
    assert set(recorded[0]["losses"]) == {"even", "odd"}
    assert [line["step"] for line in recorded if "validation" in line] == [40, 80, 120]
    for name in ("best", "last"):
        assert {p.name for p in (tmp_path / name).iterdir()} == {"model.safetensors", "recipe.yaml"}
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert not list(tmp_path.rglob(".*"))


def wiped() -> Toy:
    """The toy with everything that trains set to zero: only a checkpoint can bring it back."""
    model = Toy()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    return model


@pytest.mark.parametrize("step", [0, 7, 8, 13, 23])
def test_resume_equals_uninterrupted(tmp_path: Path, step: int):
    whole, _ = run(tmp_path / "whole")
    config, folder, model = toy_config(), tmp_path / "cut", Toy()
    result = train(model, stop_at(step, ToyBatches(config)), toy_score, config, folder)
    assert (result.stopped, result.step) == ("terminated", step + 1)
    torch.manual_seed(99)
    resumed, result = run(folder, model=wiped(), resume=True)
    assert (result.stopped, result.step) == ("finished", 24)
    assert_same(weights(whole), weights(resumed))
    assert lines(folder) == lines(tmp_path / "whole")


def test_lines_after_the_checkpoint_are_written_once(tmp_path: Path):
    """A run killed well after its last checkpoint has written lines that come again."""
    whole, _ = run(tmp_path, keep_last=9)
    expected = lines(tmp_path)
    for step in (24, 21):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:06d}", ignore_errors=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # and the last one is torn
    resumed, _ = run(tmp_path, model=wiped(), resume=True, keep_last=9)
    assert_same(weights(whole), weights(resumed))
    assert lines(tmp_path) == expected


def test_dropout_depends_on_the_step(tmp_path: Path):
    """The test above would pass without dropout; this shows that it has some."""
    dropped, _ = run(tmp_path / "a", model=Toy(dropout=0.1))
    plain, _ = run(tmp_path / "b", model=Toy(dropout=0.0))
    other, _ = run(tmp_path / "c", model=Toy(dropout=0.1), seed=1)
    assert not torch.equal(dropped.head.weight, plain.head.weight)
    assert not torch.equal(dropped.head.weight, other.head.weight)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing(tmp_path: Path, accumulate: int):
    """1 x 8 == 2 x 4 == 4 x 2, though the micro batches hold different numbers of tokens."""
    whole, _ = run(tmp_path / "whole", model=Toy(dropout=0.0))
    split, _ = run(tmp_path / "split", model=Toy(dropout=0.0), accumulate=accumulate)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, rtol=2e-4, atol=2e-6)
    for left, right in zip(lines(tmp_path / "whole"), lines(tmp_path / "split"), strict=True):
        assert left.get("loss", 0) == pytest.approx(right.get("loss", 0), rel=1e-5)


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path):
    run(tmp_path, steps=6)
    with pytest.raises(ValueError, match=r"already holds a run up to step 6.*--resume"):
        run(tmp_path, steps=6)


def test_a_kill_while_notes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the name of one is changed: the run resumes, and the old note stands until then."""
    config = toy_config(steps=6, warmup_steps=1)
    train(Toy(), ToyBatches(config), None, config, tmp_path, notes={"recipe.yaml": "one"})

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    def resume() -> None:
        notes = {"recipe.yaml": "two"}
        train(Toy(), ToyBatches(config), None, config, tmp_path, resume=True, notes=notes)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            resume()
    assert (tmp_path / "recipe.yaml").read_text() == "one"
    resume()
    assert (tmp_path / "recipe.yaml").read_text() == "two"


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path):
    model, _ = run(tmp_path)
    again, result = run(tmp_path, model=wiped(), resume=True)
    assert (result.stopped, result.step) == ("finished", 24)
    assert_same(weights(model), weights(again))


def test_an_error_in_a_validation_costs_no_step(tmp_path: Path):
    def broken(_model: Toy) -> dict[str, float]:
        raise RuntimeError("no memory")

    whole, _ = run(tmp_path / "whole")
    config, folder = toy_config(), tmp_path / "cut"
    with pytest.raises(RuntimeError, match="no memory"):
        train(Toy(), ToyBatches(config), broken, config, folder)
    kept = max(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == f"step_{config.validate_every:06d}"
    resumed, _ = run(folder, model=wiped(), resume=True)
    assert_same(weights(whole), weights(resumed))
    assert lines(folder) == lines(tmp_path / "whole")


def test_a_resumed_run_takes_the_recipes_weight_decay(tmp_path: Path):
    plain, _ = run(tmp_path / "plain")
    config, folder = toy_config(), tmp_path / "cut"
    train(Toy(), stop_at(7, ToyBatches(config)), toy_score, config, folder)
    decayed, _ = run(folder, model=wiped(), resume=True, weight_decay=5.0)
    assert decayed.hidden.weight.norm() < 0.99 * plain.hidden.weight.norm()


def test_resuming_with_another_optimizer_is_an_error(tmp_path: Path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"another training\.optimizer than Muon"):
        run(tmp_path, model=wiped(), resume=True, optimizer="muon", steps=30)


def test_resuming_with_another_trainable_set_is_an_error(tmp_path: Path):
    run(tmp_path)
    other = Toy()
    other.norm.requires_grad_(False)
    with pytest.raises(ValueError, match=r"2 differ, such as norm\.bias, norm\.weight"):
        run(tmp_path, model=other, resume=True)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_before_the_step(tmp_path: Path, where: str):
    class Bad(Toy):
        calls = 0

        def loss(self, batch):
            output = super().loss(batch)
            self.calls += self.training
            if self.training and self.calls == 6:
                self.before = weights(self)
                if where == "loss":
                    output.sample_losses[2] = float("nan")
                    return output._replace(loss_sum=output.loss_sum * float("nan"))
                return output._replace(loss_sum=output.loss_sum * 1e38 * 1e38)
            return output

    model = Bad()
    with pytest.raises(NonFiniteLossError) as error:
        run(tmp_path, model=model)
    message = str(error.value)
    assert "step 5 (data sets even, odd)" in message
    assert "step_000003" in message
    # sample 2 of step 5, whose first sample is the 40th
    assert ("even/42 (nan)" in message) == (where == "loss")
    assert_same(model.before, weights(model))
    assert not list(tmp_path.rglob(".*"))


def test_early_stopping(tmp_path: Path):
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    config = toy_config(steps=50, validate_every=5, early_stopping_patience=2)
    model = Toy()
    result = train(model, ToyBatches(config), lambda _: {"score": next(scores)}, config, tmp_path)
    assert (result.stopped, result.step) == ("early", 20)
    assert (result.best_score, result.best_step) == (3.0, 10)
    assert (tmp_path / "checkpoints" / "step_000010").is_dir()  # the best outlives keep_last


def test_ctrl_c_saves_before_the_first_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    handler = signal.getsignal(signal.SIGINT)
    whole, _ = run(tmp_path / "whole")
    config, folder, model = toy_config(save_every=100), tmp_path / "cut", Toy()
    stopping = stop_at(1, ToyBatches(config), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model, stopping, toy_score, config, folder)
    output = capfd.readouterr()
    assert "interrupted: saved step 2; continue with --resume" in output.out
    assert "finishing the step and saving" in output.err
    resumed, _ = run(folder, model=wiped(), resume=True)
    assert_same(weights(whole), weights(resumed))
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path):
    config = toy_config()
    batches = stop_at(3, stop_at(3, ToyBatches(config), signal.SIGINT), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(Toy(), batches, toy_score, config, tmp_path)
    assert not (tmp_path / "checkpoints" / "step_000004").exists()


def test_forecast_of_the_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """From the third step after the first on, once; a run as short as that has none."""
    run(tmp_path / "a", steps=24)
    (line,) = [x for x in capfd.readouterr().out.splitlines() if x.startswith("forecast")]
    assert line.startswith("forecast: 20 more steps take about 0:00:0")
    assert "(median of steps 2 to 4; validations and checkpoints come on top)" in line
    run(tmp_path / "b", steps=4, warmup_steps=1)
    assert "forecast" not in capfd.readouterr().out


def test_the_start_is_a_candidate_for_the_best(tmp_path: Path):
    start = weights(Toy())
    harmful = {"learning_rate": 5.0, "clip_norm": None, "validate_first": True}
    model, result = run(tmp_path / "whole", **harmful)
    assert (result.step, result.best_step) == (24, 0)
    best = load_file(tmp_path / "whole" / "best" / "model.safetensors")
    assert_same(start, best)
    assert not torch.equal(model.state_dict()["head.weight"], best["head.weight"])
    assert next(v["step"] for v in lines(tmp_path / "whole") if "validation" in v) == 0
    assert run(tmp_path / "without", **harmful | {"validate_first": False})[1].best_step != 0

    # interrupted after the first step, it keeps the start and validates it once
    config, folder = toy_config(**harmful), tmp_path / "cut"
    toy = Toy()
    train(
        toy, stop_at(0, ToyBatches(config)), toy_score, config, folder, export=toy.save_pretrained
    )
    _, resumed = run(folder, model=wiped(), resume=True, **harmful)
    assert resumed.best_step == 0
    assert_same(start, load_file(folder / "best" / "model.safetensors"))
    assert lines(folder) == lines(tmp_path / "whole")


def test_sigterm_interrupts_a_validation(tmp_path: Path):
    whole, _ = run(tmp_path / "whole")
    config, model = toy_config(), Toy()

    def interrupted(_model: Toy) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("validation continued after SIGTERM")

    result = train(model, ToyBatches(config), interrupted, config, tmp_path / "cut")
    assert (result.stopped, result.step) == ("terminated", 8)
    resumed, _ = run(tmp_path / "cut", model=wiped(), resume=True)
    assert_same(weights(whole), weights(resumed))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_checkpoints_are_bounded(tmp_path: Path):
    _, result = run(tmp_path, steps=60, keep_last=2)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({"step_000057", "step_000060", f"step_{result.best_step:06d}"})


def test_reports_how_long_it_waited_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("instructblip.training.train.time", clock)

    class Slow(Toy):
        def loss(self, batch: Batch):
            nonlocal now
            now += 3.0
            return super().loss(batch)

    class Late(ToyBatches):
        def iterate(self, step: int):
            nonlocal now
            for number, batch in enumerate(super().iterate(step)):
                now += 1.0 if number else 97.0  # the first one starts the workers
                yield batch

    config = toy_config(steps=10, log_every=10, validate_every=None)
    result = train(Slow(), Late(config), None, config, tmp_path)
    assert result.waited_for_data == pytest.approx(0.25)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["waited_for_data"] == pytest.approx(106 / 136, abs=1e-4)
    printed = capsys.readouterr().out
    assert "77.9% waiting" in printed
    assert "waited for data 25.0% of the time of the steps" in printed


class TwoTerms(Toy):
    """A loss of two terms, three quarters and one quarter of it."""

    def loss(self, batch: Batch) -> LossOutput:
        output = super().loss(batch)
        mean = output.loss_sum.detach() / output.num_tokens
        return output._replace(terms={"most": 0.75 * mean, "rest": 0.25 * mean})


def test_each_term_of_a_loss_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "whole", TwoTerms(), steps=10, accumulate=2)
    logged = [line for line in lines(tmp_path / "whole") if "loss" in line]
    assert len(logged) == 2
    for line in logged:
        assert [*line["terms"]] == ["most", "rest"]
        assert line["terms"]["most"] == pytest.approx(0.75 * line["loss"], rel=1e-5)
        assert sum(line["terms"].values()) == pytest.approx(line["loss"], rel=1e-5)
    last = logged[-1]
    expected = f"loss {last['loss']:.3f} (most {last['terms']['most']:.3f}, rest "
    assert expected in capsys.readouterr().out
    config = toy_config(steps=10, accumulate=2)
    stopping = stop_at(7, ToyBatches(config))
    train(TwoTerms(), stopping, toy_score, config, tmp_path / "again")
    run(tmp_path / "again", TwoTerms(), resume=True, steps=10, accumulate=2)
    assert lines(tmp_path / "again") == lines(tmp_path / "whole")
