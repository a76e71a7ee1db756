"""ELBOs by the name that configurations use; any of Pyro's may be passed to ``fit`` itself."""

from __future__ import annotations

from typing import Any

from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

from ..registry import named

__all__ = ["ELBOS", "make_elbo"]

ELBOS: dict[str, type] = {
    "renyi": RenyiELBO,
    "trace": Trace_ELBO,
    "trace_mean_field": TraceMeanField_ELBO,
}


def make_elbo(name: str = "trace", *, num_particles: int = 1, **options: Any) -> Any:
    """The ELBO of that name; several particles (P) run as one batch.

    The bound of ``renyi`` is not a sum over examples. On minibatches its gradient is biased.

    :param options: such as ``alpha`` of ``renyi``.
    :raises ValueError: if there is no such ELBO or option, or P < 1, or 2 for ``renyi``.
    """
    fewest = 2 if name == "renyi" else 1  # with one particle Rényi's bound is the ELBO
    if not (isinstance(num_particles, int) and num_particles >= fewest):
        raise ValueError(
            f"elbo.num_particles is {num_particles!r}: expected a whole number of {fewest} or more"
            f" for {name}"
        )
    fixed = {"vectorize_particles": num_particles > 1, "max_plate_nesting": 1}
    taken = sorted(options.keys() & fixed.keys())
    if taken:
        raise ValueError(f"elbo.{taken[0]} is no option: the model's one plate sets it")
    return named(ELBOS, "elbo", name, num_particles=num_particles, **fixed, **options)
