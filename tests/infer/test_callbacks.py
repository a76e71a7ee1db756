"""What is called while training, and by whom."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import blocks, make_records

import scalabl_pyro as sp
from scalabl_pyro import AutoSubspaceNormal, FitConfig, KLSchedule, ScalaBLModel, fit
from scalabl_pyro.infer import Callback, CheckpointConfig, Checkpoints, TensorBoard

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "callbacks.md"


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def on_step(self, row):
        self.calls.append(("step", dict(row)))

    def on_validate(self, row):
        self.calls.append(("validate", dict(row)))

    def on_end(self, history):
        self.calls.append(("end", [dict(row) for row in history]))


@pytest.fixture
def train(make_causal, records):
    """Trains with these callbacks and options."""
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))

    def run(*callbacks, steps=4, **options):
        every = options.pop("eval_every", 0)
        config = FitConfig(steps=steps, batch_size=4, lr_guide=1.0, eval_every=every)
        guide = AutoSubspaceNormal(model)
        options = {"progress": False} | options
        return fit(model, guide, split, config, callbacks=callbacks, **options)

    return run


def test_callbacks_are_told_each_row_of_the_history(train):
    recorder = Recorder()
    result = train(recorder, steps=5, eval_every=2, validate=lambda: 0.5)
    kinds = [kind for kind, _ in recorder.calls]
    pair = ["step", "step", "validate"]
    assert kinds == [*pair, *pair, "step", "validate", "end"]
    assert [row for kind, row in recorder.calls if kind == "step"] == result.history
    told = [row for kind, row in recorder.calls if kind == "validate"]
    assert [row["step"] for row in told] == [2, 4, 5]
    assert all(row["validation_nll"] == 0.5 for row in told)
    assert recorder.calls[-1] == ("end", result.history)


def test_training_is_the_same_to_the_bit_with_callbacks(make_causal, records):
    ends = []
    for callbacks in ([], [Recorder(), Callback()]):
        torch.manual_seed(0)
        adapter = make_causal()
        split = adapter.readout.encode(records)
        model = ScalaBLModel(adapter, num_data=len(split))
        guide = AutoSubspaceNormal(model)
        config = FitConfig(steps=3, batch_size=4)
        ends.append(fit(model, guide, split, config, callbacks=callbacks, progress=False).history)
    assert ends[0] == ends[1]


def test_the_end_is_told_after_an_error_to_all(train):
    class Fails(Recorder):
        def on_step(self, row):
            super().on_step(row)
            if row["step"] == 2:
                raise RuntimeError("full")

        def on_end(self, history):
            super().on_end(history)
            raise RuntimeError("full again")

    first, second = Recorder(), Fails()
    with pytest.raises(RuntimeError, match="full again"):
        train(first, second)
    assert [kind for kind, _ in first.calls] == ["step", "step", "end"]
    assert [kind for kind, _ in second.calls] == ["step", "step", "end"]


def test_a_run_that_goes_on_tells_only_its_own_steps(train, tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=2))

    class Stops(Recorder):
        def on_step(self, row):
            super().on_step(row)
            if row["step"] == 4:
                raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        train(Stops(), steps=6, checkpoints=checkpoints)
    recorder = Recorder()
    result = train(recorder, steps=6, checkpoints=checkpoints)
    assert [row["step"] for kind, row in recorder.calls if kind == "step"] == [3, 4, 5, 6]
    assert recorder.calls[-1] == ("end", result.history)
    assert len(result.history) == 6


def test_the_bar_shows_the_steps(train, capsys):
    train(steps=3, progress=True)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "kl_weight=" in shown
    train(steps=3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wrong", [Recorder, print, None])
def test_what_is_no_callback_is_refused(train, wrong):
    with pytest.raises(ValueError, match=r"callbacks holds .*: expected objects of Callback"):
        train(wrong)


def test_tensorboard_is_given_every_figure(train, monkeypatch):
    written, closed = {}, []

    class Writer:
        def __init__(self, folder):
            assert folder == "logs"

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def close(self):
            closed.append(True)

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    result = train(TensorBoard("logs"), eval_every=4, validate=lambda: 0.5)
    expected = {
        (name, row["step"]): value
        for row in result.history
        for name, value in row.items()
        if name != "step"
    }
    assert written == expected
    assert written["validation_nll", 4] == 0.5
    assert closed == [True]


def test_without_tensorboard_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard("logs")


def snippet(start):
    (code,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
        if code.startswith(start)
    ]
    return code


@pytest.mark.parametrize(
    ("start", "name", "begin", "log", "end"),
    [
        ("import wandb", "Wandb", "init", "log", "finish"),
        ("import mlflow", "MLflow", "start_run", "log_metrics", "end_run"),
    ],
)
def test_the_callbacks_of_the_documentation_log(train, monkeypatch, start, name, begin, log, end):
    calls = []
    logger = SimpleNamespace(
        **{
            begin: lambda **options: calls.append((begin, options)),
            log: lambda values, step: calls.append((step, values)),
            end: lambda: calls.append((end, {})),
        }
    )
    monkeypatch.setitem(sys.modules, start.split()[1], logger)
    names = {}
    exec(compile(snippet(start), DOCUMENT.name, "exec"), names)
    result = train(names[name](project="mine"))
    rows = [(row["step"], row) for row in result.history]
    assert calls == [(begin, {"project": "mine"}), *rows, (end, {})]


@pytest.mark.parametrize(
    ("nlls", "patience", "end", "best"),
    [
        ([0.5, 0.4, 0.6, 0.7, 0.1], 2, 8, 4),
        ([0.5, 0.4, 0.6, 0.3, 0.4, 0.5], 2, 12, 8),
        ([0.5, 0.6, 0.7], 1, 4, 2),
        ([0.5, 0.4, 0.3, 0.4, 0.2, 0.4], 0, 12, 10),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_patience_ends_training_in_the_best_state(
    make_causal, records, tmp_path, nlls, patience, end, best, resumed
):
    """After a restart too, and a restart after the end runs no step."""
    split = make_causal().readout.encode(records)

    def run(steps, told, checkpoints=None, **options):
        torch.manual_seed(0)
        adapter = make_causal()
        model = ScalaBLModel(adapter, num_data=len(split))
        flat = dict(decay="constant", warmup=0.0, kl=KLSchedule(1.0, "constant"))
        config = FitConfig(steps=steps, batch_size=4, **flat, **options)
        guide = AutoSubspaceNormal(model)
        options = {"validate": lambda: next(told), "checkpoints": checkpoints, "progress": False}
        return fit(model, guide, split, config, **options), adapter

    if resumed:
        cut = Checkpoints(tmp_path, CheckpointConfig(every=2))
        with pytest.raises(StopIteration):
            run(12, iter(nlls[:1]), cut, eval_every=2, keep="best", patience=patience)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=2)) if resumed else None
    told = iter(nlls[1:] if resumed else nlls)
    options = dict(eval_every=2, keep="best", patience=patience)
    result, adapter = run(12, told, checkpoints, **options)
    assert (len(result.history), result.best_step) == (end, best)
    if resumed:
        again, _ = run(12, iter([]), checkpoints, **options)
        assert again.history == result.history
    _, plain = run(best, iter([0.0]))
    for name, value in plain.named_parameters().items():
        torch.testing.assert_close(adapter.named_parameters()[name], value, rtol=0, atol=0)


def test_validation_as_in_the_documentation(make_causal, records):
    adapter = make_causal()
    train, validation = adapter.encode(records), adapter.encode(make_records(9))
    model = sp.ScalaBLModel(adapter, num_data=len(train))
    guide = sp.AutoSubspaceNormal(model)
    (code,) = [b for b in blocks(DOCUMENT, "python") if b.startswith("def validation_nll")]
    assert "steps=400, eval_every=25" in code
    short = code.replace("steps=400, eval_every=25", "batch_size=4, steps=6, eval_every=2")
    names = locals() | {"sp": sp}
    exec(compile(short, "callbacks.md", "exec"), names)
    rows = [row["step"] for row in names["result"].history if "validation_nll" in row]
    assert rows == [2, 4, 6]


def test_patience_without_validations_is_refused():
    with pytest.raises(ValueError, match="patience is 3, but eval_every is 0"):
        FitConfig(patience=3)
