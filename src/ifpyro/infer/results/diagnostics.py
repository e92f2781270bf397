"""Convergence figures for a finished run: ArviZ computes every one of them.

It takes seconds to import, so it is imported when a figure is asked for and not before.
"""

from typing import Any

import numpy as np
from torch import Tensor


def convergence(samples: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Bulk ESS and split R-hat of draws ``(chains, draws, *shape)``: site -> ``{"n_eff": ..., "r_hat":
    ...}``."""
    from . import arviz as bridge

    data = bridge.to_arviz(samples)
    ess, rhat = bridge.arviz.ess(data), bridge.arviz.rhat(data)
    ess, rhat = (figures if hasattr(figures, "data_vars") else figures["posterior"] for figures in (ess, rhat))
    return {name: {"n_eff": ess[name].values, "r_hat": rhat[name].values} for name in samples}


def bulk_ess(draws: np.ndarray) -> np.ndarray:
    """Bulk ESS of draws ``(chains, draws, *shape)``, of shape ``shape``."""
    from . import arviz as bridge

    ess = bridge.arviz.ess(bridge.to_arviz({"draws": draws}))
    return (ess if hasattr(ess, "data_vars") else ess["posterior"])["draws"].values


def summary(samples: dict[str, Tensor], **options: Any) -> Any:
    """``arviz.summary`` of draws ``(chains, draws, *shape)``."""
    from . import arviz as bridge

    return bridge.arviz.summary(bridge.to_arviz(samples), **options)


def pareto_k(log_weight: Tensor) -> float:
    """Shape of the generalised Pareto tail of importance weights (Vehtari et al. 2024); above 0.7 they
    mislead."""
    from . import arviz as bridge

    values = log_weight.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        values = values[np.isfinite(values)]
    if len(values) < 25 or np.ptp(values) == 0.0:
        return float("nan")  # no tail to fit
    return bridge.pareto_k(values)
