r"""Uncertainty of texts, from what S draws of s say of their tokens.

A text y_1 … y_T has the probability p_k(Y) = Π_t p_k(y_t | y_<t) under draw k. Which draw wrote it
is told by its tokens, so that after y_<t the draws no longer weigh the same:

.. math:: w_{kt} \propto \prod_{u < t} p_k(y_u \mid y_{<u}), \qquad
    \tilde p_t = \sum_k w_{kt} \, p_k(\cdot \mid y_{<t}), \qquad
    \prod_t \tilde p_t(y_t) = \frac{1}{S} \sum_k p_k(Y)

("expectation of products", Malinin and Gales 2021, arXiv 2002.07650). With these weights the chain
rule of information holds: the mutual informations of the tokens, summed along a text and averaged
over texts drawn from p̃, are the mutual information between the text and the draw,

.. math:: E_{Y \sim \tilde p} \Big[ \sum_t \mathrm{MI}_t \Big] = I(Y; k) \le \log S

With equal weights in each token ("product of expectations") the sum has no such bound: it is a sum
of scores of tokens, and no information of a text.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .metrics import all_alike, average

__all__ = [
    "WEIGHTS",
    "TokenScores",
    "check_weights",
    "equal_weights",
    "posterior_weights",
    "semantic_entropy",
    "sequence_rmi",
    "token_scores",
]


#: numbers of logits in float64 at once
_AT_ONCE = 1 << 24


def equal_weights(read: Tensor) -> Tensor:
    """log w = −log S, (S, …) like what it is given."""
    return torch.full_like(read, -math.log(len(read)))


def posterior_weights(read: Tensor) -> Tensor:
    """log w_k, (S, …), normalised over the S draws.

    :param read: (S, …), log p_k of the tokens that were read so far; 0 before the first.
    """
    return read.log_softmax(0)


#: weights of the draws by name: functions of log p_k(y_<t), (S, …), that return log w of that shape
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "equal": equal_weights,
    "posterior": posterior_weights,
}


def check_weights(name: str) -> None:
    """:raises ValueError: if there are no such weights."""
    if name not in WEIGHTS:
        raise ValueError(f"weights is {name!r}: expected one of {sorted(WEIGHTS)}")


class TokenScores(NamedTuple):
    """The next token's uncertainty at N places, in nats.

    :param log_probs: (N, C), log p̄ of the weighted average.
    :param entropy: (N,), H[p̄]: total uncertainty.
    :param mutual_information: (N,), H[p̄] − Σ_k w_k H[p_k] ≥ 0.
    :param epkl: (N,), the expected KL(p_j ‖ p_k) of two draws j, k ≥ mutual information.
    """

    log_probs: Tensor
    entropy: Tensor
    mutual_information: Tensor
    epkl: Tensor


def token_scores(logits: Tensor, log_weights: Tensor) -> TokenScores:
    r"""How far draws disagree about the next token.

    The expected pairwise KL divergence and the reverse mutual information (Malinin and Gales 2021,
    and lm-polygraph: Fadeeva et al. 2023, arXiv 2311.07383), with weights w in the place of 1/S,

    .. math:: \mathrm{EPKL} = \sum_{jk} w_j w_k \mathrm{KL}(p_j \,\|\, p_k)
        = \mathrm{MI} + \mathrm{RMI}, \qquad
        \mathrm{RMI} = \sum_k w_k \mathrm{KL}(\bar p \,\|\, p_k)

    :param logits: (S, N, C).
    :param log_weights: (S, N), of weights that sum to 1 over the draws.
    :raises ValueError: if a row holds NaN or +∞, or nothing else than −∞.
    """
    size = max(1, _AT_ONCE // (len(logits) * logits.shape[-1]))
    parts = zip(logits.split(size, 1), log_weights.split(size, 1), strict=True)
    scores = [_token_scores(*part) for part in parts]
    return TokenScores(
        *(torch.cat(pieces).to(logits.dtype) for pieces in zip(*scores, strict=True))
    )


def _token_scores(logits: Tensor, log_weights: Tensor) -> TokenScores:
    """In float64: mutual information is the difference of two entropies that are nearly the
    same."""
    alike = all_alike(logits)
    if alike.all():  # of one draw, above all
        log_mean = average(logits[:1].double())
        nothing = torch.zeros_like(log_mean[:, 0])
        return TokenScores(log_mean, torch.special.entr(log_mean.exp()).sum(-1), nothing, nothing)
    logits, log_weights = logits.double(), log_weights.double().log_softmax(0)
    log_mean = average(logits, log_weights)
    mean = log_mean.exp()
    total = torch.special.entr(mean).sum(-1)
    each, weights = logits.log_softmax(-1), log_weights.exp()
    within = (weights * torch.special.entr(each.exp()).sum(-1)).sum(0)
    expected = (weights[..., None] * each).sum(0)  # (N, C), of log p_k
    cross = -(mean * expected).masked_fill(mean == 0, 0.0).sum(-1)
    mutual = (total - within).clamp(min=0).masked_fill(alike, 0.0)
    pairwise = torch.maximum(cross - within, mutual).masked_fill(alike, 0.0)
    return TokenScores(log_mean, total, mutual, pairwise)


def sequence_rmi(draw_log_probs: Tensor, weights: Tensor | None = None) -> float:
    r"""Reverse mutual information KL(p(k) p(Y) ‖ p(k, Y)) between text and draw, in nats.

    .. math:: \sum_b π_b \Big( \log \bar p(Y_b) - \frac{1}{S} \sum_k \log p_k(Y_b) \Big), \qquad
        \bar p = \frac{1}{S} \sum_k p_k

    An estimate without bias if the texts are drawn from p̄ (``weights="posterior"`` of
    :class:`~scalabl_pyro.prediction.Decoding`) and π_b = 1/B. It has no upper bound. Of different
    texts that were searched for, such as those of a beam, lm-polygraph and Malinin and Gales take
    π_b ∝ p̄(Y_b): ``weights=average_log_prob.softmax(0)``.

    :param draw_log_probs: (S, B), log p_k(Y_b) of whole texts.
    :param weights: π (B,), 1/B each if left out.
    :raises ValueError: if the shapes do not fit, or a number is not finite.
    """
    if draw_log_probs.dim() != 2 or not draw_log_probs.numel():
        raise ValueError(
            f"draw_log_probs has shape {tuple(draw_log_probs.shape)}: expected (S, B), each 1 or"
            " more"
        )
    if not draw_log_probs.isfinite().all():
        raise ValueError("draw_log_probs holds NaN or infinity: expected finite numbers")
    S, B = draw_log_probs.shape
    if weights is None:
        weights = draw_log_probs.new_full((B,), 1 / B)
    if weights.shape != (B,):
        raise ValueError(f"weights has shape {tuple(weights.shape)}: expected ({B},), one a text")
    mean = draw_log_probs.logsumexp(0) - math.log(S)
    return float((weights * (mean - draw_log_probs.mean(0))).sum())


def semantic_entropy(
    texts: Sequence[str], entails: Callable[[str, str], bool] = operator.eq
) -> float:
    r"""Entropy over the meanings of sampled texts, in nats, in [0, log B].

    .. math:: -\sum_m \frac{n_m}{B} \log \frac{n_m}{B}

    Two texts have one meaning where each entails the other; a text joins the first meaning whose
    first text it shares this with (Kuhn, Gal and Farquhar 2023, arXiv 2302.09664). Shares of the
    samples stand for probabilities (the discrete version of Farquhar et al. 2024, Nature 630).

    :param texts: B answers to one prompt, each sampled.
    :param entails: whether the first text says what the second does; equality if left out.
    :raises ValueError: if there is no text, or one text for a list.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts is {texts!r}: expected a list of one text or more")
    meanings: list[str] = []
    members: Counter[int] = Counter()
    for text in texts:
        place = next(
            (i for i, one in enumerate(meanings) if entails(one, text) and entails(text, one)),
            len(meanings),
        )
        if place == len(meanings):
            meanings.append(text)
        members[place] += 1
    shares = torch.tensor(list(members.values()), dtype=torch.float64) / len(texts)
    return float(torch.special.entr(shares).sum())
