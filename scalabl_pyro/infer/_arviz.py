"""arviz without the notice on its next version that it gives once a day when it is imported."""

from __future__ import annotations

import warnings

__all__ = ["az"]

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
    import arviz as az
