"""Two processes that share minibatches train as one process does."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_records, predictions_of, scalabl, write_jsonl
from safetensors.torch import load_file

from scalabl_pyro import distributed, load_run


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


def two_processes(script: str, *arguments: str) -> list[int]:
    """Run a script in two processes of one group; their exit statuses."""
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=os.environ | environment | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    return [process.wait(timeout=120) for process in processes]


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
    logits = [predictions_of(tmp_path / name)["test"].logits for name in ("one", "two")]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    losses = []
    for name in ("one", "two"):
        with (tmp_path / name / "history.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert load_run("two").predictor.num_draws == 10  # in one process
    assert len(losses[0]) == 20


OTHERWISE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import lora, make_records, tiny_llama
from safetensors.torch import save_file
from transformers import AutoTokenizer
from scalabl_pyro import AutoSubspaceNormal, FitConfig, ScalaBLModel, SubspaceAdapter
from scalabl_pyro import distributed, fit
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.readouts import LabelTokens

distributed.start()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
adapter = SubspaceAdapter(tiny_llama(vocab_size=len(tokenizer)), lora("q_proj"), readout)
if distributed.rank():
    with torch.no_grad():
        for A in adapter.matrices.A.values():
            A.weight.neg_()
split = adapter.encode(make_records(8))
model = ScalaBLModel(adapter, num_data=8)
guide = AutoSubspaceNormal(model)
fit(model, guide, split, FitConfig(steps=3, batch_size=4, lr=0.01), progress=False)
state = {name: value.detach().clone() for name, value in adapter.state().items()}
save_file(state | {"loc": guide.loc.detach()}, f"{sys.argv[3]}/{distributed.rank()}.safetensors")
"""


def test_processes_start_from_the_same_projections(local_model, tmp_path):
    """Singular vectors have the sign that rounding gives them."""
    arguments = [str(ROOT / "tests"), str(local_model), str(tmp_path)]
    assert two_processes(OTHERWISE, *arguments) == [0, 0]
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in "01")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(two[name], value), name


UNREACHED = """
import sys, torch
from scalabl_pyro import distributed
distributed.start()
rank = distributed.rank()
a, b, c = (torch.zeros(n, requires_grad=True) for n in (2, 3, 4))
a.grad = torch.full((2,), 1.0 + 2 * rank)
if rank:  # as an expert that no token of the other share reached
    b.grad = torch.full((3,), 6.0)
terms = torch.tensor([float(rank), 5.0])
distributed.average_gradients([a, b, c], terms)
assert a.grad.tolist() == [2.0] * 2, a.grad
assert b.grad.tolist() == [3.0] * 3, b.grad
assert c.grad is None
assert terms.tolist() == [0.5, 5.0]
"""


def test_a_parameter_that_one_share_does_not_reach():
    assert two_processes(UNREACHED) == [0, 0]


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
