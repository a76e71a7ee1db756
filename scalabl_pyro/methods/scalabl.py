"""ScalaBL: variational inference over the subspace vectors s."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro
import torch

from ..data import Split
from ..guides import AutoSubspace, AutoSubspaceDelta, check_guide, make_guide
from ..infer.checkpoints import Checkpoints
from ..infer.elbos import make_elbo
from ..infer.fit_config import FitConfig
from ..infer.training import FitResult
from ..lora.adapter import CORES, Core, ProjectionMode, SubspaceAdapter
from ..lora.subspace import set_perp
from ..models.model import ScalaBLModel
from ..models.priors import Prior, make_prior
from ..prediction.draws import draw
from ..prediction.predictor import Predictor
from .base import Fitted, Method

__all__ = ["ScalaBL"]


@dataclass(frozen=True)
class ScalaBL(Method):
    """Samplawski et al. 2025 (arXiv 2506.21408), with one objective, an ELBO or a tempered one.

    :param projections: what is trained beside s, as in
        :class:`~scalabl_pyro.lora.SubspaceAdapter`. ``frozen_v`` is a choice of this package; the
        method as published trains V, as ``free`` does. With V frozen B wants a learning rate of
        about 5e-3, with V free all want about 1e-3.
    :param guide: ``name``, a key of ``GUIDES``, and that guide's own options.
    :param prior: ``name``, a key of ``PRIORS``, and its own options. A normal's ``loc``, if left
        out, is 0, or 1 where the adapter starts from trained weights, at s = 1 (a full core at
        the identity).
    :param scale_B: standard deviation of a normal prior on the entries of B; none if left out. The
        KL weight does not multiply it.
    :param core: what s is in a module, as there: the r numbers of a ``diagonal``, or a ``full``
        r × r matrix.
    :param perp: k, coordinates s_perp of each module in directions that the training data hardly
        excite (see :func:`~scalabl_pyro.lora.set_perp`), which stay at their prior.
    :param perp_scale: τ, the standard deviation of that prior.
    :param elbo: ``name``, a key of ``ELBOS``, and that ELBO's own options.
    :param draws: S, the draws that predictions average over; 0 predicts at the posterior's median.
    """

    name: ClassVar[str] = "scalabl"
    svd: ClassVar[bool] = True

    config: FitConfig = FitConfig(lr=5e-3)  # noqa: RUF009  (frozen)
    projections: ProjectionMode = "frozen_v"
    guide: dict[str, Any] = field(default_factory=lambda: {"name": "normal", "init_scale": 0.05})
    prior: dict[str, Any] = field(default_factory=lambda: {"name": "normal"})
    scale_B: float | None = None
    core: Core = "diagonal"
    perp: int = 0
    perp_scale: float = 1.0
    elbo: dict[str, Any] = field(default_factory=lambda: {"name": "trace", "num_particles": 1})
    draws: int = 10

    def __post_init__(self) -> None:
        # Whatever is wrong is found before anything is loaded.
        prior = make_prior((1, 1), **self.prior)
        make_elbo(**self.elbo)
        check_guide(**self.guide)
        if self.guide.get("name") == "delta" and self.config.kl_budget is not None:
            raise ValueError("kl_budget needs a density q(s), and guide delta is a point")
        if self.core not in CORES:
            raise ValueError(f"core is {self.core!r}: expected one of {list(CORES)}")
        if self.core == "full" and not prior.support.check(torch.zeros(())):
            raise ValueError(
                f"core is 'full', whose numbers off the diagonal start at 0, and the prior"
                f" {self.prior['name']!r} has no 0: expected one on the whole line, or"
                " core=diagonal"
            )
        if self.perp < 0:
            raise ValueError(f"perp is {self.perp}: expected a number of coordinates, 0 or more")
        if self.perp_scale != 1.0 and not self.perp:
            raise ValueError(
                f"perp_scale is {self.perp_scale}, the prior of coordinates of which there are"
                " none: give perp, their number"
            )
        if self.draws < 0:
            raise ValueError(f"draws is {self.draws}: expected 1 or more, or 0 for the median")

    @property
    def particles(self) -> int:
        return int(self.elbo.get("num_particles", 1))

    def form(self) -> dict[str, Any]:
        changed = {"core": self.core} if self.core != "diagonal" else {}
        return super().form() | changed | ({"perp": self.perp} if self.perp else {})

    def start(self, adapter: SubspaceAdapter, train: Split) -> None:
        super().start(adapter, train)
        if self.perp:
            set_perp(adapter, train)

    def fit_next(
        self,
        adapter: SubspaceAdapter,
        posterior: AutoSubspace,
        train: Split,
        validation: Split | None,
        *,
        seed: int,
        checkpoints: Checkpoints | None = None,
    ) -> Fitted:
        """Infer s from the data of a further task, with the posterior of the last one as its prior
        (see :meth:`~scalabl_pyro.guides.AutoSubspace.as_prior`), which is where q starts too.

        :param adapter: of the last task; V, B, heads and what the readout trained stay as they are.
        :param posterior: of the last task, of these settings.
        :param seed: as in :meth:`fit`.
        :param checkpoints: as in :meth:`fit`.
        :raises ValueError: if the posterior is a point somewhere.
        """
        pyro.set_rng_seed(seed)
        adapter.freeze()
        prior = posterior.as_prior()
        model = self.make_model(adapter, num_data=len(train), prior=prior)
        guide = self.make_guide(model)
        guide.load_state_dict(prior.posterior.state_dict())
        return self._fit(model, guide, train, validation, seed=seed, checkpoints=checkpoints)

    def make_model(
        self, adapter: SubspaceAdapter, *, num_data: int, prior: Prior | None = None
    ) -> ScalaBLModel:
        """The probabilistic model of these settings.

        :param prior: in place of theirs.
        """
        options = dict(self.prior)
        if adapter.warm_start and options.get("name", "normal") == "normal":
            options.setdefault("loc", adapter.init_loc)
        if prior is None:
            prior = make_prior(adapter.shape, **options)
        return ScalaBLModel(
            adapter,
            num_data=num_data,
            prior=prior,
            scale_B=self.scale_B,
            perp_scale=self.perp_scale,
        )

    def make_guide(self, model: ScalaBLModel) -> AutoSubspace:
        """The untrained guide of these settings."""
        return make_guide(model, **self.guide)

    def make_predictor(
        self, model: ScalaBLModel, posterior: AutoSubspace, *, seed: int
    ) -> Predictor:
        """Averages over S draws, or is at the median."""
        if not self.draws or isinstance(posterior, AutoSubspaceDelta):
            return Predictor(model.adapter, posterior.median()["s"][None])
        return Predictor(model.adapter, draw(posterior, self.draws, seed=seed))

    def _train(self, model: Any, guide: Any, train: Split, **options: Any) -> FitResult:
        return super()._train(model, guide, train, elbo=make_elbo(**self.elbo), **options)
