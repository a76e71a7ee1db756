from __future__ import annotations

import pytest
import torch
from conftest import make_records, tiny_llama, whole
from peft import PeftModel
from scipy import stats

from scalabl_pyro import AutoSubspaceNormal, FitConfig, Predictor, ScalaBLModel, draw
from scalabl_pyro import predict as predict_split
from scalabl_pyro.prediction import average
from scalabl_pyro.prediction.distillation import distill, fold_into


def test_a_student_starts_at_the_mean(make_choice, records):
    adapter, student = make_choice(), make_choice(svd=False)
    batch = whole(adapter.readout.encode(records))
    s = torch.randn(adapter.shape)
    fold_into(adapter, s, student)
    torch.testing.assert_close(student(batch), adapter(batch, s), atol=1e-6, rtol=1e-6)


def test_a_student_with_unit_rows_is_refused(make_causal):
    student = make_causal(svd=False, projections="unit")
    with pytest.raises(ValueError, match="projections='unit'"):
        fold_into(make_causal(), torch.ones(5, 4), student)


def test_a_student_with_other_layers_is_refused(make_causal):
    with pytest.raises(ValueError, match=r"other layers.*lm_head\.lora_A"):
        fold_into(
            make_causal(),
            torch.ones(5, 4),
            make_causal(svd=False, targets=("q_proj", "v_proj")),
        )


def test_distillation_approaches_the_average_and_saves_as_plain_peft(make_causal, tmp_path):
    adapter, student = make_causal(), make_causal(svd=False)
    split = adapter.readout.encode(make_records(24, labelled=False))
    guide = AutoSubspaceNormal(ScalaBLModel(adapter, num_data=len(split)), init_scale=0.5)
    log_probs = average(predict_split(Predictor(adapter, draw(guide, 20, seed=0)), split).logits)

    def divergence(predictor: Predictor) -> float:
        log_q = average(predict_split(predictor, split).logits)
        return float((log_probs.exp() * (log_probs - log_q)).sum(-1).mean())

    fold_into(adapter, guide.median()["s"], student)
    before = divergence(Predictor(student))
    config = FitConfig(steps=60, batch_size=8, lr=1e-2)
    predictor, _ = distill(student, split, log_probs, config, progress=False)
    after = divergence(predictor)
    assert before > 0.01
    assert after < before / 5
    assert predictor.draws is None
    with student.folded(torch.ones(student.shape)) as peft_model:
        peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    batch = whole(split)
    logits = student.readout(loaded.get_base_model(), batch.inputs)
    torch.testing.assert_close(logits, student(batch), atol=1e-5, rtol=1e-5)


def test_the_history_holds_the_divergence_from_the_average_to_the_student(make_causal, records):
    """By scipy, of one batch of all; the other way round it is another number."""
    student = make_causal(svd=False)
    split = student.readout.encode(records)
    log_probs = (3 * torch.randn(12, 4)).log_softmax(-1)
    with torch.no_grad():
        q = student(whole(split)).softmax(-1)
    config = FitConfig(steps=1, batch_size=12, lr=0.0, lr_guide=0.0)
    _, result = distill(student, split, log_probs, config, progress=False)
    expected = stats.entropy(log_probs.exp(), q, axis=1).mean()
    assert result.history[0]["nll"] == pytest.approx(expected, rel=1e-5)
    assert stats.entropy(q, log_probs.exp(), axis=1).mean() != pytest.approx(expected, rel=0.1)


def test_choices_that_do_not_exist_take_no_part(make_choice):
    student = make_choice(svd=False)
    split = student.readout.encode(make_records(8, choices=3, labelled=False))
    log_probs = average(predict_split(Predictor(student), split).logits)
    _, result = distill(student, split, log_probs, FitConfig(steps=2), progress=False)
    assert result.history[0]["nll"] == pytest.approx(0.0, abs=1e-5)


def test_distillation_on_a_cached_trunk_ends_in_the_same_place(make_causal):
    logits = []
    for cache in (False, True):
        student = make_causal(svd=False, targets=("lm_head",))
        split = student.readout.encode(make_records(12))
        train = student.cache_trunk(split) if cache else split
        log_probs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
        config = FitConfig(steps=3, batch_size=4)
        predictor, _ = distill(student, train, log_probs, config, progress=False)
        logits.append(predict_split(predictor, train).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_log_probs_of_another_split_are_refused(make_causal, records):
    student = make_causal(svd=False)
    split = student.readout.encode(records)
    with pytest.raises(ValueError, match=r"\(3, 4\): expected \(N, C\) = \(12, 4\)"):
        distill(student, split, torch.zeros(3, 4), FitConfig())
