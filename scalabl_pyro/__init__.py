"""Bayesian low-rank adaptation of language models as a probabilistic program on Pyro."""

import pyro

# Before any PyroModule is built: parameters belong to their modules, not to a global store.
pyro.settings.set(module_local_params=True)
