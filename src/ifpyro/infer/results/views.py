"""What a model has to say about the draws of a result: densities, predictions, data, names of axes."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..model.replay import Replayed, describe, replay
from ..model.sites import Call, Site, to_numpy
from .read import Result, named_arguments


class View:
    """A result's draws beside its model's sites; ``obstacle`` says why the model cannot be run at the draws.

    Args:
        read: the draws, and the model with its arguments if it is known.
        options: passed to every replay: ``seed``, ``batch_size``, ``progress``.
        prediction: the arguments are new data, so that sites without draws are there to be drawn.
    """

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
        missing = [s.name for s in self.sites.values() if s.random and s.name not in self.draws and not prediction]
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
        for name, value in list(self.observed.items()):
            if name not in last or not _same(value, to_numpy(last[name].value)):
                del self.observed[name]

    def needed_call(self) -> Call:
        """The model and its arguments, where there is no obstacle."""
        assert self.call is not None, self.obstacle
        return self.call

    def replay(self, label: str, draws: Mapping[str, Tensor], count: int, **what: Any) -> Replayed:
        """Run the model at every draw, and remember how."""
        done = replay(self.needed_call(), draws, count, label=label, **what, **self.options)
        self.methods.append(done.method)
        return done

    def by_chain(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays ``(chains * draws, *shape)`` as ``(chains, draws, *shape)``."""
        return {name: v.reshape(*self.shape, *v.shape[1:]) for name, v in arrays.items()}

    def posterior(self, log_likelihood: bool, joint: bool) -> Replayed | None:
        """What the draws lack, densities of observed sites, the joint density; None if all is there."""

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
        """Fresh data at every draw; if the model cannot make them, an error where they are insisted on."""
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
            warnings.warn(f"to_arviz leaves out posterior_predictive: {type(error).__name__}: {error}", stacklevel=3)
            return {}
        return self.by_chain(values_by_name(done))

    def prior(self, count: int) -> dict[str, np.ndarray]:
        """Every site drawn from the model alone, ``(1, count, *shape)``."""
        done = self.replay("prior", {}, count, redraw=True, wanted=_shown)
        return {name: v[None] for name, v in values_by_name(done).items()}

    def predictions(self) -> dict[str, np.ndarray]:
        """What the model computes and draws at the draws of its latent sites."""
        done = self.replay(
            "predictions",
            self.draws,
            self.count,
            redraw=True,
            wanted=lambda site: _shown(site) and (site.name not in self.draws or site.kind == "deterministic"),
        )
        return self.by_chain(values_by_name(done))

    def constants(self) -> dict[str, np.ndarray]:
        """The model's array arguments, without those that are observed."""
        if self.call is None:
            return {}
        data = [to_numpy(site.value) for site in self.sites.values() if site.kind == "observed"]
        arrays = {
            name: as_array(value)
            for name, value in named_arguments(self.call).items()
            if isinstance(value, Tensor | np.ndarray)
        }
        return {n: v for n, v in arrays.items() if v.dtype.kind in "biuf" and not any(_same(v, d) for d in data)}


def _shown(site: Site) -> bool:
    return site.kind != "factor" and not site.auxiliary


def values_by_name(done: Replayed) -> dict[str, np.ndarray]:
    """Values by site, and the latent of a flow's site ``x`` under the name ``x_base``."""
    found = {name: v for (what, name), v in done.arrays.items() if what == "value"}
    bases = {f"{name}_base": v for (what, name), v in done.arrays.items() if what == "base"}
    return {**bases, **found}


def as_array(value: Any) -> np.ndarray:
    """A tensor, or anything NumPy takes, as a NumPy array."""
    return to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
