"""lm-polygraph: its own code for ensembles, over plain PEFT models, against draws of s."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import fill_lora_B, lora, tiny_llama
from peft import PeftModel

from scalabl_pyro import Predictor, SubspaceAdapter, generate
from scalabl_pyro.data import PROMPTS
from scalabl_pyro.prediction import Decoding, sequence_rmi
from scalabl_pyro.readouts import LabelTokens

pytest.importorskip("lm_polygraph", reason="needs the extra harness: there is no lm_polygraph")

from lm_polygraph import Dataset, UEManager
from lm_polygraph import estimators as library
from lm_polygraph.utils.builder_enviroment_stat_calculator import (
    BuilderEnvironmentStatCalculator,
)
from lm_polygraph.utils.ensemble_utils.ensemble_greedy import EnsembleGreedyMixin

from scalabl_pyro.integrations.lm_polygraph import PosteriorEnsemble, calculators

S, T = 4, 9
TEXTS = ["the cat", "a bird sings the red tree", "green"]
MEASURES = {
    "tu": "total_uncertainty",
    "du": "data_uncertainty",
    "mi": "mutual_information",
    "epkl": "epkl",
    "rmi": "rmi",
}


@pytest.fixture
def predictor(tokenizer):
    """Draws that disagree, on a model without an end token."""
    readout = LabelTokens(tokenizer, PROMPTS["letters"], "ABCD", max_length=64)
    llm = tiny_llama(vocab_size=len(tokenizer), eos_token_id=None)
    adapter = SubspaceAdapter(llm, lora("q_proj", "v_proj", "lm_head"), readout)
    fill_lora_B(adapter)
    return Predictor(adapter, adapter.init_loc + 2 * torch.randn(S, *adapter.shape))


@pytest.fixture
def plain(predictor, tmp_path):
    """Each draw as an adapter that PEFT loads on a model of its own."""
    models = []
    for k, s in enumerate(predictor.draws):
        with predictor.adapter.folded(s) as peft:
            peft.save_pretrained(tmp_path / str(k), save_embedding_layers=False)
        llm = tiny_llama(vocab_size=21)
        models.append(PeftModel.from_pretrained(llm, tmp_path / str(k)).eval())
    return models


class Ensemble(EnsembleGreedyMixin):
    """As much of a model as lm-polygraph's greedy search over an ensemble asks for."""

    mc = False
    ensembling_mode = "pe"
    device = torch.device("cpu")
    config = SimpleNamespace(is_encoder_decoder=True)
    generation_config = SimpleNamespace(
        output_scores=True, output_attentions=False, output_hidden_states=False, eos_token_id=None
    )

    def __init__(self, models):
        self.models = models

    def prepare_inputs_for_generation(self, input_ids, **_):
        return {"input_ids": input_ids}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **_):
        return model_kwargs

    @torch.no_grad()
    def search(self, ids: list[int]) -> dict:
        return self.greedy_search(
            torch.tensor([ids]),
            stopping_criteria=lambda rows, scores: rows.shape[1] == len(ids) + T,
            pad_token_id=0,
            encoder_outputs=[None] * len(self.models),
            return_dict_in_generate=True,
        )


def test_its_own_search_over_plain_models_measures_the_same(predictor, plain):
    """Token by token, for equal weights; and as means of a text for both kinds of weights."""
    tokenizer = predictor.adapter.readout.tokenizer
    texts = list(generate(predictor, TEXTS, Decoding(T)))
    stats = PosteriorEnsemble(predictor)({}, TEXTS, max_new_tokens=T)
    for n, (prompt, text) in enumerate(zip(TEXTS, texts, strict=True)):
        ids = tokenizer.encode(prompt)
        right = Ensemble(plain).search(ids)
        assert right["sequences"][0, len(ids) :].tolist() == text.ids.tolist()
        assert stats["greedy_tokens"][n] == text.ids.tolist()
        pe = {name: torch.stack(v)[:, 0].float() for name, v in right["pe_uncertainties"].items()}
        close = dict(atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(text.entropy, pe["total_uncertainty"], **close)
        torch.testing.assert_close(text.mutual_information, pe["mutual_information"], **close)
        torch.testing.assert_close(text.epkl, pe["epkl"], **close)
        torch.testing.assert_close(text.epkl - text.mutual_information, pe["rmi"], **close)
        assert pe["rmi"].min() > 1e-3
        for mode in ("pe", "ep"):
            own = stats["ensemble_token_scores"][f"{mode}_token_level_scores"]
            for name, values in right[f"{mode}_uncertainties"].items():
                mean = float(torch.stack(values).mean())
                assert own[name][n, 0] == pytest.approx(mean, abs=1e-5), (mode, name)
    pe, ep = (stats["ensemble_token_scores"][f"{m}_token_level_scores"] for m in ("pe", "ep"))
    assert abs(pe["rmi"] - ep["rmi"]).max() > 1e-3


def test_its_estimators_of_tokens_say_what_ours_do(predictor):
    texts = list(generate(predictor, TEXTS, Decoding(T)))
    stats = PosteriorEnsemble(predictor)({}, TEXTS, max_new_tokens=T)
    for name, ours in {
        "PETtu": lambda text: text.entropy,
        "PETdu": lambda text: text.entropy - text.mutual_information,
        "PETmi": lambda text: text.mutual_information,
        "PETepkl": lambda text: text.epkl,
        "PETrmi": lambda text: text.epkl - text.mutual_information,
    }.items():
        estimates = getattr(library, name)()(stats)
        expected = [float(ours(text).mean()) for text in texts]
        assert estimates.tolist() == pytest.approx(expected, abs=1e-4), name
    estimates = library.PETent5()(stats)
    assert (estimates <= math.log(5)).all()
    assert (estimates < library.PETent15()(stats)).all()


def test_its_estimators_of_sampled_texts_say_what_ours_do(predictor):
    stats = PosteriorEnsemble(predictor, samples=6, seed=3)({}, TEXTS, max_new_tokens=T)
    drawn = list(
        generate(predictor, [p for p in TEXTS for _ in range(6)], Decoding(T, True, seed=3))
    )
    estimates = library.PESrmi()(stats)
    for n, value in enumerate(estimates):
        texts = drawn[6 * n : 6 * n + 6]
        means = torch.stack([text.draw_log_probs.mean(-1) for text in texts], dim=-1)  # (S, B)
        weights = means.logsumexp(0).softmax(0)
        assert value == pytest.approx(sequence_rmi(means, weights), abs=1e-5)
        mean = torch.tensor([float(text.log_probs.mean()) for text in texts])
        mutual = torch.tensor([float(text.mutual_information.mean()) for text in texts])
        expected = float((mean.softmax(0) * mutual).sum())
        assert library.PETmi()(stats)[n] == pytest.approx(expected, abs=1e-5)
        total = sum(text.log_prob for text in texts) / 6
        assert library.MonteCarloSequenceEntropy()(stats)[n] == pytest.approx(-total, abs=1e-4)
    assert (estimates > 0).all()


def test_its_manager_runs_them(predictor):
    own = [
        *(getattr(library, f"{mode}T{name}")() for mode in ("PE", "EP") for name in MEASURES),
        library.PESrmi(),
        library.PEStu(),
        library.MaximumSequenceProbability(),
        library.MeanTokenEntropy(),
        library.MonteCarloSequenceEntropy(),
    ]
    manager = UEManager(
        Dataset(TEXTS, [""] * len(TEXTS), batch_size=2),
        predictor,
        own,
        BuilderEnvironmentStatCalculator(predictor),
        calculators(samples=2, seed=1),
        [],
        [],
        [],
        ignore_exceptions=False,
        verbose=False,
        max_new_tokens=T,
    )
    manager()
    first = PosteriorEnsemble(predictor, samples=2, seed=1)({}, TEXTS[:2], max_new_tokens=T)
    second = PosteriorEnsemble(predictor, samples=2, seed=1)({}, TEXTS[2:], max_new_tokens=T)
    for estimator in own:
        estimates = manager.estimations["sequence", str(estimator)]
        expected = [*estimator(first).tolist(), *estimator(second).tolist()]
        assert estimates == pytest.approx(expected, abs=1e-5), str(estimator)
    texts = [text.text for text in generate(predictor, TEXTS, Decoding(T))]
    assert manager.stats["greedy_texts"] == texts


def test_without_samples_their_statistics_are_not_offered():
    names = [name for container in calculators() for name in container.stats]
    assert "ensemble_token_scores" in names
    assert not any(name.startswith("sample_") for name in names)
