"""Parameters that belong to their modules, and not to a store that all models share."""

from __future__ import annotations

import gc

import pyro
from pyro.nn import PyroModule

__all__ = ["make_parameters_local", "require_local_parameters"]


def make_parameters_local() -> None:
    """Switch Pyro's ``module_local_params`` on, for all modules from now on.

    Modules that were made before go on with their parameters, which leave Pyro's store: it would
    take from them the link by which an optimizer finds them.
    """
    if pyro.settings.get("module_local_params"):
        return
    pyro.settings.set(module_local_params=True)
    shared = pyro.get_param_store()
    for module in gc.get_objects():
        if not issubclass(type(module), PyroModule):
            continue
        # What Pyro makes with each context once the setting is on.
        vars(module._pyro_context).setdefault("param_state", {"params": {}, "constraints": {}})
        for parameter in module.parameters(recurse=False):
            name = shared.param_name(parameter)
            if name is not None:
                del shared[name]


def require_local_parameters() -> None:
    """:raises RuntimeError: unless Pyro keeps parameters in their modules."""
    if not pyro.settings.get("module_local_params"):
        raise RuntimeError(
            "Pyro's module_local_params is off, so a second model would silently inherit the first"
            " one's parameters; call pyro.settings.set(module_local_params=True) first"
            " (making a prior, model or guide of scalabl_pyro did)"
        )
