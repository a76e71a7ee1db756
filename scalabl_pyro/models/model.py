"""The probabilistic models: a language model with random subspace vectors, and one without."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from numbers import Real
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule, PyroParam
from pyro.ops.provenance import detach_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from ..data import Batch, Split
from ..lora.adapter import SubspaceAdapter
from ..readouts.completion_tokens import NO_TOKEN
from ..rng import forked_rng
from .local_parameters import require_local_parameters
from .priors import FixedPrior, Prior

__all__ = [
    "LoRAModel",
    "Projections",
    "ScalaBLModel",
    "check_latents_of_data",
    "check_model",
    "check_observes",
]


class Projections(PyroModule):
    """Everything an adapter trains, as Pyro parameters: A (or V), B and heads.

    Each ``PyroParam`` holds the very tensor that the PEFT layer holds, so that plain
    ``pyro.infer.SVI`` steps it. Call it once in a model to declare them all::

        projections = Projections(adapter)

        def model(batch):
            projections()
            s = pyro.sample("s", dist.Normal(0.0, 1.0).expand(adapter.shape).to_event(2))
            with pyro.plate("data", num_data, subsample_size=len(batch)):
                pyro.sample("label", dist.Categorical(logits=adapter(batch, s)), obs=batch.labels)

    They are points: the model computes with the tensors that the layers hold, whatever value a
    handler gives a site.

    :raises RuntimeError: if ``module_local_params`` is off.
    :raises ValueError: when called, if a site has another value than the layer's own tensor, as
        under ``poutine.lift`` or after ``load_state_dict(assign=True)``.
    """

    def __init__(self, adapter: SubspaceAdapter) -> None:
        require_local_parameters()
        super().__init__()
        self._held: dict[str, nn.Parameter] = {}  # by attribute, the tensors of the layers
        self._declared = slice(None)
        for name, parameter in adapter.named_parameters().items():
            attribute = name.replace(".", "__")
            setattr(self, attribute, PyroParam(parameter, constraints.real))
            self._parameters[f"{attribute}_unconstrained"] = parameter  # not a copy of it
            self._held[attribute] = parameter

    def forward(self) -> None:
        for name in list(self._held)[self._declared]:
            value = getattr(self, name)  # reading a PyroParam makes it a site
            if detach_provenance(value) is not self._held[name]:
                raise ValueError(
                    f"the site of {name} has another value than the layer's own tensor, with which"
                    " the model computes: projections are points; for a prior on B give"
                    " ScalaBLModel(…, scale_B=…), and load states without assign=True"
                )

    @contextmanager
    def one_site(self) -> Iterator[None]:
        """Declare one tensor instead of all, which saves a site for each of the others.

        For a loop that steps :meth:`SubspaceAdapter.named_parameters` itself; one site is what an
        ELBO needs in order to run its backward pass.
        """
        self._declared = slice(1)
        try:
            yield
        finally:
            self._declared = slice(None)


class LoRAModel(PyroModule):
    r"""A language model with LoRA points and no latent variable.

    .. math:: y_n \sim \mathrm{Categorical}(\mathrm{softmax} f(x_n)), \quad n = 1, …, N

    Where the readout gives logits for the tokens of a text, y_n is its T_n tokens, one event of the
    plate over the N texts:

    .. math:: y_{nt} \mid x_n, y_{n,<t} \sim \mathrm{Categorical}(\mathrm{softmax} f_t(x_n, y_n)),
              \quad t = 1, …, T_n

    −ELBO/N and the ``nll`` that ``fit`` records are then nats a text, not a token.

    Under any ELBO, with a guide that samples nothing, its loss is the negative log-likelihood: the
    same ``fit`` trains point estimates and posteriors.

    In training mode, ``model.train()``, which ``fit`` sets, LoRA's dropout acts if there is some.

    :param adapter: ``adapter(batch, s) → logits``; held out of Pyro's sight.
    :param num_data: N, which scales a minibatch to the data set.
    :raises TypeError: if the adapter is a module, such as the language model itself.
    :raises RuntimeError: if ``module_local_params`` is off.
    """

    def __init__(self, adapter: SubspaceAdapter, *, num_data: int) -> None:
        require_local_parameters()
        if isinstance(adapter, nn.Module) or not callable(adapter):
            raise TypeError(
                f"adapter is a {type(adapter).__name__}: expected a SubspaceAdapter, such as"
                " sp.from_pretrained returns"
            )
        whole = hasattr(num_data, "__index__") and not isinstance(num_data, bool)
        if not whole or num_data < 1:
            raise ValueError(
                f"num_data is {num_data!r}: expected the number of training examples, len(train)"
            )
        super().__init__()
        self._adapter = (adapter,)  # a tuple: an attribute would register the LLM's parameters
        self.num_data = int(num_data)
        self.projections = Projections(adapter)

    @property
    def adapter(self) -> SubspaceAdapter:
        return self._adapter[0]

    def train(self, mode: bool = True) -> LoRAModel:
        """Training mode of the adapter too, on or off."""
        # Any function of s may stand in the adapter's place.
        getattr(self.adapter, "train" if mode else "eval", lambda: None)()
        super().train(mode)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C); observes ``"label"`` if the batch has labels, and samples it otherwise."""
        self.projections()
        return self.observe(batch, self.adapter(batch))

    def observe(self, batch: Batch, logits: Tensor) -> Tensor:
        """The likelihood: ``"label"`` in the plate ``"data"``; override it for another one.

        :param logits: (\\*draws, B, C), or of texts (\\*draws, B, K, C); returned as they are.
        """
        batch = batch.to(logits.device)
        y, labels = dist.Categorical(logits=logits), batch.labels
        if labels is not None and labels.dim() == 2:  # (B, K) tokens
            y = y.mask(labels != NO_TOKEN).to_event(1)
            labels = labels.clamp(min=0)
        with self.data_plate(batch):
            pyro.sample("label", y, obs=labels)
        return logits

    def start_readout(self, train: Split) -> None:
        """Start what the readout trains of its own, such as κ, by the classes of labelled examples.
        A likelihood whose labels are no classes overrides it."""
        if self.adapter.readout_parameters:
            self.adapter.start_readout(train)

    def data_plate(self, batch: Batch) -> pyro.plate:
        """The plate ``"data"`` of size N, of which the batch is B: its log-likelihood counts N/B
        times. Labels that are to be drawn may be more than N."""
        size = self.num_data if batch.labels is not None else max(self.num_data, len(batch))
        rows = torch.arange(len(batch), device=batch.choices.device)  # so that Pyro draws no subset
        return pyro.plate("data", size, subsample=rows, dim=-1)


class ScalaBLModel(LoRAModel):
    r"""Bayesian LoRA in the subspace of s (ScalaBL, Samplawski et al. 2025, arXiv 2506.21408).

    .. math::
        s_{mj} &\sim p(s) && m = 1, …, M, \; j = 1, …, r \\
        y_n \mid x_n, s &\sim \mathrm{Categorical}(\mathrm{softmax} f(x_n; s)) && n = 1, …, N

    with :math:`ΔW_m(s) = (α/r) \, B_m \, \mathrm{diag}(s_m) \, V_m`, or R_m of r² numbers in the
    place of the diagonal. All M vectors are one stacked
    site ``"s"`` of shape (M, r); V, B and any head are learned points. An adapter with ``perp`` has
    a second site ``"s_perp"`` ~ Normal(0, τ²) of shape (M, k), which the package's guides draw from
    its prior: it adds noise to the likelihood, and its KL is 0.

    :param adapter: in the subspace form.
    :param num_data: N.
    :param prior: distribution of one coordinate, with a batch shape that expands to (M, r), or a
        :class:`~scalabl_pyro.models.priors.Prior`. If left out, Normal(0, 1), or Normal(1, 1) for
        an adapter that starts from trained weights, which s = 1 reproduces (with a full core a
        normal about the identity). Where the adapter's
        start lies outside its support, the start moves inside, and B with it, so that the
        same is computed there.
    :param scale_B: standard deviation of a normal prior on every entry of the matrices B, whose log
        density joins the objective, not weighted by the KL weight; none if left out.
    :param perp_scale: τ, for an adapter with ``perp``.
    :raises ValueError: if the prior is no distribution or of another shape, ``scale_B`` or
        ``perp_scale`` is not above 0, nothing depends on s nor will, or the start has to move and
        the adapter has been trained since it was made.

    Usage::

        model = ScalaBLModel(adapter, num_data=len(train), prior=dist.Laplace(0.0, 1.0))
        batch = next(train.minibatches(4, seed=0))
        trace = pyro.poutine.trace(model).get_trace(batch)  # "s" (M, r), and "label" (B,) observed
        guide = pyro.infer.autoguide.AutoNormal(model, init_loc_fn=model.init_loc_fn)
    """

    def __init__(
        self,
        adapter: SubspaceAdapter,
        *,
        num_data: int,
        prior: TorchDistribution | Prior | None = None,
        scale_B: float | None = None,
        perp_scale: float = 1.0,
    ) -> None:
        super().__init__(adapter, num_data=num_data)
        if prior is None:
            warm = getattr(adapter, "warm_start", False)
            prior = dist.Normal(adapter.init_loc if warm else 0.0, 1.0)
        if not isinstance(prior, (Prior, TorchDistributionMixin)):
            raise ValueError(
                f"prior is {prior!r}: expected a distribution of Pyro over one number, or a Prior,"
                " such as make_prior(adapter.shape, 'horseshoe')"
            )
        if not isinstance(prior, Prior):
            prior = FixedPrior(adapter.shape, prior)
        if prior.shape != adapter.shape:
            raise ValueError(f"the prior has shape {prior.shape}: expected (M, r) {adapter.shape}")
        scales = {"perp_scale": perp_scale} | ({} if scale_B is None else {"scale_B": scale_B})
        for name, scale in scales.items():
            if not (isinstance(scale, Real) and 0 < scale < math.inf):
                raise ValueError(f"{name} is {scale!r}: expected a finite number above 0")
        # Any function of s may stand for the adapter; that of LoRA is constant while B is 0.
        if (
            isinstance(adapter, SubspaceAdapter)
            and not adapter.named_parameters()
            and not any(B.weight.any() for B in adapter.matrices.B.values())
        ):
            raise ValueError(
                "nothing depends on s: projections is 'fixed' and B is 0; start from a trained"
                " adapter (lora.start)"
            )
        _check_prior(prior)
        self.prior = prior.to(adapter.device)
        self.scale_B = scale_B
        #: of ``"s_perp"``, with event shape (M, k); ``None`` where the adapter has none
        self.prior_perp: TorchDistribution | None = None
        if k := getattr(adapter, "perp", 0):
            zeros = torch.zeros(adapter.shape[0], k, device=adapter.device)
            self.prior_perp = dist.Normal(zeros, perp_scale).to_event(2)
        if prior.support is not constraints.real:
            self._move_inside(prior.support)

    def _move_inside(self, support: Any) -> None:
        """Start well inside the support, where transformed guides have a gradient."""
        start = self.adapter.init_loc
        inside = support.check(start * 0.999) & support.check(start * 1.001)
        if not inside.all():
            # Not in the middle, which may be 0, where nothing depends on V or B.
            self.adapter.move_start(biject_to(support)(torch.full_like(start, 0.5)))

    def log_prior_B(self) -> Tensor:
        """log p(B) of all matrices, 0 without a prior on them."""
        zero = torch.zeros((), device=self.adapter.device)
        if self.scale_B is None:
            return zero
        p = dist.Normal(0.0, self.scale_B)
        each = [p.log_prob(B.weight).sum().to(zero) for B in self.adapter.matrices.B.values()]
        return torch.stack([zero, *each]).sum()

    @property
    def init_loc(self) -> Tensor:
        """(M, r), where guides start: there the adapter computes what plain LoRA would."""
        return self.adapter.init_loc

    def init_loc_fn(self, site: dict) -> Tensor:
        """For Pyro's own guides: ``AutoNormal(model, init_loc_fn=model.init_loc_fn)``."""
        return self.init_loc if site["name"] == "s" else init_to_median(site)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (\\*draws, B, C); samples ``"s"``, and ``"s_perp"`` if there is one, and observes
        ``"label"`` if there are labels."""
        self.projections()
        s = pyro.sample("s", self.prior())  # (*draws, M, r)
        if self.prior_perp is not None:
            s_perp = pyro.sample("s_perp", self.prior_perp)  # (*draws, M, k)
            s = _side_by_side(s, s_perp)  # (*draws, M, r + k)
        if self.scale_B is not None:
            pyro.factor("prior_B", self.log_prior_B())
        logits = self.adapter(batch, s)  # (*draws, B, C)
        if s.dim() > 2 and s.shape[-3] == 1:
            # Vectorised particles keep a dimension of size 1 where the data plate goes.
            logits = logits.squeeze(s.dim() - 3)
        return self.observe(batch, logits)


def _side_by_side(s: Tensor, s_perp: Tensor) -> Tensor:
    """(\\*draws, M, r + k), where one of them may be conditioned on a value without draws, or with
    draws but without the dimension of size 1 that the data plate has in those of the other.

    :param s: (\\*draws, M, r).
    :param s_perp: (\\*draws, M, k).
    """
    draws = [part.shape[:-2] for part in (s, s_perp)]
    longest = max(draws, key=len)
    if longest[-1:] == (1,):
        s, s_perp = (
            part.unsqueeze(-3) if own and len(own) < len(longest) else part
            for part, own in zip((s, s_perp), draws, strict=True)
        )
    shape = torch.broadcast_shapes(s.shape[:-2], s_perp.shape[:-2])
    return torch.cat([part.expand(*shape, *part.shape[-2:]) for part in (s, s_perp)], -1)


def _check_prior(prior: Prior) -> None:
    """:raises ValueError: if s or another latent site has not two event dimensions, or a prior of
    part of the line does not say so: guides would leave it."""
    if isinstance(prior, FixedPrior):
        return
    kind = type(prior).__name__
    for name, latent in prior.latents.items():
        if len(latent.shape) != 2:
            raise ValueError(
                f"{kind} has a latent site {name!r} of shape {tuple(latent.shape)}: expected two"
                " dimensions, such as (1, 1), (M, 1) or (M, r)"
            )
    try:
        copy = deepcopy(prior)  # Pyro names the sites of what has run
    except RuntimeError:  # what was computed from parameters has no copy: it is not looked at
        return
    # It may sample its latent scales, which must not move the global random state.
    with forked_rng(), pyro.poutine.block():
        p = copy()
        far = torch.full_like(p.sample(), 1e6)
    if p.event_shape != prior.shape:
        raise ValueError(
            f"{kind} gives a distribution of batch shape {tuple(p.batch_shape)} and event shape"
            f" {tuple(p.event_shape)}: expected event shape (M, r) = {prior.shape}, as"
            " dist.Normal(0.0, 1.0).expand(self.shape).to_event(2) has"
        )
    if prior.support is not constraints.real:
        return
    support: Any = p.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if not (support.check(far).all() and support.check(-far).all()):
        raise ValueError(
            f"{kind} has s in {support}, and its attribute support is the real"
            f" line: set support = constraints.{support} in the class"
        )


def check_model(model: object, *, plain: bool = False) -> None:
    """:raises TypeError: unless it is a :class:`ScalaBLModel`, or with ``plain`` a LoRAModel."""
    kind = LoRAModel if plain else ScalaBLModel
    if not isinstance(model, kind):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a {kind.__name__}, such as"
            " ScalaBLModel(adapter, num_data=len(train)); a model written by hand is for"
            " pyro.infer.SVI, Predictive and Pyro's guides"
        )


def check_latents_of_data(model: LoRAModel, nodes: Iterable[Any], what: str) -> None:
    """:raises ValueError: if the likelihood has latent sites of its own, which what is named would
    take for data.

    :param nodes: of a trace of ``observe``.
    """
    latent = [
        node["name"]
        for node in nodes
        if node["type"] == "sample" and not (node["is_observed"] or site_is_subsample(node))
    ]
    if latent:
        raise ValueError(
            f"the likelihood of {type(model).__name__} has latent sites of its own, {latent}, and"
            f" {what}: expected one that is summed over them in observe; fit trains such a model"
            " with a guide that has these sites, or TraceEnum_ELBO"
        )


def check_observes(model: ScalaBLModel, what: str) -> None:
    """:raises ValueError: if its ``forward`` is its own, which what is named would not run."""
    if type(model).forward is not ScalaBLModel.forward:
        raise ValueError(
            f"{type(model).__name__} overrides forward, and {what} computes with observe: override"
            " observe(batch, logits) instead, or use pyro.infer"
        )
