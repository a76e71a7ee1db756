"""The ablation runs on tiny sizes, and again from what it kept."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from conftest import make_records, tiny_bert_config, write_jsonl
from transformers import BertForMultipleChoice


@pytest.fixture
def ablation():
    from benchmarks.quality import ablation

    return ablation


@pytest.fixture
def words(tmp_path, tokenizer) -> list[str]:
    """Arguments for a small encoder and a few questions."""
    torch.manual_seed(1)
    model = BertForMultipleChoice(tiny_bert_config(num_hidden_layers=3, hidden_size=32))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for data in ("openbookqa", "arc_challenge"):
        for split, count in (("train", 16), ("validation", 4), ("test", 6)):
            write_jsonl(tmp_path / "data" / data / f"{split}.jsonl", make_records(count))
    write_jsonl(tmp_path / "data" / "mmlu" / "college_physics" / "test.jsonl", make_records(5))
    places = [f"--{name}={tmp_path / name}" for name in ("model", "data", "runs")]
    return [*places, "--steps=2", "--questions=12", "--train-draws=25", "--seeds=1"]


def last_line(ablation, monkeypatch, capsys, words: list[str]) -> dict:
    monkeypatch.setattr(sys, "argv", ["ablation.py", *words])
    ablation.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]


def test_every_row_runs_and_is_kept(ablation, monkeypatch, capsys, words, tmp_path):
    monkeypatch.setattr(ablation, "MOMENT_DRAWS", 500)
    tables = last_line(ablation, monkeypatch, capsys, words)
    assert tables["trials"][tables["chosen"]] == min(tables["trials"].values())
    for group, expected in ablation.GROUPS.items():
        assert tables[group].keys() == expected.rows.keys()
        for row in tables[group].values():
            # So few questions may all be answered wrongly, and then no score can tell them apart.
            figures = [
                row[key] for key in row if not key.startswith(("auroc", "aupr", "fpr95", "prr"))
            ]
            assert all(math.isfinite(x) for pair in figures for x in pair)
    guides, D = tables["guides"], 4 * 8
    assert guides["normal"]["numbers"][0] == 2 * D
    assert guides["delta"]["numbers"][0] == D
    assert guides["low rank 4"]["numbers"][0] == (2 + 4) * D
    assert {"kl", "elbo", "elpd_loo", "k_hat", "entropy_gain"} < guides["IAF, moved"].keys()
    assert "kl" not in guides["delta"]
    runs = (tmp_path / "runs").read_text()
    assert tables["kl"]["linear"] == tables["scale"]["initial σ 0.05"] == guides["normal"]
    assert "linear" not in runs  # what changes nothing runs once, with the guides
    again = last_line(ablation, monkeypatch, capsys, words)
    assert again == tables
    assert (tmp_path / "runs").read_text() == runs


def test_the_entropy_gain_is_that_of_a_normal(ablation):
    """KL(q ‖ product of its marginals) = −½ log(1 − ρ²) for two coordinates."""
    rho = 0.6
    joint = torch.distributions.MultivariateNormal(
        torch.zeros(2), torch.tensor([[1.0, 3 * rho], [3 * rho, 9.0]])
    )
    figures = ablation.correlations(joint.sample((100_000,)).view(-1, 1, 2))
    assert figures["correlation"] == pytest.approx(rho, abs=0.01)
    assert figures["entropy_gain"] == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.01)


def test_the_diagonal_gap_is_that_of_the_nearest_diagonal_normal(ablation):
    """The product of normals nearest to a normal in KL(q‖p) has its conditional variances."""
    half = torch.tensor([[1.0, 0.0, 0.0], [1.5, 1.0, 0.0], [-0.5, 0.8, 0.5]])
    p = torch.distributions.MultivariateNormal(torch.zeros(3), scale_tril=half)
    sd = p.precision_matrix.diagonal().rsqrt()
    q = torch.distributions.MultivariateNormal(torch.zeros(3), scale_tril=sd.diag())
    figures = ablation.correlations(p.sample((100_000,)).view(-1, 1, 3))
    expected = float(torch.distributions.kl_divergence(q, p))
    assert figures["diagonal_gap"] == pytest.approx(expected, abs=0.02)
    assert abs(figures["diagonal_gap"] - figures["entropy_gain"]) > 0.1  # another number


def test_the_elbo_is_that_of_pyro(ablation, words, tmp_path):
    """Two ways to the same number: log p(y, s) − log q(s) averaged here, and Trace_ELBO."""
    import pyro
    from pyro.infer import Trace_ELBO

    bench = ablation.Ablation(
        str(tmp_path / "model"),
        str(tmp_path / "data"),
        str(tmp_path / "runs"),
        steps=2,
        questions=12,
        train_draws=400,
    )
    work = bench.works["openbookqa"]
    row = ablation.GROUPS["guides"].rows["IAF, moved"]
    fitted, seconds = work.fit(row, ablation.Setting(1e-3, 1.0), 0, 2)
    assert seconds > 0
    train = work.splits["train"]
    figures = ablation.training_figures(fitted, train, 400)
    pyro.set_rng_seed(1)
    elbo = Trace_ELBO(max_plate_nesting=1)
    batch = train.collate(list(train))
    with torch.no_grad():
        losses = torch.tensor([elbo.loss(fitted.model, fitted.guide, batch) for _ in range(400)])
    error = float(losses.std()) / 400**0.5
    assert figures["elbo"] == pytest.approx(-float(losses.mean()), abs=6 * error)
