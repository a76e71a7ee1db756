"""Effect handlers of the training loop: the observed NLL, and sites that nothing would train."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

__all__ = ["AllSites", "ObservedNLL"]


class ObservedNLL(Messenger):
    """Records −log p(y | x, s) of the observed sites that pass, as the ELBO scales it."""

    def __init__(self) -> None:
        super().__init__()
        self._terms: dict[str | None, list[Tensor]] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        # In the data plate: a factor outside it is no likelihood.
        plates = {frame.name: frame.size for frame in msg["cond_indep_stack"]}
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


class AllSites(Messenger):
    """Refuses sites that training would pass over: uncovered latents, and unknown parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._known = {id(parameter) for parameter in parameters}
        self._alone: dict[tuple[str | None, int], Any] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        # A guide's own, as in Pyro's joint guides.
        auxiliary = (msg["infer"] or {}).get("is_auxiliary")
        if not (msg["is_observed"] or auxiliary or site_is_subsample(msg)):
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
