from __future__ import annotations

import pytest
import torch
from conftest import lora, make_records, tiny_bert_config, tiny_llama
from transformers import BertForMultipleChoice

from scalabl_pyro import SubspaceAdapter
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.prediction import mahalanobis, pooled_features
from scalabl_pyro.prediction.mahalanobis import ledoit_wolf
from scalabl_pyro.readouts import ChoiceLikelihood


@pytest.mark.parametrize("size", [(40, 6), (5, 8), (400, 3)])
def test_the_covariance_is_ledoits_and_wolfs(size):
    """The paper's b², d² and m, in loops."""
    x = torch.randn(*size).double() @ torch.diag(torch.arange(1.0, size[1] + 1)).double()
    x = x - x.mean(0)
    N, H = size
    S = sum(torch.outer(row, row) for row in x) / N
    m = float(S.trace()) / H
    d = float((S - m * torch.eye(H).double()).square().sum()) / H
    b = sum(float((torch.outer(row, row) - S).square().sum()) for row in x) / N**2 / H
    b = min(b, d)
    expected = b / d * m * torch.eye(H).double() + (d - b) / d * S
    torch.testing.assert_close(ledoit_wolf(x + 3.0), expected)


def test_it_is_that_of_scikit_learn():
    covariance = pytest.importorskip("sklearn.covariance")
    x = torch.randn(60, 7).double() @ torch.randn(7, 7).double()
    expected, _ = covariance.ledoit_wolf(x.numpy())
    torch.testing.assert_close(ledoit_wolf(x), torch.tensor(expected))


def test_distances_are_those_of_many_known_normals():
    """With Σ known well, d² is a χ² of H degrees of freedom; a shift by δ adds δᵀΣ⁻¹δ."""
    mix = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    known, other = torch.randn(20_000, 2) @ mix.mT, torch.randn(20_000, 2) @ mix.mT
    distances = mahalanobis(known, other)
    assert float(distances.square().mean()) == pytest.approx(2.0, rel=0.05)
    shifted = mahalanobis(known, other + torch.tensor([0.0, 3.0]))
    far = torch.tensor([0.0, 3.0]) @ torch.linalg.inv(mix @ mix.mT) @ torch.tensor([0.0, 3.0])
    assert float(shifted.square().mean()) == pytest.approx(2.0 + float(far), rel=0.05)


def test_features_that_do_not_vary_have_no_distance():
    with pytest.raises(ValueError, match="vary"):
        mahalanobis(torch.ones(4, 3), torch.ones(2, 3))


@pytest.mark.parametrize("repeats", [1, 3])
def test_two_different_questions_are_enough(repeats):
    """Along the line between them a distance is in units of their spread."""
    known = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]).repeat(repeats, 1)
    distances = mahalanobis(
        known, torch.tensor([[1.0, 0.0, 0.0], [4.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    )
    assert distances[:2].tolist() == pytest.approx([0.0, 3.0], abs=1e-3)
    assert 1e3 < float(distances[2]) < float("inf")  # where nothing is known to vary


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"known has shape \(1, 3\)"):
        mahalanobis(torch.zeros(1, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"features \(2, 4\)"):
        mahalanobis(torch.zeros(5, 3), torch.zeros(2, 4))


def test_features_are_means_of_plain_transformers_hidden_states(make_causal):
    adapter = make_causal(filled=False)
    split = adapter.encode(make_records(9))
    llm = tiny_llama()
    expected = [
        llm.model(torch.tensor(example.rows["input_ids"])).last_hidden_state[0].mean(0)
        for example in split
    ]
    features = pooled_features(adapter, split, adapter.init_loc, batch_size=4)
    torch.testing.assert_close(features, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)


def test_features_of_choices_in_rows_are_means_over_the_choices_that_exist(make_choice):
    adapter = make_choice(svd=False)
    with torch.no_grad():
        for B in adapter.matrices.B.values():
            B.weight.zero_()
    split = adapter.encode([*make_records(4), *make_records(3, choices=2)])
    torch.manual_seed(1)
    llm = BertForMultipleChoice(tiny_bert_config()).eval()
    expected = []
    for example in split:
        tokens = [
            llm.bert(
                **{name: torch.tensor([rows[c]]) for name, rows in example.rows.items()}
            ).last_hidden_state[0]
            for c in range(example.num_choices)
        ]
        expected.append(torch.cat(tokens).mean(0))
    features = pooled_features(adapter, split, batch_size=3)
    torch.testing.assert_close(features, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)


def test_features_of_choices_behind_their_prompts_and_alone(tokenizer):
    readout = ChoiceLikelihood(
        tokenizer, PROMPTS["question"], num_classes=4, max_length=64, normalise="unconditional"
    )
    adapter = SubspaceAdapter(tiny_llama(), lora("q_proj"), readout)
    split = adapter.encode([*make_records(4), *make_records(3, choices=2)])
    llm = tiny_llama()
    expected = []
    for example in split:
        rows = [torch.tensor([ids]) for ids in example.rows["input_ids"]]
        tokens = [llm.model(row).last_hidden_state[0] for row in rows]
        expected.append(torch.cat(tokens).mean(0))
    features = pooled_features(adapter, split, adapter.init_loc, batch_size=3)
    torch.testing.assert_close(features, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)
