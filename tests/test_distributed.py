"""Two processes that share minibatches train as one process does."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import make_records, scalabl, write_jsonl
from safetensors.torch import load_file

from scalabl_pyro import distributed, load_run
from scalabl_pyro.commands._runs import load_predictions


def free_port() -> int:
    with socket.socket() as open_socket:
        open_socket.bind(("127.0.0.1", 0))
        return open_socket.getsockname()[1]


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` of two processes, which find no GPU and use gloo."""
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), "-m", "scalabl_pyro", *words]
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_two_processes_train_as_one(local_model, tmp_path, monkeypatch, shard):
    for name, count in (("train", 32), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))
    monkeypatch.chdir(tmp_path)
    words = ["train", f"model.name={local_model}", "data.root=data", "progress=false"]
    words += ["fit.steps=20", "fit.batch_size=8", "fit.lr=0.01", "lora.targets=[q_proj,v_proj]"]
    words += ["lora.subspace=activations"]
    assert scalabl(*words, "run_dir=one") == 0
    done = launch(*words, "run_dir=two", f"model.shard={str(shard).lower()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"run": "two"') == 1  # one process speaks

    one, two = (
        {
            **load_file(tmp_path / name / "projections.safetensors"),
            **load_file(tmp_path / name / "posterior.safetensors"),
        }
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-5, msg=name)
    logits = [load_predictions(tmp_path / name)["test"].logits for name in ("one", "two")]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    losses = []
    for name in ("one", "two"):
        with (tmp_path / name / "history.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert load_run("two").predictor.num_draws == 10  # in one process
    assert len(losses[0]) == 20


def test_a_batch_that_cannot_be_shared_is_refused(make_causal, records):
    split = make_causal().readout.encode(records)
    with pytest.raises(ValueError, match="a batch of 3 examples cannot be shared evenly by 2"):
        next(split.minibatches(3, seed=0, rank=0, world_size=2))
    shares = [next(split.minibatches(4, seed=0, rank=rank, world_size=2)) for rank in (0, 1)]
    whole = next(split.minibatches(4, seed=0))
    together = torch.stack([shares[0].labels, shares[1].labels], 1).flatten()
    assert torch.equal(together, whole.labels)


def test_processes_that_would_go_on_from_different_steps_stop(monkeypatch):
    def gather(numbers, number):
        numbers[:] = [10, number]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    distributed.check_same(10, "different steps")
    with pytest.raises(RuntimeError, match=r"different steps: \[10, 5\]"):
        distributed.check_same(5, "different steps")
