"""What a run folder says of itself: its model card and its cost."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import yaml
from conftest import FAST, make_records, scalabl, write_jsonl
from safetensors.torch import load_file
from scipy import stats

from scalabl_pyro.infer.checkpoints import Checkpoints
from scalabl_pyro.lora.passes import PassCounter
from scalabl_pyro.prediction import Interval
from scalabl_pyro.prediction.intervals import per_text
from scalabl_pyro.runs import RunFolderError
from scalabl_pyro.runs.card import head, results
from scalabl_pyro.runs.cost import read_cost

N_TRAIN, N_VALIDATION, N_TEST = 16, 8, 9


@pytest.fixture
def train(tmp_path, local_model):
    """``scalabl train`` on a tiny model and made-up questions; the run folder."""
    counts = {"train": N_TRAIN, "validation": N_VALIDATION, "test": N_TEST}
    for name, count in counts.items():
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_records(count))

    def run(*words: str, name: str = "run"):
        where = [f"model.name={local_model}", f"data.root={tmp_path / 'data'}"]
        folder = tmp_path / name
        assert scalabl("train", *where, *FAST, f"run_dir={folder}", *words) == 0
        return folder

    return run


def test_a_run_folder_has_a_card_with_intervals_by_hand(train, tmp_path):
    folder = train("method.draws=3")
    card = (folder / "README.md").read_text()
    saved = load_file(folder / "predictions.safetensors")
    probs = saved["test.logits"].double().softmax(-1).mean(0)
    loss = -probs[torch.arange(N_TEST), saved["test.labels"]].log().numpy()
    half = stats.t.ppf(0.975, N_TEST - 1) * loss.std(ddof=1) / math.sqrt(N_TEST)
    (row,) = re.findall(r"^\| nll \| (.*) \|$", card, re.MULTILINE)
    splits = re.search(r"^\| \| (.*) \|$", card, re.MULTILINE)[1].split(" | ")
    assert row.split(" | ")[splits.index("test")] == f"{loss.mean():.4g} ± {half:.2g}"
    assert "± is half of the 95 % interval over the questions" in card
    assert f"Examples: {N_TRAIN} of train, {N_TEST} of test, {N_VALIDATION} of validation" in card
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert settings["method"]["draws"] == 3
    assert settings["data"]["root"] == str(tmp_path / "data")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    write_jsonl(tmp_path / "two.jsonl", make_records(2))
    code = code.replace("FOLDER", str(folder)).replace("FILE", str(tmp_path / "two.jsonl"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["run"].predict_proba(names["records"]).shape == (2, 4)
    adapter = (folder / "adapter" / "README.md").read_text()
    assert f"| nll | {row} |" in adapter
    assert "More Information Needed" not in adapter, "the template of PEFT"


def test_the_rank_is_that_of_the_adapter_to_start_from(train):
    first = train("method=mle", "lora.r=4", name="first")
    assert "LoRA of rank 4 on" in (first / "README.md").read_text()
    folder = train(f"lora.start={first / 'adapter'}", "method.projections=fixed", name="second")
    for card in (folder / "README.md", folder / "adapter" / "README.md"):
        assert "LoRA of rank 4 on" in card.read_text()


def test_names_stand_in_a_card_as_they_are():
    assert "base_model: org/name" in head("org/name")
    assert "base_model: gpt2" in head("gpt2")
    assert not any("base_model" in line for line in head("/tmp"))
    table = results({"<script>|x": {"nll": Interval(1.0, math.nan, math.nan, math.nan, math.nan)}})
    assert "| | &lt;script&gt;\\|x |" in table
    assert "| nll | 1 |" in table


def test_the_nll_of_texts_is_the_mean_of_a_loop():
    torch.manual_seed(0)
    log_probs, lengths = -torch.rand(3, 7), torch.tensor([2, 4, 1])
    values = per_text(log_probs, lengths)
    place, expected = 0, []
    for length in lengths.tolist():
        tokens = log_probs[:, place : place + length].double().exp().mean(0).log()
        expected.append(-float(tokens.sum()))
        place += length
    assert values["nll"].tolist() == pytest.approx(expected)
    assert values["tokens"].tolist() == [2, 4, 1]


@pytest.mark.parametrize(
    ("words", "training", "prediction"),
    [
        (["method=mle"], (4 * 4, 4 * 4), 1),
        (["method=mle", "fit.accumulation=2"], (2 * 4 * 4, 2 * 4 * 4), 1),
        # The look at validation that chooses the temperature.
        (["method=temperature"], (4 * 4 + N_VALIDATION, 4 * 4), 1),
        (["method=ensemble", "method.members=3"], (3 * 4 * 4, 3 * 4 * 4), 3),
        (["method=scalabl", "method.draws=5"], (4 * 4, 4 * 4), 5),
        (
            ["method.draws=5", "method.elbo.num_particles=2"],
            (2 * 4 * 4, 2 * 4 * 4),
            5,
        ),
        # NLL of the plain model, then of as many draws in each bisection.
        (
            ["method=tfb", "method.draws=2", "method.bisections=3"],
            (4 * 4 + N_TRAIN * (1 + 3 * 2), 4 * 4),
            2,
        ),
        (["method=zero_shot"], (0, 0), 1),
    ],
)
def test_passes_are_counted(train, words, training, prediction):
    """Steps × minibatch, and what a method adds; a question is one row of tokens here."""
    cost = read_cost(train(*words))
    assert (cost.training.forward, cost.training.backward) == training
    assert (cost.prediction.forward, cost.prediction.backward) == (prediction, 0)
    assert cost.training.seconds > 0


def test_draws_that_share_a_trunk_take_their_share_of_the_blocks(train):
    """Of two blocks the upper one alone is adapted: the lower one runs once for all draws."""
    cost = read_cost(train("lora.layers=[1]", "lora.targets=[q_proj]", "method.draws=5"))
    assert cost.prediction.forward == (1 + 5) / 2
    assert cost.training.forward == 4 * 4
    assert cost.training.backward == 4 * 4 / 2


def test_numbers_trained_and_stored_are_those_of_the_matrices(train):
    """r = 8 on q and v of two blocks, 16 wide and with two heads of 8."""
    A_and_B = 2 * 2 * (8 * 16 + 16 * 8)
    cost = read_cost(train("method=mle", "lora.targets=[q_proj,v_proj]", name="mle"))
    assert (cost.trained, cost.stored) == (A_and_B, A_and_B)
    words = ["lora.targets=[q_proj,v_proj]", "method.draws=3"]
    cost = read_cost(train(*words, name="scalabl"))
    s = 2 * 2 * 8
    assert cost.trained == A_and_B // 2 + 2 * s, "V is frozen, and q has means and deviations"
    assert cost.stored == A_and_B + 2 * s + 3 * s


def test_a_resumed_run_does_not_know_its_training(train, monkeypatch):
    folder = train("method=mle", "checkpoint.every=2", name="first")
    assert read_cost(folder).training.forward == 4 * 4
    monkeypatch.setattr(Checkpoints, "exist", True)
    folder = train("method=mle", "checkpoint.every=2", "resume=true", name="second")
    assert read_cost(folder).training is None


def test_a_run_with_trials_counts_its_own_settings_alone(train):
    trials = "trials=[{fit:{lr:0.01}},{fit:{lr:0.001}}]"
    cost = read_cost(train("method=mle", trials))
    assert cost.training.forward == 4 * 4


def test_memory_is_that_of_all_gpus_since_the_last_reset(monkeypatch):
    peaks, started = [0, 0], []

    def reset(device):
        if not started:  # as CUDA does before its first use
            raise RuntimeError("Invalid device argument: did you call init?")
        peaks[device] = 1

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: bool(started))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: peaks[device])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", reset)
    counter = PassCounter()
    assert counter.passes().peak is None
    started.append(True)
    peaks[:] = 5, 7
    assert counter.passes(4).peak == 12, "it is not that of an example"
    counter.reset()
    assert counter.passes().peak == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which counts it")
def test_on_a_cpu_nobody_counts_memory():
    assert PassCounter().passes().peak is None


def test_a_folder_without_a_cost_has_none_and_a_damaged_one_is_named(tmp_path):
    assert read_cost(tmp_path) is None
    (tmp_path / "cost.json").write_text(json.dumps({"trained": 1}))
    with pytest.raises(RunFolderError, match=r"cost\.json is damaged: .* stored is missing"):
        read_cost(tmp_path)
