"""Checkpoints of unfinished training: to the bit, whole or not at all, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pyro
import pytest
import torch
from conftest import make_records, predictions_of, scalabl, write_jsonl
from filelock import FileLock
from pyro.infer import Trace_ELBO

from scalabl_pyro import ScalaBLModel, fit, load_run
from scalabl_pyro.guides import make_guide
from scalabl_pyro.infer import Callback, FitConfig
from scalabl_pyro.infer import checkpoints as module
from scalabl_pyro.infer.checkpoints import CheckpointConfig, Checkpoints, Interrupted, TrainingState
from scalabl_pyro.lora import set_perp

FIT = FitConfig(steps=7, batch_size=4, lr=0.05, accumulation=2, kl_budget=5.0)
BEST = FitConfig(steps=7, batch_size=4, lr=0.05, eval_every=2, keep="best")


class Stop(Exception):
    pass


class Ends(Trace_ELBO):
    """Pulls the plug in the gradient after so many."""

    def __init__(self, gradients):
        super().__init__(max_plate_nesting=1)
        self.left = gradients

    def loss_and_grads(self, *args, **kwargs):
        if not self.left:
            raise Stop
        self.left -= 1
        return super().loss_and_grads(*args, **kwargs)


def train(make_causal, records, config, *, checkpoints=None, stop_after=1000, callbacks=()):
    """Parameters and result of training, interrupted in the step after so many."""
    pyro.set_rng_seed(0)
    adapter = make_causal()
    split = adapter.readout.encode(records)
    model = ScalaBLModel(adapter, num_data=len(split))
    guide = make_guide(model, "low_rank_multivariate_normal", rank=2)
    named = {**adapter.state(), **dict(guide.named_parameters())}
    result = fit(
        model,
        guide,
        split,
        config,
        elbo=Ends(stop_after * config.accumulation),
        validate=lambda: float(torch.sin(1e3 * guide.loc.detach().sum())),  # goes up and down
        checkpoints=checkpoints,
        progress=False,
        callbacks=callbacks,
    )
    return {name: value.detach().clone() for name, value in named.items()}, result


@pytest.mark.parametrize("config", [FIT, BEST], ids=["budget", "best"])
@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_an_interrupted_run_ends_as_one_that_was_not(
    make_causal, records, tmp_path, config, stop_after
):
    whole, expected = train(make_causal, records, config)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    with pytest.raises(Stop):
        train(make_causal, records, config, checkpoints=checkpoints, stop_after=stop_after)
    assert checkpoints.latest().step == stop_after
    resumed, result = train(make_causal, records, config, checkpoints=checkpoints)
    assert result == expected
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert len(list(tmp_path.iterdir())) == checkpoints.config.keep


def test_a_frozen_V_is_that_of_the_start(make_causal, records, tmp_path):
    """Of a V from the data the sign is that of rounding, which another machine does otherwise."""

    def run(turned: bool, steps: int, checkpoints: Checkpoints | None = None):
        pyro.set_rng_seed(0)
        adapter = make_causal(projections="frozen_v", perp=2)
        set_perp(adapter, split := adapter.encode(records))
        if turned:
            with torch.no_grad():
                for matrix in [*adapter.matrices.A.values(), *adapter.perp_A]:
                    matrix.weight.neg_()
        model = ScalaBLModel(adapter, num_data=len(split))
        guide = make_guide(model, "normal")
        config = FitConfig(steps=6, batch_size=4, lr=0.05)
        elbo = Ends(steps)
        fit(model, guide, split, config, elbo=elbo, checkpoints=checkpoints, progress=False)
        return adapter

    whole = run(False, 6)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    with pytest.raises(Stop):
        run(False, 3, checkpoints)
    resumed = run(True, 6, checkpoints)
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name


def test_torn_checkpoints_are_passed_over(make_causal, records, tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=4))
    train(make_causal, records, FIT, checkpoints=checkpoints)
    newest, second, third, _ = sorted(tmp_path.iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-10])  # truncated
    data = bytearray(second.read_bytes())
    data[-5] ^= 1  # one bit of a tensor
    second.write_bytes(bytes(data))
    assert checkpoints.latest().step == 5
    data = third.read_bytes()
    start = data.index(b"loss")
    place = next(i for i in range(start, len(data)) if data[i : i + 1] in b"12345678")
    digit = bytes([data[place] + 1])  # of a number in the history
    third.write_bytes(data[:place] + digit + data[place + 1 :])
    assert checkpoints.latest().step == 4
    for path in tmp_path.iterdir():
        path.write_bytes(b"\x80\x04pickle")
    assert checkpoints.latest() is None


def test_torn_checkpoints_never_push_out_good_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=1))
    checkpoints.save(TrainingState(10, {"a": torch.ones(3)}, {}))
    (tmp_path / "step-00000020.safetensors").write_bytes(b"torn")
    assert checkpoints.latest().step == 10
    checkpoints.save(TrainingState(11, {"a": torch.ones(3)}, {}))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000011.safetensors"]
    assert checkpoints.latest().step == 11


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    seen = []
    handler = signal.signal(signal.SIGTERM, lambda *_: seen.append("outside"))
    try:
        with checkpoints.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            assert checkpoints.asked
            assert seen == []
        assert seen == ["outside"]
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_checkpoints_that_a_signal_stopped_go_on_to_the_end(make_causal, records, tmp_path):
    """The same object again, as in a notebook."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1000))

    class Stop(Callback):
        def on_step(self, row):
            if row["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 3"):  # the next one sees that it was asked
        train(make_causal, records, FIT, checkpoints=checkpoints, callbacks=[Stop()])
    _, result = train(make_causal, records, FIT, checkpoints=checkpoints)
    assert result.history[-1]["step"] == FIT.steps


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    state = TrainingState(1, {"a": torch.ones(3)}, {"history": []})
    checkpoints.save(state)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    nothing_yet = Checkpoints(tmp_path / "none", CheckpointConfig(every=1))
    with pytest.raises(OSError, match=r"step 1 could not be written: .*: make room, then start ag"):
        nothing_yet.save(state)
    with pytest.raises(OSError, match=r"step 2 could not be written.*before it are .*resume=true"):
        checkpoints.save(TrainingState(2, state.tensors, state.values))
    assert [p.name for p in tmp_path.glob("step*")] == ["step-00000001.safetensors"]
    assert checkpoints.latest().step == 1


def test_a_signal_stops_after_the_step_with_a_checkpoint(make_causal, records, tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1000))
    whole, _ = train(make_causal, records, FIT)
    handler = signal.getsignal(signal.SIGTERM)
    original = Checkpoints.asked
    calls = []

    def asked(self):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original.fget(self)

    Checkpoints.asked = property(asked)
    try:
        with pytest.raises(Interrupted, match="after step 3"):
            train(make_causal, records, FIT, checkpoints=checkpoints)
    finally:
        Checkpoints.asked = original
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed, _ = train(
        make_causal, records, FIT, checkpoints=Checkpoints(tmp_path, CheckpointConfig(every=1000))
    )
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_a_checkpoint_of_other_parameters_is_refused(make_causal, records, tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    checkpoints.save(TrainingState(1, {"parameter.other": torch.ones(2)}, {}))
    with pytest.raises(ValueError, match="is of other parameters"):
        train(make_causal, records, FIT, checkpoints=checkpoints)


def test_processes_go_on_with_the_random_state_that_they_had_in_common(monkeypatch):
    """Of two with a GPU each, the one that saves has drawn nothing on the other's."""
    states = {0: torch.full((16,), 5, dtype=torch.uint8), 1: torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: states[device.index].copy_(state)
    )
    saved = module.random_state(torch.device("cuda", 0))
    module.set_random_state(saved, torch.device("cuda", 1))
    assert torch.equal(states[1], states[0])
    # One process goes on alone, where it sees both.
    states[1] = torch.zeros(16, dtype=torch.uint8)
    monkeypatch.setattr(module, "world_size", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    module.set_random_state(saved, torch.device("cuda", 1))
    assert torch.equal(states[1], states[0])


def test_intervals_must_be_positive():
    with pytest.raises(ValueError, match="every is 0"):
        CheckpointConfig(every=0)


@pytest.fixture
def words(local_model, tmp_path, monkeypatch):
    """``scalabl train`` on made-up questions."""
    for name, count in (("train", 16), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    monkeypatch.chdir(tmp_path)
    where = [f"model.name={local_model}", "data.root=data", "progress=false"]
    return ["train", *where, "fit.steps=6", "fit.batch_size=4", "checkpoint.every=2"]


def interrupt(monkeypatch, after):
    """Training stops by an error in the given step."""
    calls = []
    original = Trace_ELBO.loss_and_grads

    def ends(self, *args, **kwargs):
        calls.append(None)
        if len(calls) > after:
            raise RuntimeError("pulled the plug")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trace_ELBO, "loss_and_grads", ends)


def test_train_resumes_to_the_bit(words, tmp_path, capsys, monkeypatch):
    assert scalabl(*words, "run_dir=whole") == 0
    expected = json.loads(capsys.readouterr().out)
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        assert scalabl(*words, "run_dir=out") == 1
    assert "pulled the plug" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.unfinished"]

    assert scalabl(*words, "run_dir=out") == 1
    assert "go on with resume=true, or remove it" in capsys.readouterr().err
    assert scalabl(*words, "run_dir=out", "resume=true", "fit.lr=0.5") == 1
    assert "fit.lr: 0.5, was 0.005" in capsys.readouterr().err
    moved = Path("data/train.jsonl").read_text()
    write_jsonl(tmp_path / "data/train.jsonl", make_records(17))
    assert scalabl(*words, "run_dir=out", "resume=true") == 1
    assert "began with other records" in capsys.readouterr().err
    Path("data/train.jsonl").write_text(moved)
    with FileLock("out.unfinished/lock"):
        assert scalabl(*words, "run_dir=out", "resume=true") == 1
    assert "another process works on the run" in capsys.readouterr().err

    assert scalabl(*words, "run_dir=out", "resume=true") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["test"] == expected["test"]
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out"]
    whole, resumed = (predictions_of(tmp_path / name)["test"].logits for name in ("whole", "out"))
    assert torch.equal(whole, resumed)
    assert load_run("out").guide is not None


def test_a_run_that_failed_before_its_first_checkpoint_leaves_nothing(
    words, tmp_path, capsys, monkeypatch
):
    interrupt(monkeypatch, 1)
    assert scalabl(*words, "run_dir=out") == 1
    assert "pulled the plug" in capsys.readouterr().err
    assert list(tmp_path.glob("out*")) == []


def test_a_run_without_checkpoints_says_that_it_starts_anew(words, tmp_path, capsys):
    words = [*words, "run_dir=out"]
    (tmp_path / "out.unfinished").mkdir()  # as a process leaves it that was killed
    (tmp_path / "out.unfinished" / "config.yaml").touch()
    assert scalabl(*words, "resume=true") == 0
    said = capsys.readouterr().err
    assert "the unfinished run in out.unfinished left no checkpoint: it starts anew" in said
    assert (tmp_path / "out" / "metrics.json").exists()
