"""Where truths and data come from, and what is compared: a Pyro model, or a simulator of your own.

A problem makes simulations (truth and data drawn from the joint model) and turns an engine's draws into *test
quantities*: numbers that are ranked. Every coordinate of every parameter is one, and so is the log-likelihood, which
notices errors that leave all marginals right, such as a posterior that ignores the data (Modrák et al. 2023).
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ...core.errors import ConvergenceWarning
from ...core.randomness import seeded
from ...flow.solver.fidelity import fidelity
from ...infer.model.examine import check_arguments
from ...infer.model.many import ManyDataSets
from ...infer.model.reparam import reparam
from ...infer.model.simulate import Simulate, with_data
from ..arrays import Array, to_array

LOG_LIKELIHOOD = "log_likelihood"


class Quantities(NamedTuple):
    """Test quantities of one data set."""

    names: tuple[str, ...]
    truth: Array
    """``(Q,)``"""
    draws: Array
    """``(chains, draws, Q)``"""


class ManyEngine(Protocol):
    """An engine that takes many data sets at once."""

    @property
    def block(self) -> int:
        """Most data sets at once."""
        ...

    def sample(self, density: ManyDataSets, seed: int) -> Tensor:
        """Unconstrained draws of every data set, ``(S, chains, draws, dim)``."""
        ...


class Problem(Protocol):
    """What `ifpyro.calibration.simulated.sbc` runs. Simulation ``i`` depends on ``seed`` and ``i`` alone."""

    @property
    def block(self) -> int:
        """Simulations that are run together."""
        ...

    def run(self, indices: Sequence[int], seed: int) -> list[Quantities]:
        """Simulate, infer, and evaluate the test quantities."""
        ...


def seed_of(seed: int, index: int, use: int) -> int:
    """A seed for one use of one simulation."""
    return int(np.random.SeedSequence([seed, index, use]).generate_state(1)[0])


SIMULATION, ENGINE, RANKS = range(3)
"""The uses."""


@dataclass(frozen=True)
class Simulator:
    """A joint model given by functions.

    Args:
        simulate: takes a ``numpy.random.Generator`` and returns ``(theta, data)``: parameters drawn from the prior (a
            number, an array, or a dictionary of such) and data given them.
        log_likelihood: takes ``(theta, data)`` and returns a number; another test quantity. Left out if ``None``.

    Example:
        >>> def simulate(rng):
        ...     theta = rng.normal()
        ...     return theta, theta + rng.normal()
        ...
        >>> simulator = ifpyro.calibration.Simulator(simulate)
        >>> def posterior(data, seed):
        ...     return np.random.default_rng(seed).normal(data / 2, 0.5**0.5, size=100)  # exact
        ...
        >>> ifpyro.calibration.sbc(simulator, posterior, 100, progress=False).passed
        True
    """

    simulate: Callable[[np.random.Generator], tuple[Any, Any]]
    log_likelihood: Callable[[Any, Any], float] | None = None


@dataclass(frozen=True)
class SimulatorProblem:
    """A `Simulator` and a function from data to draws."""

    simulator: Simulator
    engine: Callable[..., Any]
    block: int = 1

    def run(self, indices: Sequence[int], seed: int) -> list[Quantities]:
        """See `Problem.run`."""
        return [self._run_one(index, seed) for index in indices]

    def _run_one(self, index: int, seed: int) -> Quantities:
        theta, data = self.simulator.simulate(np.random.default_rng(seed_of(seed, index, SIMULATION)))
        truth = _named(theta)
        draws = by_chain(call(self.engine, data, seed=seed_of(seed, index, ENGINE)), truth)
        names, row = _flat(truth, 0)
        columns = _flat({name: draws[name] for name in truth}, 2)[1]
        if self.simulator.log_likelihood is not None:
            density = self.simulator.log_likelihood
            chains, each = columns.shape[:2]
            single = not isinstance(theta, Mapping)

            def at(chain: int, draw: int) -> float:
                point = {name: value[chain, draw] for name, value in draws.items()}
                return float(density(next(iter(point.values())) if single else point, data))

            values = np.array([[at(chain, draw) for draw in range(each)] for chain in range(chains)])
            names, row = (*names, LOG_LIKELIHOOD), np.append(row, float(density(theta, data)))
            columns = np.concatenate([columns, values[..., None]], -1)
        return Quantities(names, row, columns)


@dataclass(frozen=True)
class PyroProblem:
    """A Pyro model, its arguments, and an engine."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    engine: Any
    block: int = 10
    batch_size: int | None = None

    def simulate(self, index: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Latent sites and simulated data of one simulation."""
        simulation, traced = Simulate(), poutine.trace(reparam(self.model))
        own_state = seeded(seed_of(seed, index, SIMULATION))
        with own_state, torch.no_grad(), fidelity("fine"), simulation:
            trace = traced.get_trace(*self.args, **self.kwargs)
        latents = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
        return latents, simulation.data

    def run(self, indices: Sequence[int], seed: int) -> list[Quantities]:
        """See `Problem.run`."""
        check_arguments(self.model, self.args, self.kwargs)
        pairs = [self.simulate(index, seed) for index in indices]
        if not pairs[0][1]:
            raise ValueError(
                "the model has no observed site when called with these arguments: pass data of the right shape (their "
                "values do not matter, they are replaced by simulated ones)"
            )
        data = {name: torch.stack([data[name] for _, data in pairs]) for name in pairs[0][1]}
        density = ManyDataSets(
            self.model, self.args, self.kwargs, data, batch_size=self.batch_size, seed=seed_of(seed, indices[0], RANKS)
        )
        truth = density.base.unconstrain(
            {name: torch.stack([latents[name] for latents, _ in pairs]) for name in density.base.latents}
        )
        if hasattr(self.engine, "sample"):
            draws = list(self.engine.sample(density, seed_of(seed, indices[0], ENGINE)))
        else:
            troubled: list[str] = []
            draws = [
                self._one(density, {n: v[k] for n, v in data.items()}, seed_of(seed, index, ENGINE), troubled)
                for k, index in enumerate(indices)
            ]
            if troubled:
                said = f"{len(troubled)} of {len(indices)} runs may not be trusted; the first: {troubled[0]}"
                warnings.warn(said, ConvergenceWarning, stacklevel=2)
        return [_quantities(density, truth[k], q, k) for k, q in enumerate(draws)]

    def _one(self, density: ManyDataSets, data: dict[str, Tensor], seed: int, troubled: list[str]) -> Tensor:
        """Unconstrained draws for one data set, ``(chains, draws, dim)``; what is wrong with them goes to a list."""
        conditioned = partial(with_data(self.model, data), *self.args, **self.kwargs)
        with seeded(seed):
            result = call(self.engine, conditioned, seed=seed)
            if hasattr(result, "get_samples"):
                result = _sampled(result, seed, troubled)
        one_draw = density.sites(density.base.sample_prior(1, torch.Generator().manual_seed(0)))
        # A flow's site may come in place of its latent.
        wanted = [name if name in result else name.removesuffix("_base") for name in density.base.latents]
        grouped = by_chain(result, {name: one_draw[name][0] for name in wanted})
        chains, each = next(iter(grouped.values())).shape[:2]
        flat = {
            name: torch.as_tensor(value.reshape(chains * each, *value.shape[2:])).to(one_draw[name])
            for name, value in grouped.items()
        }
        return density.base.unconstrain(flat).reshape(chains, each, -1)


def call(engine: Callable[..., Any], argument: Any, *, seed: int) -> Any:
    """``engine(argument)``, with ``seed=`` if it takes one."""
    try:
        seeded_by_name = "seed" in inspect.signature(engine).parameters
    except (TypeError, ValueError):
        seeded_by_name = False
    return engine(argument, seed=seed) if seeded_by_name else engine(argument)


def by_chain(draws: Any, truth: Mapping[str, Any]) -> dict[str, Array]:
    """An engine's draws as ``(chains, draws, *shape)`` by name.

    Raises:
        ValueError: if parameters are missing, or shapes do not fit those of the truth.
    """
    draws = _named(draws)
    missing = sorted(set(truth) - set(draws))
    if missing:
        raise ValueError(f"the engine must return draws of {sorted(truth)}; missing: {missing}, got {sorted(draws)}")
    grouped = {}
    for name, value in truth.items():
        array, shape = to_array(draws[name], f"draws of {name!r}"), tuple(np.shape(value))
        if array.shape[1:] == shape:
            array = array[None]
        if array.ndim != len(shape) + 2 or array.shape[2:] != shape:
            raise ValueError(
                f"draws of {name!r} must have shape (draws, *{shape}) or (chains, draws, *{shape}), got {array.shape}"
            )
        grouped[name] = array
    if len({value.shape[:2] for value in grouped.values()}) != 1:
        raise ValueError(
            f"every parameter needs the same number of draws, got { {n: v.shape for n, v in grouped.items()} }"
        )
    return grouped


def _sampled(sampler: Any, seed: int, troubled: list[str]) -> dict[str, Array]:
    """Draws of a sampler that is run here, such as ``ifpyro.SMC(model)`` or Pyro's ``MCMC``."""
    if hasattr(sampler, "seed"):
        sampler.seed = seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # hundreds of runs are summed up by their caller
        sampler.run()
    if not getattr(sampler, "converged", True):
        troubled.append(sampler.attributes["convergence"])
    chains = int(getattr(sampler, "num_chains", 1))
    samples = {name: to_array(value, f"draws of {name!r}") for name, value in sampler.get_samples().items()}
    return {name: value.reshape(chains, -1, *value.shape[1:]) for name, value in samples.items()}


def _quantities(density: ManyDataSets, truth: Tensor, q: Tensor, k: int) -> Quantities:
    """Sites and log-likelihood of one data set's truth and draws."""
    chains, each, dim = q.shape
    rows = torch.cat([truth[None], q.reshape(chains * each, dim)])
    with torch.no_grad(), fidelity("fine"):
        names, columns = _flat(density.sites(rows), 1)
        likelihood = density.at(rows, torch.full((len(rows),), k, device=rows.device))[1]
    columns = np.concatenate([columns, to_array(likelihood, "log-likelihoods")[:, None]], 1)
    return Quantities((*names, LOG_LIKELIHOOD), columns[0], columns[1:].reshape(chains, each, -1))


def _named(values: Any) -> dict[str, Any]:
    return dict(values) if isinstance(values, Mapping) else {"theta": values}


def _flat(values: Mapping[str, Any], lead: int) -> tuple[tuple[str, ...], Array]:
    """Names and values of all coordinates: ``(*lead, Q)``."""
    names: list[str] = []
    columns: list[Array] = []
    for name, value in values.items():
        array = to_array(value, name)
        shape = array.shape[lead:]
        names += [f"{name}[{','.join(map(str, at))}]" if shape else name for at in product(*map(range, shape))]
        columns.append(array.reshape(*array.shape[:lead], -1))
    return tuple(names), np.concatenate(columns, -1)
