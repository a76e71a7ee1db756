"""The published ScalaBL algorithm, written anew; nothing else in the package builds on it.

It is written from the published settings and from descriptions of the algorithm, not from anybody's
code. What differs from :class:`~scalabl_pyro.methods.ScalaBL`: the divergence is KL(p‖q), which is
no part of an ELBO; it is minimised apart from the likelihood, by an optimizer and a schedule of its
own; and the mean of q is positive. Where the descriptions say nothing, this is what was chosen:

* σ itself is the parameter, and its sign does not matter. Its start U(0.05/√2, 0.05) is one of σ,
  not of ρ with σ = ρ²: so says the known value of KL(p‖q) at the start.
* The KL is the sum over all M·r coordinates.
* In each step the likelihood comes first, and its gradient is clipped as ``config`` says; the KL
  follows, at the new values.
* The rate of the KL is constant. The gradient of KL(p‖q) grows as 1/σ³ where σ is small, so that a
  σ can run away. This is of what is written here: the public implementation learns log σ, and its
  rate warms up and decays.
* i runs from 0 to M_KL and starts again; over one such round the weights add up to 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import kl_divergence
from tqdm import tqdm

from ..data import Split
from ..distributed import world_size
from ..guides import AutoSubspace
from ..infer.checkpoints import Checkpoints, Snapshot
from ..infer.svi import FitConfig, FitResult, NonFiniteLossError
from ..lora.adapter import SubspaceAdapter
from ..models.model import ScalaBLModel
from ..prediction.draws import draw
from ..prediction.predictor import Predictor
from .base import Method

__all__ = ["LogMeanNormal", "Reference", "burst_steps", "burst_weight", "fit_reference"]

log = logging.getLogger(__name__)


def burst_steps(num_data: int, batch_size: int) -> int:
    """M_KL = ⌊100 · N^{π/8} / B⌋; a burst of the KL comes every M_KL + 1 steps."""
    return int(100 * num_data ** (math.pi / 8) / batch_size)


def burst_weight(step: int, steps: int) -> float:
    """2^i / (2^{M_KL + 1} − 1) with i = step mod (M_KL + 1): half of it in the last step of each.

    :param step: 0-based.
    :param steps: M_KL.
    """
    i = step % (steps + 1)
    return 2.0 ** (i - steps) / (2 - 2.0**-steps)  # the same, without a number that overflows


class LogMeanNormal(AutoSubspace):
    r"""Diagonal normal whose mean is positive.

    .. math:: q(s) = \prod_{m, j} \mathrm{Normal}(s_{mj} \mid \exp λ_{mj}, ς_{mj}^2)

    λ starts where the mean is ``init_loc`` (the singular values of the fresh A), and ς at
    U(init_scale/√2, init_scale), from Pyro's random state.

    :raises ValueError: if an initial mean is not above 0.
    """

    log_loc: Tensor  # λ (M, r)
    signed_scale: Tensor  # ς (M, r)

    def __init__(
        self, model: ScalaBLModel, *, init_loc: Tensor | None = None, init_scale: float = 0.05
    ) -> None:
        super().__init__(model, init_loc=init_loc, init_scale=init_scale)
        if not (self._init_loc > 0).all():
            raise ValueError(
                f"init_loc has the value {float(self._init_loc.min())}: expected numbers above 0,"
                " for this guide's mean is the exponential of its parameter"
            )
        scale = torch.empty_like(self._init_loc).uniform_(init_scale / 2**0.5, init_scale)
        self.log_loc = PyroParam(self._init_loc.log(), constraints.real, 2)  # type: ignore[assignment]
        self.signed_scale = PyroParam(scale, constraints.real, 2)  # type: ignore[assignment]

    def base(self) -> dist.Independent:
        return self.marginals().to_event(2)

    def marginals(self) -> dist.Normal:
        return dist.Normal(self.log_loc.exp(), self.signed_scale.abs())


@dataclass(frozen=True)
class Reference(Method):
    """The published algorithm of Samplawski et al. 2025 (arXiv 2506.21408), only to compare with.

    A re-implementation: see the choices in :mod:`scalabl_pyro.methods.reference`. It does not
    maximise an ELBO, and its q(s) is no posterior: see :func:`fit_reference`. The
    published settings are 5,000 steps, batch size 4, ``lr`` and ``lr_guide`` 1e-4, ``warmup`` 0.06
    and linear decay. ``config.kl`` has no effect here. No checkpoints are written, which a warning
    says where they are asked for: an interrupted run starts anew, with ``resume`` too.

    :param init_scale: initial σ, drawn from U(init_scale/√2, init_scale).
    :param prior_scale: standard deviation of the prior, Normal(0, prior_scale²).
    :param lr_kl: learning rate of the KL, before its weights.
    :param draws: S of the bank that predicts.
    """

    name: ClassVar[str] = "reference"
    reads_texts: ClassVar[bool] = False
    svd: ClassVar[bool] = True

    config: FitConfig = FitConfig(  # noqa: RUF009  (frozen)
        steps=5000, batch_size=4, lr=1e-4, lr_guide=1e-4, clip_norm=math.inf
    )
    init_scale: float = 0.05
    prior_scale: float = 1.0
    lr_kl: float = 0.2
    draws: int = 10

    def __post_init__(self) -> None:
        for name in ("init_scale", "prior_scale", "lr_kl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number above 0")
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: expected 1 or more")
        if self.config.accumulation != 1:
            raise ValueError(
                f"accumulation is {self.config.accumulation}: method reference steps after every"
                " minibatch; set a larger batch_size instead"
            )

    def make_model(self, adapter: SubspaceAdapter, *, num_data: int) -> ScalaBLModel:
        """The probabilistic model of these settings."""
        return ScalaBLModel(adapter, num_data=num_data, prior=dist.Normal(0.0, self.prior_scale))

    def make_guide(self, model: ScalaBLModel) -> LogMeanNormal:
        """The untrained guide of these settings."""
        return LogMeanNormal(model, init_scale=self.init_scale)

    def make_predictor(self, model: ScalaBLModel, guide: AutoSubspace, *, seed: int) -> Predictor:
        """Averages over a bank of draws."""
        return Predictor(model.adapter, draw(guide, self.draws, seed=seed))

    def _train(
        self,
        model: Any,
        guide: Any,
        train: Split,
        checkpoints: Checkpoints | None = None,
        **options: Any,
    ) -> FitResult:
        if checkpoints is not None:
            log.warning(
                "method reference writes no checkpoints: if this run is interrupted, it starts anew"
            )
        return fit_reference(
            model, guide, train, self.config, lr_kl=self.lr_kl, progress=self.progress, **options
        )


def fit_reference(
    model: ScalaBLModel,
    guide: LogMeanNormal,
    train: Split,
    config: FitConfig,
    *,
    lr_kl: float = 0.2,
    seed: int = 0,
    validate: Callable[[], float] | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Two objectives, stepped in turn on the same parameters, changed in place.

    .. math::
        \text{AdamW:} \quad & -\tfrac{1}{B} \sum_n \log p(y_n \mid x_n, s), \quad s \sim q \\
        \text{SGD:} \quad & \frac{2^i}{2^{M_{KL} + 1} - 1} \, KL(p(s) \,\|\, q(s)), \quad
        i = t \bmod (M_{KL} + 1), \quad M_{KL} = \lfloor 100 \, N^{π/8} / B \rfloor

    with one draw of s for a batch. AdamW moves everything that is trained, SGD only q, in bursts:
    all but a few of the weights are close to 0.

    :param train: the N labelled examples.
    :param lr_kl: learning rate of SGD, without warm-up or decay.
    :param seed: fixes the order of the examples; the draws of s follow torch's own random state.
    :param validate: returns the validation NLL, called every ``config.eval_every`` steps.
    :returns: a history with ``loss`` and ``nll``, both the first objective; ``kl``, the KL(q‖p)
        that every method reports; ``reversed_kl``, KL(p‖q); and ``kl_weight``, all before the step.
    :raises NonFiniteLossError: if an objective is not finite.
    :raises ValueError: if an example has no label, validation is asked for without ``validate``, or
        several processes train together.
    """
    if world_size() > 1:
        raise ValueError(f"{world_size()} processes train together: method reference needs one")
    if train.labels is None:
        raise ValueError("training needs a label in every record")
    if config.eval_every and validate is None:
        raise ValueError("eval_every is set, but no validate function was given")
    adapter, prior = model.adapter, model.prior()
    trained = list(adapter.named_parameters().values())
    inferred = list(guide.parameters())
    parameters = [*trained, *inferred]
    groups = [
        {"params": trained, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": inferred, "lr": config.lr_guide, "weight_decay": 0.0},
    ]
    likelihood_optimizer = torch.optim.AdamW(groups, eps=1e-6)
    scheduler = torch.optim.lr_scheduler.LambdaLR(likelihood_optimizer, config.learning_rate)
    kl_optimizer = torch.optim.SGD(inferred, lr=lr_kl)
    batch_size = min(config.batch_size, len(train))
    minibatches = train.minibatches(batch_size, seed=seed)
    between_bursts = burst_steps(len(train), batch_size)
    good, best = Snapshot(parameters), Snapshot(parameters)
    best_nll, best_step = math.inf, config.steps
    history: list[dict[str, float]] = []

    adapter.train()
    # A NaN is to be found in the loss, which tells the step, not in an argument.
    with pyro.validation_enabled(False):
        for step in tqdm(range(config.steps), disable=not progress):
            batch = next(minibatches)
            logits = adapter(batch, guide.get_posterior().rsample())  # (B, C)
            assert batch.labels is not None
            nll = nn.functional.cross_entropy(logits, batch.labels.to(logits.device))
            nll.backward()
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            with torch.no_grad():
                q = guide.get_posterior()
                row: dict[str, float] = {
                    "step": step + 1,
                    "loss": nll.item(),
                    "nll": nll.item(),
                    "kl": kl_divergence(q, prior).item(),
                    "reversed_kl": kl_divergence(prior, q).item(),
                    "kl_weight": burst_weight(step, between_bursts),
                    "lr": config.learning_rate(step),
                }
            if not all(map(math.isfinite, row.values())):
                good.restore()
                adapter.eval()
                raise NonFiniteLossError(
                    f"at step {step + 1} of {config.steps} the NLL is {row['nll']} and KL(p‖q) is"
                    f" {row['reversed_kl']}; the parameters are those of step"
                    f" {max(step - 1, 0)}, the last good one; lower lr, lr_guide or lr_kl"
                )
            good.take()
            likelihood_optimizer.step()
            likelihood_optimizer.zero_grad()
            scheduler.step()

            (row["kl_weight"] * kl_divergence(prior, guide.get_posterior())).backward()
            kl_optimizer.step()
            kl_optimizer.zero_grad()

            last = step + 1 == config.steps
            if validate and config.eval_every and (last or not (step + 1) % config.eval_every):
                adapter.eval()
                row["validation_nll"] = validate()
                adapter.train()
                if row["validation_nll"] < best_nll or math.isinf(best_nll):
                    best_nll, best_step = row["validation_nll"], step + 1
                    best.take()
            history.append(row)
    adapter.eval()
    if config.keep == "best":
        best.restore()
        return FitResult(history, best_step)
    return FitResult(history, config.steps)
