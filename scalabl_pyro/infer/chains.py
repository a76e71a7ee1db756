"""Hamiltonian Monte Carlo over s: draws from the posterior itself, for fixed projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..data import Batch, Split
from ..models.model import ScalaBLModel, check_latents_of_data, check_model
from ..models.priors import latent_dims
from ..rng import forked_rng
from .batches import whole_split
from .kl import is_enumerated
from .messengers import ScaledToAll

if TYPE_CHECKING:
    import arviz as az

__all__ = ["KERNELS", "Chains", "mcmc"]

#: Pyro's kernels by name
KERNELS = {"hmc": HMC, "nuts": NUTS}


@dataclass(frozen=True, slots=True)
class Chains:
    """Draws of Markov chains after warm-up.

    :param draws: (chains, S, M, r) draws of ``"s"``.
    :param latents: (chains, S, ...) draws of the prior's other sites, by name.
    :param diverging: (chains, S), true where the integrator diverged.
    :param acceptance: (chains,) share of steps that moved.
    :param module_names: the M modules.
    :param perp: (chains, S, M, k) draws of ``"s_perp"`` from its prior, if the model has it.
    """

    draws: Tensor
    latents: dict[str, Tensor]
    diverging: Tensor
    acceptance: Tensor
    module_names: tuple[str, ...]
    perp: Tensor | None = None

    def thin(self, num_draws: int) -> Tensor:
        """(S, M, r) draws, or (S, M, r + k) with s_perp, evenly spaced through all chains:
        ``Predictor(adapter, chains.thin(10))``.

        :raises ValueError: if there are fewer draws than asked for.
        """
        every = self.draws if self.perp is None else torch.cat([self.draws, self.perp], -1)
        every = every.flatten(0, 1)
        if not 1 <= num_draws <= len(every):
            raise ValueError(
                f"the number of draws is {num_draws}: expected 1 to {len(every)}, as many as the"
                " chains hold"
            )
        return every[torch.linspace(0, len(every) - 1, num_draws).round().long()]

    def diagnostics(self) -> dict[str, float]:
        """Whether the chains can be trusted: the worst coordinate of ``"s"``, and the whole.

        ``r_hat`` (rank-normalised, split; below 1.01), ``ess_bulk`` and ``ess_tail`` (Vehtari et
        al. 2021, arXiv 1903.08008), ``divergences`` (0) and mean ``acceptance``.
        """
        from ..arviz_versions import az  # slow to import, and sampling does not need it

        data = self.to_inference_data()
        return {
            "r_hat": float(az.rhat(data)["s"].max()),
            "ess_bulk": float(az.ess(data)["s"].min()),
            "ess_tail": float(az.ess(data, method="tail")["s"].min()),
            "divergences": float(self.diverging.sum()),
            "acceptance": float(self.acceptance.mean()),
        }

    def to_inference_data(self) -> az.InferenceData:
        """``posterior``: ``s`` (chain, draw, module, rank) and the prior's other sites;
        ``sample_stats``: ``diverging`` (chain, draw)."""
        from ..arviz_versions import dataset, groups

        sites = {"s": self.draws, **self.latents}
        coords = {"module": list(self.module_names), "rank": range(self.draws.shape[-1])}
        draws = {name: values.cpu().numpy() for name, values in sites.items()}
        of_s = self.draws.shape[2:]
        dims = {name: latent_dims(values.shape[2:], of_s) for name, values in draws.items()}
        posterior = dataset(draws, coords=coords, dims=dims)
        diverging = dataset({"diverging": self.diverging.numpy()})
        return groups({"posterior": posterior, "sample_stats": diverging})


def mcmc(
    model: ScalaBLModel,
    split: Split,
    *,
    kernel: str = "nuts",
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_chains: int = 4,
    seed: int = 0,
    init_loc: Tensor | None = None,
    dispersion: float = 1.0,
    batch_size: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Chains:
    r"""Sample p(s | D) ∝ p(s) Π_n p(y_n | x_n, s) with Pyro's HMC or NUTS.

    Every projection, head and learned prior scale stays as it is. The likelihood is that of the
    whole split, for a minibatch would change the target. Chains run one after another, for a
    language model does not pickle; each has a random state of its own, and the global one is left
    alone. A site ``"s_perp"`` stays at its prior: chains run at s_perp = 0.

    :param split: the N labelled examples of ``model.num_data``.
    :param kernel: ``nuts`` (Hoffman & Gelman 2014) or ``hmc``.
    :param num_samples: S draws kept of each chain.
    :param warmup_steps: steps before them, which adapt step size and mass matrix.
    :param seed: fixes starts and draws.
    :param init_loc: (M, r), about which chains start; ``model.init_loc`` if left out.
    :param dispersion: standard deviation of the starts about it, on the unconstrained scale. R-hat
        means something only where this is more than that of the posterior.
    :param batch_size: examples in one pass if the split does not fit; more than one pass costs a
        second forward each.
    :param options: of Pyro's kernel, such as ``full_mass``, ``max_tree_depth``, ``num_steps``.
    :raises ValueError: if a value is out of range, labels are missing, or the split does not hold
        ``model.num_data`` examples.
    """
    check_model(model)
    _check(kernel, num_samples, warmup_steps, num_chains, dispersion)
    batches = whole_split(model, split, batch_size)
    loc = model.init_loc if init_loc is None else init_loc
    if loc.shape != model.init_loc.shape:
        raise ValueError(
            f"init_loc has shape {tuple(loc.shape)}: expected (M, r) {tuple(model.init_loc.shape)}"
        )
    runs: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
    with (
        _frozen(model),
        model.projections.one_site(),
        forked_rng(),
    ):
        potential, transforms, start = _potential(model, batches)
        start["s"] = transforms["s"](loc.to(start["s"]))
        # Chains of neighbouring seeds must not share a random state.
        for chain_seed in np.random.SeedSequence(seed).generate_state(num_chains):
            torch.manual_seed(int(chain_seed))
            sampler = MCMC(
                KERNELS[kernel](potential_fn=potential, **options),
                num_samples,
                warmup_steps,
                initial_params={
                    name: z + dispersion * torch.randn_like(z) for name, z in start.items()
                },
                transforms=transforms,
                disable_progbar=not progress,
            )
            sampler.run()
            runs.append((sampler.get_samples(), sampler.diagnostics()))
        perp = None
        if model.prior_perp is not None:
            perp = model.prior_perp.sample(torch.Size([num_chains, num_samples]))
    sites = {name: torch.stack([draws[name] for draws, _ in runs]) for name in start}
    diverging = torch.zeros(num_chains, num_samples, dtype=torch.bool)
    for chain, (_, diagnostics) in enumerate(runs):
        diverging[chain, diagnostics["divergences"]["chain 0"]] = True
    return Chains(
        draws=sites.pop("s"),
        latents=sites,
        diverging=diverging,
        acceptance=torch.tensor(
            [diagnostics["acceptance rate"]["chain 0"] for _, diagnostics in runs]
        ),
        module_names=model.adapter.module_names,
        perp=perp,
    )


def _potential(
    model: ScalaBLModel, batches: list[Batch]
) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Any], dict[str, Tensor]]:
    """−log p(s, D) as a function of the unconstrained sites, their transforms, and a start."""
    prior = model.prior_perp
    fixed = {} if prior is None else {"s_perp": torch.zeros_like(prior.mean)}
    at_zero = poutine.condition(model, fixed)
    made = []
    for batch in batches:
        with ScaledToAll(model.num_data, len(batch)):
            made.append(initialize_model(at_zero, (batch,), init_strategy=model.init_loc_fn))
    start, potential, transforms, trace = made[0]
    if len(batches) == 1:
        return potential, transforms, start
    of_batch = [
        node
        for node in trace.nodes.values()
        if node["type"] == "sample" and node["cond_indep_stack"] and not is_enumerated(node)
    ]
    check_latents_of_data(
        model, of_batch, f"{len(batches)} passes (batch_size) would share them among their examples"
    )
    # Each batch scales its likelihood to the data set, so that the mean over batches, weighted by
    # their sizes, is the whole: prior and Jacobian enter with weights that add up to 1.
    weights = torch.tensor([len(batch) / model.num_data for batch in batches])

    def whole(z: dict[str, Tensor]) -> Tensor:
        # Without recomputation the graphs of all batches would be held at once.
        terms = [checkpoint(each, z, use_reentrant=False) for _, each, _, _ in made]
        return weights.to(terms[0]) @ torch.stack(terms)

    return whole, transforms, start


@contextmanager
def _frozen(model: ScalaBLModel) -> Iterator[None]:
    """No gradient for anything but the latent sites, and evaluation mode."""
    model.adapter.eval()
    every = [*model.adapter.named_parameters().values(), *model.parameters()]
    trained = [parameter for parameter in every if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _check(
    kernel: str, num_samples: int, warmup_steps: int, num_chains: int, dispersion: float
) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}: expected one of {sorted(KERNELS)}")
    # Four draws are the fewest that R-hat can split.
    for name, value, low in (
        ("num_samples", num_samples, 4),
        ("warmup_steps", warmup_steps, 0),
        ("num_chains", num_chains, 1),
    ):
        if not (isinstance(value, Integral) and value >= low):
            raise ValueError(f"{name} is {value!r}: expected a whole number, {low} or more")
    if not 0 <= dispersion < math.inf:
        raise ValueError(f"dispersion is {dispersion}: expected a finite number, 0 or more")
