"""What is refused before a model and a guide are trained, by whichever loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    ReweightedWakeSleep,
    TraceTailAdaptive_ELBO,
)
from pyro.poutine.guide import GuideMessenger
from torch import nn

from ..data import Split
from ..guides.base import check_is_guide
from ..models.model import LoRAModel, check_model
from ..readouts.base import Readout
from .messengers import AllSites

__all__ = ["check_elbo", "check_program", "first_step"]

log = logging.getLogger(__name__)

#: whose loss is infinite or several, or which trace a model that fit changes between steps
_OTHER_LOOPS = (
    *(JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO),
    *(ReweightedWakeSleep, TraceTailAdaptive_ELBO),
)


def check_program(model: LoRAModel, guide: Callable[..., Any], train: Split) -> None:
    """Refuse a model, a guide and data that cannot be trained together.

    :raises TypeError: if one of them is something else.
    :raises ValueError: if a record has no label, or was encoded for another readout.
    """
    check_model(model, plain=True)
    check_is_guide(guide)
    if isinstance(guide, GuideMessenger):
        raise TypeError(
            f"the guide is a {type(guide).__name__}, which runs the model inside itself: expected a"
            " guide that runs beside the model, such as AutoNormal; pyro.infer.SVI trains this one"
        )
    if not isinstance(train, Split):
        raise TypeError(f"train is a {type(train).__name__}: expected adapter.encode(records)")
    reader = getattr(train.collate, "__self__", None)
    readout = getattr(model.adapter, "readout", None)
    both = isinstance(reader, Readout) and isinstance(readout, Readout)
    if both and not (isinstance(reader, type(readout)) or isinstance(readout, type(reader))):
        raise ValueError(
            f"train was encoded by {type(reader).__name__}, and the adapter's readout is"
            f" {type(readout).__name__}: expected adapter.encode(records)"
        )
    if train.labels is None:
        raise ValueError("training needs a label in every record")
    if len(train) != model.num_data:
        log.warning(
            "there are %d training examples, but the model's num_data is %d: it is N, which weighs"
            " the likelihood against the prior",
            len(train),
            model.num_data,
        )


def check_elbo(elbo: Any, loss: str = "loss_and_grads") -> None:
    """Refuse what is no ELBO, or none that a loop could use.

    :param loss: the method of the ELBO that the loop calls.
    :raises TypeError: in these cases.
    """
    if elbo is None:
        return
    name = elbo.__name__ if isinstance(elbo, type) else type(elbo).__name__
    shown = name if isinstance(elbo, type) else repr(elbo)
    one_number = callable(getattr(elbo, "loss_and_grads", None)) and not isinstance(elbo, type)
    if not one_number or isinstance(elbo, _OTHER_LOOPS):
        raise TypeError(
            f"elbo is {shown}: expected an object, such as"
            " Trace_ELBO(num_particles=4), TraceMeanField_ELBO() or RenyiELBO(alpha=0.5);"
            " ReweightedWakeSleep and TraceTailAdaptive_ELBO need a loop of their own, and compiled"
            " ones a global store of parameters, which is empty here"
        )
    if not callable(getattr(elbo, loss, None)):
        raise TypeError(
            f"elbo is {shown}, which has no {loss}: expected one that has, such as Trace_ELBO,"
            " TraceMeanField_ELBO or TraceEnum_ELBO; fit takes this one"
        )


@contextmanager
def first_step(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Refuse, in the first step, what training would pass over: checks that are worth their time
    once, for sites, shapes and supports do not change.

    :param parameters: all that are trained.
    :raises ValueError: at the end, for uncovered latent sites; at once, for a parameter that would
        not move, and where a distribution refuses a value.
    """
    with pyro.validation_enabled(True), AllSites(parameters):
        yield
