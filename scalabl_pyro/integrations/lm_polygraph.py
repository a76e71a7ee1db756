r"""Draws of s as the ensemble of lm-polygraph (Fadeeva et al. 2023, arXiv 2311.07383).

Its estimators of ensembles, such as ``PETmi``, ``PETepkl`` and ``PESrmi``, read the statistic
``ensemble_token_scores``, whose own calculator lm-polygraph 0.7 has switched off. The one here
fills it from a predictor, with that calculator's definitions. With the average :math:`\bar p_t`
(``pe``: of equal weights; ``ep``: of posterior weights) each of the T tokens of a text has

* ``total_uncertainty`` H[p̄_t] and ``data_uncertainty`` 1/S Σ_k H[p_kt]
* ``mutual_information``, the difference of these
* ``epkl_total_uncertainty`` −1/S Σ_k E_p̄[log p_kt]; ``epkl`` and ``rmi`` are what it exceeds the
  second and the first of these by

of which the text's are the means. For ``pe`` these are the figures of
:func:`~scalabl_pyro.prediction.token_scores`. For ``ep`` they are not: there ours weighs the draws
in every mean, so that the chain rule of information holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lm_polygraph.stat_calculators import StatCalculator
from lm_polygraph.utils.factory_stat_calculator import StatCalculatorContainer
from torch import Tensor

from ..prediction.generation import Decoding, continue_tokens, encode_prompts, read_again
from ..prediction.metrics import average
from ..prediction.predictor import Predictor
from ..prediction.text_scores import posterior_weights
from ..prediction.texts import ScoredText, log_probs_of

__all__ = ["PosteriorEnsemble", "calculators", "load_stat_calculator"]

_GREEDY = ["greedy_texts", "greedy_tokens", "greedy_log_likelihoods", "entropy"]
_SAMPLE = ["sample_texts", "sample_tokens", "sample_log_probs", "sample_log_likelihoods"]
_ENSEMBLE = "ensemble_token_scores"
#: lm-polygraph's entropies of the most probable tokens
_TOP = (5, 10, 15)


class PosteriorEnsemble(StatCalculator):
    """Texts of the model average, and the statistics of estimators that need no other model.

    Greedy texts, and sampled ones if asked for, are those of the average of each next token; so are
    their likelihoods and entropies, end tokens included. ``ensemble_token_scores`` is of the
    sampled texts of a prompt, or of its greedy text if there are none.

    Usage::

        stats = PosteriorEnsemble(predictor)({}, ["Who runs?", "Who sings?"])
        PETepkl()(stats)  # (2,)

    :param predictor: S draws on a causal language model.
    :param samples: texts drawn for each prompt.
    :param seed: of these.
    """

    def __init__(self, predictor: Predictor, *, samples: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.predictor = predictor
        self.samples = samples
        self.seed = seed

    @staticmethod
    def meta_info() -> tuple[list[str], list[str]]:
        """The statistics, and those that they need."""
        return [*_GREEDY, *_SAMPLE, _ENSEMBLE], []

    def __call__(
        self,
        dependencies: Mapping[str, Any],
        texts: Sequence[str],
        model: Any = None,
        max_new_tokens: int = 100,
    ) -> dict[str, Any]:
        """Statistics by name, a row a prompt.

        :param dependencies: unused, as is ``model``.
        :param texts: the prompts, which go through the chat template if the readout has
            ``chat=True``.
        :raises ValueError: if a prompt cannot be continued.
        """
        decoding = Decoding(max_new_tokens)
        rows = encode_prompts(self.predictor, texts, decoding)
        greedy = list(continue_tokens(self.predictor, rows, decoding))
        stats: dict[str, Any] = {
            "greedy_texts": [text.text for text in greedy],
            "greedy_tokens": [text.ids.tolist() for text in greedy],
            "greedy_log_likelihoods": [text.log_probs.tolist() for text in greedy],
            "entropy": [text.entropy.tolist() for text in greedy],
        }
        per_prompt = [[text] for text in greedy]
        if self.samples:
            decoding = Decoding(max_new_tokens, do_sample=True, seed=self.seed)
            repeated = [row for row in rows for _ in range(self.samples)]
            drawn = list(continue_tokens(self.predictor, repeated, decoding))
            per_prompt = [drawn[n : n + self.samples] for n in range(0, len(drawn), self.samples)]
            stats |= {
                "sample_texts": [[text.text for text in of_prompt] for of_prompt in per_prompt],
                "sample_tokens": [
                    [text.ids.tolist() for text in of_prompt] for of_prompt in per_prompt
                ],
                "sample_log_probs": [
                    [text.log_prob for text in of_prompt] for of_prompt in per_prompt
                ],
                "sample_log_likelihoods": [
                    [text.log_probs.tolist() for text in of_prompt] for of_prompt in per_prompt
                ],
            }
        return stats | {_ENSEMBLE: self._ensemble(rows, per_prompt)}

    def _ensemble(
        self, rows: Sequence[list[int]], per_prompt: Sequence[Sequence[ScoredText]]
    ) -> dict[str, Any]:
        """What lm-polygraph's estimators of ensembles read, in arrays (N, B): B texts a prompt."""
        measured = [
            [_measures(self.predictor, row, text.ids) for text in of_prompt]
            for row, of_prompt in zip(rows, per_prompt, strict=True)
        ]
        # A decoder's text has no start token, so that all means are over its T tokens.
        log_probas = [
            [text.draw_log_probs.mean(-1).numpy() for text in of_prompt] for of_prompt in per_prompt
        ]
        own = np.array(log_probas).swapaxes(1, 2)  # (N, S, B)
        scores = np.array(
            [[float(text.log_probs.mean()) for text in of_prompt] for of_prompt in per_prompt]
        )
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        shared = {"log_probas": own, "probas": np.exp(own), "weights": weights}
        return {
            f"{mode}_token_level_scores": {
                name: np.array([[text[mode][name] for text in of_prompt] for of_prompt in measured])
                for name in measured[0][0][mode]
            }
            | shared
            for mode in ("pe", "ep")
        } | shared


@torch.no_grad()
def _measures(
    predictor: Predictor, prompt: Sequence[int], ids: Tensor
) -> dict[str, dict[str, float]]:
    """Means over the T tokens of a text, by mode and name."""
    logits = read_again(predictor, prompt, ids.tolist())  # (S, T, C)
    each = logits.log_softmax(-1)
    own = log_probs_of(ids.to(logits.device), logits)
    averages = {
        "pe": average(logits),
        "ep": average(logits, posterior_weights(own.cumsum(-1) - own)),
    }
    data = torch.special.entr(each.exp()).sum(-1).mean(0)  # (T,)
    expected = each.mean(0)  # (T, C)
    top = averages["pe"].exp().topk(max(_TOP)).values
    by_mode = {}
    for mode, log_mean in averages.items():
        mean = log_mean.exp()
        total = torch.special.entr(mean).sum(-1)
        cross = -(mean * expected).masked_fill(mean == 0, 0.0).sum(-1)
        measures = {
            "total_uncertainty": total,
            "data_uncertainty": data,
            "mutual_information": total - data,
            "epkl_total_uncertainty": cross,
            "epkl": cross - data,
            "rmi": cross - total,
        }
        for k in _TOP:
            few = top[:, :k] / top[:, :k].sum(-1, keepdim=True)
            measures[f"entropy_top{k}"] = torch.special.entr(few).sum(-1)
        by_mode[mode] = {name: float(value.mean()) for name, value in measures.items()}
    return by_mode


def calculators(*, samples: int = 0, seed: int = 0) -> list[StatCalculatorContainer]:
    """The calculators that lm-polygraph's ``UEManager`` builds, where a predictor is its model.

    The manager runs no calculator of a statistic whose name begins with ``ensemble_``. So this one
    stands there for the others, and a second one, which is never built, for the ensemble's.

    :param samples: see :class:`PosteriorEnsemble`, as is the seed.
    """
    return [
        StatCalculatorContainer(
            name=PosteriorEnsemble.__name__,
            builder=__name__,
            cfg={"samples": samples, "seed": seed},
            stats=[*_GREEDY, *(_SAMPLE if samples else [])],
        ),
        StatCalculatorContainer(name=_ENSEMBLE, stats=[_ENSEMBLE], dependencies=["greedy_texts"]),
    ]


def load_stat_calculator(config: Mapping[str, Any], environment: Any) -> PosteriorEnsemble:
    """By which lm-polygraph builds it.

    :param environment: its ``model`` is a predictor.
    """
    return PosteriorEnsemble(environment.model, **config)
