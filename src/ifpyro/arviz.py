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
import xarray
from torch import Tensor

import ifpyro
from ifpyro.datasets import SAMPLE, Groups
from ifpyro.draws import Result, named_arguments, read_result, rebind
from ifpyro.replay import Replayed, describe, replay
from ifpyro.sites import Call, Site, to_numpy

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

    Args:
        result: Pyro's ``MCMC`` or ``SVI``, a guide (with ``model``), a mapping name -> ``(chains, draws,
            *shape)``, or an engine of this library (protocol: :mod:`ifpyro.draws`).
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
    """
    _check_options(prior, posterior_predictive, predictions, batch_size)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    read = read_result(result, model=model, args=args, kwargs=kwargs, num_samples=num_samples, **options)
    view = _View(read, options)
    groups = Groups(dims, coords)

    insisted = {
        "log_likelihood": log_likelihood is True,
        "posterior_predictive": posterior_predictive is True,
        "predictions": predictions is not None,
        "prior": prior is not None and not isinstance(prior, Mapping),
    }
    # Prior draws need the whole model, but no draws of its sites.
    refused = [
        n for n, wanted in insisted.items() if wanted and (view.blind if n == "prior" else view.obstacle)
    ]
    if refused:
        raise ValueError(f"to_arviz cannot compute {', '.join(refused)}: {view.obstacle}")
    if view.obstacle and view.call is not None:
        warnings.warn(
            "to_arviz converts the draws alone, without deterministic sites, log-likelihood and predictions: "
            f"{view.obstacle}",
            stacklevel=2,
        )

    values = {name: to_numpy(value) for name, value in read.samples.items()}
    stats = dict(read.stats)
    if not view.obstacle and (done := view.posterior(log_likelihood is not False, "lp" not in stats)):
        values |= {name: v for name, v in view.by_chain(_values(done)).items() if name not in values}
        if ("lp", "") in done.arrays:
            stats["lp"] = done.arrays["lp", ""].reshape(read.shape)
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
        groups.add(
            "prior_predictive", {n: v for n, v in drawn.items() if n in view.observed}, SAMPLE, view.plates
        )
    if predictions is not None:
        new = _View(
            Result(read.samples, {}, rebind(view.needed_call(), predictions)), options, prediction=True
        )
        groups.add("predictions", new.predictions(), SAMPLE, new.plates)
        groups.add("predictions_constant_data", new.constants())
        view.methods += new.methods
    groups.add("observed_data", view.observed, (), view.plates)
    constants = (
        view.constants() if constant_data is None else {n: _array(v) for n, v in constant_data.items()}
    )
    groups.add("constant_data", constants)

    replayed = {"replay": "+".join(dict.fromkeys(view.methods))} if view.methods else {}
    return _assemble(groups, {**read.attributes, **replayed, **(attrs or {})})


def summary(result: Any, **options: Any) -> Any:
    """ArviZ's summary table of a result's draws as they are, without running its model again.

    Args:
        result: what :func:`to_arviz` takes.
        options: passed to ``arviz.summary``.
    """
    return arviz.summary(_draws_alone(read_result(result).samples), **options)


def convergence(samples: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """ArviZ's bulk effective sample size and rank-normalised split R-hat of every component.

    Args:
        samples: name -> ``(chains, draws, *shape)``.

    Returns:
        name -> ``{"n_eff": (*shape), "r_hat": (*shape)}``. R-hat needs two chains or more to see all of a
        failure.
    """
    data = _draws_alone(read_result(samples).samples)
    n_eff, r_hat = arviz.ess(data), arviz.rhat(data)
    return {name: {"n_eff": np.asarray(n_eff[name]), "r_hat": np.asarray(r_hat[name])} for name in samples}


def _draws_alone(samples: Mapping[str, Tensor]) -> xarray.Dataset:
    groups = Groups()
    groups.add("posterior", {name: to_numpy(value) for name, value in samples.items()}, SAMPLE)
    return groups.datasets["posterior"]


class _View:
    """What a model has to say about the draws of a result."""

    def __init__(self, read: Result, options: Mapping[str, Any], prediction: bool = False) -> None:
        self.shape, self.call, self.options = read.shape, read.call, options
        self.draws = read.flat()
        self.count = self.shape[0] * self.shape[1]
        self.methods: list[str] = []
        self.sites: dict[str, Site] = {}
        self.plates: dict[str, dict[int, str]] = {}
        self.observed: dict[str, np.ndarray] = {}
        self.obstacle = ""
        self.blind = True
        if self.call is None:
            self.obstacle = "the result does not know its model: pass model= and args="
            return
        self.sites, partial = describe(self.call, {n: v[0] for n, v in self.draws.items()}, options["seed"])
        for name, site in self.sites.items():
            self.plates[name] = site.plates
            if site.base_shape is not None:
                batch = len(site.shape) - site.event_dim
                self.plates[f"{name}_base"] = {axis: p for axis, p in site.plates.items() if axis < batch}
        missing = [
            s.name for s in self.sites.values() if s.random and s.name not in self.draws and not prediction
        ]
        self.blind = bool(partial)
        if partial:
            self.obstacle = (
                f"plates {sorted(partial)} show only part of their data: pass model= and args= with all of it"
            )
        elif missing:
            self.obstacle = f"there are no draws of the model's latent sites {missing}"
        if partial or prediction:
            return
        self.observed = {s.name: to_numpy(s.value) for s in self.sites.values() if s.kind == "observed"}
        # A value computed from latent sites can be given to obs=; it has a density, but it is not data.
        last, _ = describe(self.call, {n: v[-1] for n, v in self.draws.items()}, options["seed"] + 1)
        for name in [n for n in self.observed if not _same(self.observed[n], to_numpy(last[n].value))]:
            del self.observed[name]

    def needed_call(self) -> Call:
        assert self.call is not None, self.obstacle
        return self.call

    def replay(self, label: str, draws: Mapping[str, Tensor], count: int, **what: Any) -> Replayed:
        done = replay(self.needed_call(), draws, count, label=label, **what, **self.options)
        self.methods.append(done.method)
        return done

    def by_chain(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: v.reshape(*self.shape, *v.shape[1:]) for name, v in arrays.items()}

    def posterior(self, log_likelihood: bool, joint: bool) -> Replayed | None:
        """Values that the draws lack, densities of observed sites, and the joint density; None if all is
        there."""

        def lacking(site: Site) -> bool:
            if site.kind not in ("latent", "deterministic"):
                return False
            return site.name not in self.draws or (
                site.base_shape is not None and f"{site.name}_base" not in {*self.draws, *self.sites}
            )

        observed = any(site.kind == "observed" for site in self.sites.values())
        if not (joint or (log_likelihood and observed) or any(map(lacking, self.sites.values()))):
            return None
        return self.replay(
            "posterior", self.draws, self.count, wanted=lacking, log_likelihood=log_likelihood, joint=joint
        )

    def posterior_predictive(self, insist: bool) -> dict[str, np.ndarray]:
        if not self.observed:
            return {}
        try:
            done = self.replay(
                "predictive",
                self.draws,
                self.count,
                redraw=True,
                wanted=lambda site: site.name in self.observed,
            )
        except Exception as error:
            # A model may have densities that cannot be sampled, or code that only accepts its own data.
            if insist:
                raise
            warnings.warn(
                f"to_arviz leaves out posterior_predictive: {type(error).__name__}: {error}", stacklevel=3
            )
            return {}
        return self.by_chain(_values(done))

    def prior(self, count: int) -> dict[str, np.ndarray]:
        done = self.replay("prior", {}, count, redraw=True, wanted=_shown)
        return {name: v[None] for name, v in _values(done).items()}

    def predictions(self) -> dict[str, np.ndarray]:
        done = self.replay(
            "predictions",
            self.draws,
            self.count,
            redraw=True,
            wanted=lambda site: (
                _shown(site) and (site.name not in self.draws or site.kind == "deterministic")
            ),
        )
        return self.by_chain(_values(done))

    def constants(self) -> dict[str, np.ndarray]:
        """The model's array arguments, without those that are observed."""
        if self.call is None:
            return {}
        data = [to_numpy(site.value) for site in self.sites.values() if site.kind == "observed"]
        arrays = {
            name: _array(value)
            for name, value in named_arguments(self.call).items()
            if isinstance(value, Tensor | np.ndarray)
        }
        return {
            n: v for n, v in arrays.items() if v.dtype.kind in "biuf" and not any(_same(v, d) for d in data)
        }


def _check_options(prior: Any, posterior_predictive: Any, predictions: Any, batch_size: Any) -> None:
    def positive(value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0

    if not (prior is None or isinstance(prior, Mapping) or positive(prior)):
        raise ValueError(
            f"to_arviz expects prior to be a positive number of draws or a mapping, got {prior!r}"
        )
    if not (posterior_predictive is None or isinstance(posterior_predictive, bool | Mapping)):
        raise ValueError(
            "to_arviz expects posterior_predictive to be None, True, False or a mapping, "
            f"got {posterior_predictive!r}"
        )
    if not (predictions is None or isinstance(predictions, tuple | Mapping)):
        raise ValueError(
            "to_arviz expects predictions to be the model's arguments at new data, as a tuple or by name, "
            f"got {type(predictions).__name__}"
        )
    if not (batch_size is None or positive(batch_size)):
        raise ValueError(f"to_arviz expects batch_size to be a positive integer or None, got {batch_size!r}")


def _shown(site: Site) -> bool:
    return site.kind != "factor" and not site.auxiliary


def _values(done: Replayed) -> dict[str, np.ndarray]:
    """Values by site, and the latent of a flow's site ``x`` under the name ``x_base``."""
    found = {name: v for (what, name), v in done.arrays.items() if what == "value"}
    bases = {f"{name}_base": v for (what, name), v in done.arrays.items() if what == "base"}
    return {**bases, **found}


def _array(value: Any) -> np.ndarray:
    return to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _given(values: Mapping[str, Any], shape: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """Draws that were made elsewhere as ``(chains, draws, *shape)``; without a shape they are one chain."""
    found = {}
    for name, value in values.items():
        array = _array(value)
        if shape is None and array.ndim:
            found[name] = array[None]
        elif shape is not None and array.shape[:2] == shape:
            found[name] = array
        elif shape is not None and array.shape[:1] == (shape[0] * shape[1],):
            found[name] = array.reshape(*shape, *array.shape[1:])
        else:
            wanted = (
                "(draws, ...)"
                if shape is None
                else f"{shape} (chains, draws) or {shape[0] * shape[1]} (all draws)"
            )
            raise ValueError(
                f"draws of {name!r} must have a shape that starts with {wanted}, got {array.shape}"
            )
    return found


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
        "creation_library_version": ifpyro.__version__,
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
