"""The likelihood of completions: a categorical for each token."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..data import Batch
from ..readouts.completion_tokens import NO_TOKEN
from .model import ScalaBLModel

__all__ = ["CompletionModel"]


class CompletionModel(ScalaBLModel):
    r"""Bayesian LoRA for texts: a categorical for each token of a completion.

    .. math::
        s_{mj} &\sim p(s) \\
        y_{nt} \mid x_n, y_{n,<t}, s &\sim \mathrm{Categorical}(\mathrm{softmax} f_t(x_n, y_n; s)),
        \quad t = 1, …, T_n

    The T_n tokens are one event of the plate ``"data"`` over the N completions: −ELBO/N, and the
    ``nll`` that ``fit`` records, are nats a completion, not a token.

    :param adapter: in the subspace form, with the readout :class:`CompletionTokens`.
    """

    def observe(self, batch: Batch, logits: Tensor) -> Tensor:
        """``"label"``, the tokens of each completion, in the plate ``"data"``.

        :param logits: (\\*draws, B, K, C), returned as they are.
        """
        batch = batch.to(logits.device)
        labels = batch.labels
        assert labels is not None, "CompletionTokens encodes nothing without a completion"
        tokens = dist.Categorical(logits=logits).mask(labels != NO_TOKEN).to_event(1)
        with self.data_plate(batch):
            pyro.sample("label", tokens, obs=labels.clamp(min=0))
        return logits
