"""From draws to ArviZ: every group that a Pyro model and its posterior can fill.

What ArviZ calls its own has changed: up to 0.2x it is ``arviz.InferenceData``, from 1.0 on xarray's
``DataTree``. The groups are the same xarray datasets in both, built once.
"""

import datetime
import json
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import arviz
import numpy as np
import pyro
import torch
import xarray
from torch import Tensor

from ...core.errors import ConvergenceWarning
from ...core.version import __version__
from ..model.sites import to_numpy
from .convergence import PARETO_K
from .diagnostics import pareto_k
from .groups import SAMPLE, Groups
from .read import Result, read_result, rebind
from .views import View, as_array, values_by_name

_ORDER = (
    "posterior",
    "posterior_predictive",
    "predictions",
    "sample_stats",
    "log_likelihood",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "predictions_constant_data",
    "prior_sbc",
)


def to_arviz(
    result: Any,
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    prior: int | Mapping[str, Any] | None = None,
    posterior_predictive: bool | Mapping[str, Any] | None = None,
    log_likelihood: bool | None = None,
    predictions: tuple[Any, ...] | Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    model: Callable[..., Any] | None = None,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    attrs: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Any:
    r"""Everything ArviZ can use of a posterior: ``InferenceData`` (ArviZ 0.2x) or ``DataTree`` (1.x).

    The model is run again at each draw, so that deterministic sites, flow latents, log-likelihoods and
    predictions are there beside the latent sites. Groups:

    * ``posterior``: latent and deterministic sites; for a site ``x`` whose prior is a flow, its latent
      ``x_base`` too.
    * ``sample_stats``: what the sampler recorded, under ArviZ's names. If it recorded no ``lp``, then

      .. math:: lp = \sum_{sites} \log p(site \mid parents)

      over all sample sites, latent, observed and factors, scaled and masked as the model says, at the values
      in ``posterior``: the unnormalised log-posterior density in the *constrained* space, larger where more
      probable. The Jacobians of Pyro's unconstraining transforms are not in it, so it is not minus the
      potential energy of Pyro's HMC. From Pyro's ``MCMC``: ``diverging`` by draw; ``acceptance_rate`` by
      chain, the share of iterations that moved, all that Pyro keeps; for a single chain ``step_size`` and,
      for static HMC, ``n_steps``. Pyro keeps no energies, so none are given. From a guide: ``log_q``, its
      log-density in the same space as ``lp``.
    * ``log_likelihood``: of every observed site, one number for each observation; masked observations have 0,
      and a ``poutine.scale`` counts in ``lp`` only.
    * ``posterior_predictive``, ``prior``, ``prior_predictive``, ``predictions``: drawn from the model.
    * ``observed_data``; ``constant_data``: the model's array arguments that are not observed.

    Plates name their dimensions. Replays run in batches that are checked against the run at one draw, and
    fall back to a loop over draws if they differ; the attribute ``replay`` says which was used.

    Draws from a guide are judged by the tail of their importance weights ``lp - log_q`` (Yao, Vehtari, Simpson & Gelman
    2018): the attribute ``pareto_k``, and above 0.7 a `ifpyro.ConvergenceWarning`.

    Args:
        result: Pyro's ``MCMC`` or ``SVI``, a guide (with ``model``), a mapping name -> ``(chains, draws,
            *shape)``, or an engine of this library (protocol: :mod:`ifpyro.infer.results.read`).
        coords: dimension -> labels.
        dims: variable -> dimension names; either one for each axis of the variable (``None`` keeps the name
            it has) or one for each axis that no plate names.
        prior: number of prior draws, or draws by site, ``(draws, *shape)``.
        posterior_predictive: ``None`` draws if the model allows it, ``True`` insists, ``False`` skips; or
            draws by site, ``(chains, draws, *shape)`` or ``(chains * draws, *shape)``.
        log_likelihood: ``None`` computes it if the model allows it, ``True`` insists, ``False`` skips.
        predictions: the model's arguments at new data, as a tuple of all of them or by name (the others
            stay).
        constant_data: name -> array, instead of the model's arguments.
        model: the model, where the result does not know it or another is meant.
        args: the model's positional arguments, instead of those the result remembers; needed for guides.
        kwargs: the model's keyword arguments, likewise.
        num_samples: number of draws from a guide.
        attrs: further attributes, name -> number or string, such as ``sampling_time`` in seconds.
        seed: of what is drawn here; the global random state is left alone.
        batch_size: draws replayed at once; by default chosen to bound memory.
        progress: show a bar when a replay takes more than two seconds.

    Raises:
        TypeError: if the result is of no known kind, or the model does not accept the arguments.
        ValueError: if draws, dims, coords or predictions do not fit the model, or what was insisted on cannot
            be had.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", flow.prior())
        ...     pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y)
        ...
        >>> smc = ifpyro.SMC(model, num_particles=256, seed=0, progress=False).run(torch.tensor(0.3))
        >>> posterior = ifpyro.to_arviz(smc, progress=False)
        >>> sorted(posterior.posterior.data_vars), posterior.posterior["x"].shape
        (['x', 'x_base'], (4, 64, 2))
    """
    _check_options(prior, posterior_predictive, predictions, batch_size)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    read = read_result(result, model=model, args=args, kwargs=kwargs, num_samples=num_samples, **options)
    view = View(read, options)
    groups = Groups(dims, coords)

    insisted = {
        "log_likelihood": log_likelihood is True,
        "posterior_predictive": posterior_predictive is True,
        "predictions": predictions is not None,
        "prior": prior is not None and not isinstance(prior, Mapping),
    }
    # Prior draws need the whole model, but no draws of its sites.
    refused = [n for n, wanted in insisted.items() if wanted and (view.blind if n == "prior" else view.obstacle)]
    data_free = not view.obstacle and not any(site.kind == "observed" for site in view.sites.values())
    if data_free and (log_likelihood is True or posterior_predictive is True):
        raise ValueError("to_arviz cannot compute log_likelihood or posterior_predictive: no site is observed")
    if refused:
        raise ValueError(f"to_arviz cannot compute {', '.join(refused)}: {view.obstacle}")
    if view.obstacle and view.call is not None:
        warnings.warn(
            "to_arviz converts the draws alone, without deterministic sites, log-likelihood and predictions: "
            f"{view.obstacle}",
            stacklevel=2,
        )

    attributes = dict(read.attributes)
    values = {name: to_numpy(value) for name, value in read.samples.items()}
    stats = dict(read.stats)
    if not view.obstacle and (done := view.posterior(log_likelihood is not False, "lp" not in stats)):
        values |= {name: v for name, v in view.by_chain(values_by_name(done)).items() if name not in values}
        if ("lp", "") in done.arrays:
            stats["lp"] = done.arrays["lp", ""].reshape(read.shape)
            attributes |= _judged_guide(stats)
        density = {name: v for (what, name), v in done.arrays.items() if what == "log_prob"}
        groups.add("log_likelihood", view.by_chain(density), SAMPLE, view.plates, batch_only=True)
    in_order = [*(n for n in view.plates if n in values), *(n for n in values if n not in view.plates)]
    groups.add("posterior", {name: values[name] for name in in_order}, SAMPLE, view.plates)
    groups.add("sample_stats", stats, SAMPLE)

    if isinstance(posterior_predictive, Mapping):
        groups.add("posterior_predictive", _given(posterior_predictive, read.shape), SAMPLE, view.plates)
    elif posterior_predictive is not False and not view.obstacle:
        fresh = view.posterior_predictive(insist=posterior_predictive is True)
        groups.add("posterior_predictive", fresh, SAMPLE, view.plates)
    if prior is not None:
        drawn = _given(prior, None) if isinstance(prior, Mapping) else view.prior(int(prior))
        groups.add("prior", {n: v for n, v in drawn.items() if n not in view.observed}, SAMPLE, view.plates)
        groups.add("prior_predictive", {n: v for n, v in drawn.items() if n in view.observed}, SAMPLE, view.plates)
    if predictions is not None:
        new = View(Result(read.samples, {}, rebind(view.needed_call(), predictions)), options, prediction=True)
        groups.add("predictions", new.predictions(), SAMPLE, new.plates)
        groups.add("predictions_constant_data", new.constants())
        view.methods += new.methods
    groups.add("observed_data", view.observed, (), view.plates)
    constants = view.constants() if constant_data is None else {n: as_array(v) for n, v in constant_data.items()}
    groups.add("constant_data", constants)

    replayed = {"replay": "+".join(dict.fromkeys(view.methods))} if view.methods else {}
    return _assemble(groups, {**attributes, **replayed, **(attrs or {})})


def _judged_guide(stats: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How well a guide's draws stand for the posterior, as attributes; nothing for other results."""
    if "log_q" not in stats:
        return {}
    shape = pareto_k(torch.from_numpy((stats["lp"] - stats["log_q"]).astype(np.float64).ravel()))
    if not shape <= PARETO_K and not np.isnan(shape):
        warnings.warn(
            f"the guide may not be trusted: Pareto k {shape:.2f} (at most {PARETO_K}), so that few of its draws stand "
            "for most of the posterior. To do: train it longer, use a richer guide (AutoMultivariateNormal), or sample "
            "(ifpyro.SMC)",
            ConvergenceWarning,
            stacklevel=3,
        )
    return {} if np.isnan(shape) else {"pareto_k": shape}


def _check_options(prior: Any, posterior_predictive: Any, predictions: Any, batch_size: Any) -> None:
    def positive(value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0

    if not (prior is None or isinstance(prior, Mapping) or positive(prior)):
        raise ValueError(f"to_arviz expects prior to be a positive number of draws or a mapping, got {prior!r}")
    if not (posterior_predictive is None or isinstance(posterior_predictive, bool | Mapping)):
        raise ValueError(
            f"to_arviz expects posterior_predictive to be None, True, False or a mapping, got {posterior_predictive!r}"
        )
    if not (predictions is None or isinstance(predictions, tuple | Mapping)):
        raise ValueError(
            "to_arviz expects predictions to be the model's arguments at new data, as a tuple or by name, "
            f"got {type(predictions).__name__}"
        )
    if not (batch_size is None or positive(batch_size)):
        raise ValueError(f"to_arviz expects batch_size to be a positive integer or None, got {batch_size!r}")


def _given(values: Mapping[str, Any], shape: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """Draws that were made elsewhere as ``(chains, draws, *shape)``; without a shape they are one chain."""
    found = {}
    for name, value in values.items():
        array = as_array(value)
        if shape is None and array.ndim:
            found[name] = array[None]
        elif shape is not None and array.shape[:2] == shape:
            found[name] = array
        elif shape is not None and array.shape[:1] == (shape[0] * shape[1],):
            found[name] = array.reshape(*shape, *array.shape[1:])
        else:
            wanted = (
                "(draws, ...)" if shape is None else f"{shape} (chains, draws) or {shape[0] * shape[1]} (all draws)"
            )
            raise ValueError(f"draws of {name!r} must have a shape that starts with {wanted}, got {array.shape}")
    return found


def sbc_group(ranks: Mapping[str, np.ndarray]) -> Any:
    """Ranks of simulation-based calibration, ``(simulations,)`` per quantity, as the group ``prior_sbc``."""
    groups = Groups()
    groups.add("prior_sbc", {name: values[None] for name, values in ranks.items()}, SAMPLE)
    return _assemble(groups, {})


def _assemble(groups: Groups, attributes: Mapping[str, Any]) -> Any:
    """The groups as what the installed ArviZ calls its own."""
    groups.check_names()
    attrs = _attributes(attributes)
    ordered = {}
    for group in sorted(groups.datasets, key=_ORDER.index):
        ordered[group] = groups.datasets[group].assign_attrs(attrs)
    if int(arviz.__version__.split(".")[0]) >= 1:
        tree = xarray.DataTree.from_dict({f"/{group}": dataset for group, dataset in ordered.items()})
        tree.attrs = dict(attrs)
        return tree
    return arviz.InferenceData(attrs=dict(attrs), **ordered)


def _attributes(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes, in the types that NetCDF can hold."""
    attrs: dict[str, Any] = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "ifpyro",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
    }
    for name, value in extra.items():
        plain = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
        if isinstance(plain, bool):
            attrs[name] = int(plain)
        elif isinstance(plain, str | int | float):
            attrs[name] = plain
        elif plain is not None:
            attrs[name] = json.dumps(plain, default=str)
    return attrs
