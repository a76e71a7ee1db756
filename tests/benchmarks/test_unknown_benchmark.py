"""benchmarks/quality/unknown.py without its training runs: areas, intervals, controls, resuming."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_records, tiny_bert_config
from safetensors.torch import save_file
from transformers import BertForMultipleChoice

from scalabl_pyro import AutoSubspaceNormal, LoRAModel, Predictor, ScalaBLModel, draw
from scalabl_pyro.lora import set_perp
from scalabl_pyro.methods import Fitted
from scalabl_pyro.prediction import aurc, auroc, auroc_at_equal_length, fpr_at_tpr


@pytest.fixture
def unknown():
    from benchmarks.quality import unknown

    return unknown


def test_labels_say_what_a_trial_trains(unknown):
    for row in unknown.ROWS.values():
        for label, method in row.trials.items():
            for part in label.split():
                name, value = part.split("=")
                places = (method, method.config, getattr(method.config.kl, "weight", None))
                setting = places[2] if name == "kl_weight" else None
                for place in places[:2]:
                    setting = getattr(place, name, setting)
                assert setting == float(value), label


def test_an_area_over_pairs_is_that_of_the_package(unknown):
    scores = torch.randint(6, (40,)).float()  # with ties
    positive = torch.arange(40) % 3 == 0
    lengths = torch.randint(20, (40,))
    above, below = scores[positive], scores[~positive]
    every = unknown.area(above, below, torch.ones(()))
    assert every == pytest.approx(auroc(scores, positive))
    near = (lengths[positive][:, None] - lengths[~positive]).abs() <= 2
    expected = auroc_at_equal_length(scores, positive, lengths)
    assert unknown.area(above, below, near) == pytest.approx(expected)


def test_the_interval_of_a_mean_is_the_known_one(unknown):
    x = torch.randn(400, dtype=torch.float64)
    interval = unknown.bootstrapped(lambda k, i: float(x[i].mean()), 1, [400], 2000)
    half = 1.96 * float(x.std()) / 20
    assert interval["mean"] == pytest.approx(float(x.mean()))
    assert interval["high"] - interval["low"] == pytest.approx(2 * half, rel=0.1)
    # Seeds that differ make it wider: here nothing else does.
    by_seed = unknown.bootstrapped(lambda k, i: float(k), 5, [3], 2000)
    assert by_seed["mean"] == 2
    assert by_seed["high"] - by_seed["low"] == pytest.approx(2 * 1.96 * (2 / 5) ** 0.5, rel=0.15)
    assert unknown.bootstrapped(lambda k, i: 7.0, 5, [3], 10) == {"mean": 7, "low": 7, "high": 7}


def test_how_far_the_choices_are_apart(unknown, make_choice, tokenizer):
    adapter = make_choice(svd=False)
    with torch.no_grad():
        for B in adapter.matrices.B.values():
            B.weight.zero_()
    records = make_records(5)
    torch.manual_seed(1)
    plain = BertForMultipleChoice(tiny_bert_config()).eval()
    distances = unknown.contrast(adapter, adapter.encode(records))
    for value, example in zip(distances, adapter.encode(records), strict=True):
        means = []
        for c in range(4):
            rows = {n: torch.tensor([ids[c]]) for n, ids in example.rows.items()}
            with torch.no_grad():
                means.append(plain.bert(**rows).last_hidden_state[0].mean(0))
        center = sum(means) / 4
        expected = sum(float((m - center).square().sum()) for m in means) / 4
        assert float(value) == pytest.approx(expected, rel=1e-4)


class Questions:
    def __init__(self, lengths, labels=None) -> None:
        self.lengths, self.labels = lengths, labels

    def __len__(self) -> int:
        return len(self.lengths)


class Bench:
    """Ten test questions, of which the first four are answered wrong, and six of physics."""

    def __init__(self, folder) -> None:
        self.runs = folder / "runs.jsonl"
        test = Questions([5] * 10, torch.tensor([1] * 4 + [0] * 6))
        self.splits = {"test": test, "physics": Questions([6] * 6)}

    def cached(self, name, run):
        return {"nll": 0.0 if "perp_scale=1 " in name else 1.0}

    def fit(self, method, seed, **options):
        raise AssertionError(f"seed {seed} was run again")


def test_finished_runs_are_read_and_not_run_again(unknown, tmp_path, monkeypatch):
    monkeypatch.setattr(unknown, "LEVEL", 0.5)
    bench = Bench(tmp_path)
    log_probs = torch.tensor([[0.8, 0.2]]).log().expand(16, -1)
    high_for_wrong = torch.tensor([0.9, 0.8, 0.7, 0.2, *[0.1] * 3, *[0.3] * 3])
    high_for_physics = torch.cat([high_for_wrong, torch.full((6,), 0.75)])
    for seed in range(2):
        file = unknown.run_file(bench, f"V random, s_perp perp_scale=1 seed {seed}")
        scores = {"log_probs": log_probs.contiguous(), "novelty": high_for_physics}
        save_file(scores, file, metadata={"dtype": "float32"} if seed else None)
    save_file({"tokens": torch.ones(16)}, unknown.run_file(bench, "controls"))
    rows = {"V random, s_perp": unknown.ROWS["V random, s_perp"]}
    contents = unknown.table(bench, rows, dict, 2, 10)
    assert contents["chosen"] == {"V random, s_perp": "perp_scale=1"}
    assert contents["float32"] == ["V_random_s_perp_perp_scale=1_seed_1"]
    row = contents["rows"]["V random, s_perp"]
    wrong = torch.arange(10) < 4
    assert row["novelty"]["wrong"]["auroc"]["mean"] == pytest.approx(auroc(high_for_wrong, wrong))
    assert row["novelty"]["wrong"]["aurc"]["mean"] == pytest.approx(
        aurc(high_for_wrong, wrong.float())
    )
    other = torch.arange(16) >= 10
    assert row["novelty"]["physics"]["auroc"]["mean"] == pytest.approx(
        auroc(high_for_physics, other)
    )
    assert row["novelty"]["physics"]["fpr95"]["mean"] == pytest.approx(
        fpr_at_tpr(high_for_physics, other)
    )
    # Of the first five test questions two have 0.75 or more: p = 3/6. The others have at most 0.3.
    found, alarms = (row["novelty"]["physics"][name]["mean"] for name in ("found", "false_alarms"))
    assert (found, alarms) == (1.0, 0.0)
    minus = row["novelty"]["physics"]["auroc_minus"]
    assert minus.keys() == {"tokens"}
    assert minus["tokens"]["mean"] == pytest.approx(auroc(high_for_physics, other) - 0.5)
    assert "auroc_minus" not in row["novelty"]["wrong"]
    assert row["tokens"]["wrong"]["auroc"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    with pytest.raises(AssertionError, match="seed 2 was run again"):
        unknown.table(bench, rows, dict, 3, 10)


@pytest.mark.parametrize("kind", ["point", "s", "s_perp"])
def test_every_question_has_every_score(unknown, make_choice, monkeypatch, kind):
    monkeypatch.setattr(unknown, "KNOWN", 4)
    monkeypatch.setattr(unknown, "PRECISION", 1e-3)
    adapter = make_choice(svd=kind != "point", perp=2 * (kind == "s_perp"))
    train, new = adapter.encode(make_records(8)), adapter.encode(make_records(7))
    guide, model = None, LoRAModel(adapter, num_data=8)
    predictor = Predictor(adapter)
    if kind != "point":
        if kind == "s_perp":
            set_perp(adapter, train)
        model = ScalaBLModel(adapter, num_data=8)
        guide = AutoSubspaceNormal(model)
        predictor = Predictor(adapter, draw(guide, 3, seed=0))
    bench = SimpleNamespace(splits={"train": train, "all": new}, batch_size=3)
    by_score = unknown.scores(bench, predictor)
    further = unknown.of_features(bench, Fitted(predictor, None, model, guide))
    assert further.keys() == {"mahalanobis", "weight_novelty"} | (
        set() if guide is None else {"novelty"}
    )
    by_score |= further
    of_draws = {"mutual_information", "noise_to_signal", "novelty"}
    names = {"log_probs", "max_probability", "entropy", "mahalanobis", "weight_novelty"}
    assert by_score.keys() == names | (set() if kind == "point" else of_draws)
    for values in by_score.values():
        assert len(values) == 7
        assert values.isfinite().all()
    p = by_score["log_probs"].exp()
    torch.testing.assert_close(-by_score["max_probability"].float(), p.amax(-1))
    assert float(by_score["weight_novelty"].min()) > 0
    assert float(by_score["weight_novelty"].max()) < 1
