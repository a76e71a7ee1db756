"""Effect handlers of the training loop: the NLL, KL(q‖p), and sites that nothing would train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, cast

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Independent, kl_divergence

from .kl import is_enumerated

__all__ = ["AllSites", "LatentKL", "ObservedNLL", "ScaledToAll"]


class ObservedNLL(Messenger):
    """Records −log p(y | x, s) of the observed sites that pass, as the ELBO scales it."""

    def __init__(self) -> None:
        super().__init__()
        self._terms: dict[str | None, list[Tensor]] = {}
        #: whether a latent site is summed out, so that the terms are not the likelihood
        self.given_more = False

    def _pyro_post_sample(self, msg: Message) -> None:
        self.given_more |= is_enumerated(msg)
        # In the data plate: a factor outside it is no likelihood.
        plates = _plates(msg)
        particles = plates.pop("num_particles_vectorized", 1)
        if msg["is_observed"] and plates:
            distribution: Any = msg["fn"]
            log_prob = distribution.log_prob(msg["value"]).detach()
            log_prob = scale_and_mask(log_prob, msg["scale"], msg["mask"])
            self._terms.setdefault(msg["name"], []).append(log_prob.sum() / particles)

    def total(self) -> float:
        """−Σ_n E_q[log p(y_n | x_n, s)] of all N examples, as the minibatch estimates it.

        :raises ValueError: if no observed site passed.
        """
        if not self._terms:
            raise ValueError(
                "the model observes nothing in a plate: sample the labels within"
                " self.data_plate(batch), as LoRAModel.observe does"
            )
        # Particles that do not run as one batch pass one by one.
        return -float(sum(torch.stack(passes).mean() for passes in self._terms.values()))


class ScaledToAll(Messenger):
    """Refuses a batch that counts as if it were all data: an observed site in a plate of the
    batch's own size, and none that is scaled.

    :param num_data: N.
    :param rows: B of the batch.
    :raises ValueError: at the end.
    """

    def __init__(self, num_data: int, rows: int) -> None:
        super().__init__()
        self._num_data, self._rows = num_data, rows
        self._scaled, self._unscaled = False, cast(str | None, None)

    def _pyro_post_sample(self, msg: Message) -> None:
        plates = _plates(msg)
        plates.pop("num_particles_vectorized", None)
        if not (msg["is_observed"] and plates) or (msg["infer"] or {}).get("_deterministic"):
            return
        scaled = not isinstance(msg["scale"], (int, float)) or msg["scale"] != 1
        self._scaled |= scaled or self._num_data in plates.values()
        if self._rows in plates.values() and self._rows < self._num_data:
            self._unscaled = msg["name"]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None and self._unscaled is not None and not self._scaled:
            raise ValueError(
                f"the observed site {self._unscaled!r} stands in a plate of the batch's"
                f" {self._rows} examples, of N = {self._num_data}: sample it within"
                " self.data_plate(batch), which scales it to all"
            )


def _plates(msg: Message) -> dict[str, int]:
    """The sizes of the plates around a site, by name."""
    return {frame.name: frame.size for frame in msg["cond_indep_stack"]}


class LatentKL(Messenger):
    r"""Records KL(q‖p) of the latent sites that pass, without β, whatever the ELBO makes of it.

    .. math:: \sum_i E_q \Big[ KL\big(q(z_i \mid z_{<i}) \,\|\, p(z_i \mid z_{<i})\big) \Big]

    with each site's term in closed form where torch has one, else log q − log p of the draw.

    :param beta: the KL weight that the sites' scales hold.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self._beta = beta
        self._of_guide: dict[str | None, tuple[Any, Tensor]] = {}
        self._terms: dict[str | None, list[_Term]] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or is_enumerated(msg):
            return
        name, fn, value = msg["name"], cast(Any, msg["fn"]), cast(Tensor, msg["value"])
        q, p = fn, None
        if not (msg["infer"] or {}).get("is_auxiliary"):  # of the guide alone
            q, drawn = self._of_guide.pop(name, (None, None))
            if drawn is not value:  # the guide runs first, and the model is handed its very tensor
                self._of_guide[name] = fn, value
                return
            p = fn
        particles = _plates(msg).get("num_particles_vectorized", 1)
        scale = msg["scale"] / self._beta / particles  # that of plates
        self._terms.setdefault(name, []).append(_Term(q, p, value, scale, msg["mask"]))

    def total(self) -> float:
        """In nats, averaged over particles and passes."""
        return self._sum(_kl)

    def sampled(self) -> float:
        """The same of log q − log p at the draws, whether or not there is a closed form."""
        return self._sum(_log_ratio)

    @torch.no_grad()
    def _sum(self, kl: Callable[[Any, Any, Tensor], Tensor]) -> float:
        # Particles that do not run as one batch pass one by one, and so do minibatches.
        return float(
            sum(torch.stack([_nats(t, kl) for t in each]).mean() for each in self._terms.values())
        )


class _Term(NamedTuple):
    q: Any
    p: Any
    value: Tensor
    scale: Any
    mask: Any


def _nats(term: _Term, kl: Callable[[Any, Any, Tensor], Tensor]) -> Tensor:
    q, p, value = term.q, term.p, term.value
    nats = q.log_prob(value) if p is None else kl(q, p, value)
    return scale_and_mask(nats, term.scale, term.mask).sum()


def _kl(q: Any, p: Any, value: Tensor) -> Tensor:
    # Pyro's automatic guides draw an auxiliary site, and hand it on as a Delta with a Jacobian, of
    # which the closed form that Pyro registers takes no notice.
    base = q
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(base, dist.Delta):
        with suppress(NotImplementedError):
            return kl_divergence(q, p)
    return _log_ratio(q, p, value)


def _log_ratio(q: Any, p: Any, value: Tensor) -> Tensor:
    return q.log_prob(value) - p.log_prob(value)


class AllSites(Messenger):
    """Refuses sites that training would pass over: uncovered latents, and unknown parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._known = {id(parameter) for parameter in parameters}
        self._alone: dict[tuple[str | None, int], Any] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        # A guide's own, as in Pyro's joint guides.
        auxiliary = (msg["infer"] or {}).get("is_auxiliary")
        covered = msg["is_observed"] or auxiliary or site_is_subsample(msg)
        if not (covered or is_enumerated(msg)):
            # The model is handed the very tensor that the guide drew, once for each particle.
            key = msg["name"], id(msg["value"])
            if self._alone.pop(key, None) is None:
                self._alone[key] = msg["value"]

    def _pyro_post_param(self, msg: Message) -> None:
        value: Any = msg["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if leaf.requires_grad and id(leaf) not in self._known:
            raise ValueError(
                f"the parameter {msg['name']!r} belongs to no module that fit trains, and would"
                " never move: write the guide as a PyroModule that holds it as a PyroParam"
            )

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        uncovered = sorted({str(name) for name, _ in self._alone})
        if uncovered and error[0] is None:
            raise ValueError(
                f"the latent sites {uncovered} are in the model or in the guide alone: every latent"
                " site of the model needs one of the same name in the guide"
            )
