r"""Simulation-based calibration (Talts et al. 2018): does an engine sample the posteriors of its own model?

Draw parameters from the prior and data given them; let the engine infer; rank the true value of every test quantity
among the draws. If the engine samples exact posteriors, ranks are uniform. Draws of a Markov chain are thinned to
their effective number first, since ranks among dependent draws pile up at the ends.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...core.arguments import check_count, check_seed
from ...core.files import check_writable, try_to_write
from ...infer.results import diagnostics
from ..arrays import Array, check_probability
from ..ranks import uniform_ranks
from .problems import RANKS, Problem, PyroProblem, Quantities, Simulator, SimulatorProblem, seed_of
from .records import Ranked, Records
from .result import SBC


def sbc(
    model: Callable[..., Any] | Simulator,
    engine: Any,
    num_simulations: int = 500,
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    prob: float = 0.99,
    path: str | Path | None = None,
    executor: Executor | None = None,
    block: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> SBC:
    """Simulation-based calibration of an engine.

    Args:
        model: a Pyro model, which is used as it is: observed sites are drawn instead of observed, and then observed
            with what was drawn. Or a `Simulator`.
        engine: for a Pyro model, `ManySMC` or `ManyHMC`; or a function that takes the model, conditioned on data and
            to be called without arguments, and returns draws ``{site: (draws, *shape)}`` (or ``(chains, draws,
            *shape)``), or a sampler with ``run`` and ``get_samples``, such as ``lambda model: ifpyro.SMC(model)``.
            For a `Simulator`, a function from data to draws. A function with a parameter ``seed`` is given one.
        num_simulations: how many.
        args: the model's positional arguments; of data among them only the shape matters.
        kwargs: its keyword arguments.
        seed: of everything. Simulation ``i`` depends on it and on ``i`` alone.
        prob: probability of the simultaneous bands.
        path: where to keep finished simulations (safetensors, written atomically). A run with the same file takes
            up where the last one ended, after it has made one simulation again to see that model and engine are the
            same.
        executor: any ``concurrent.futures.Executor``; blocks of simulations are submitted to it. In this process if
            ``None``.
        block: simulations run together; the engine's own by default.
        batch_size: most rows of many data sets evaluated at once (bounds memory).
        progress: show a progress bar.

    Returns:
        ranks, tests and verdict. After Ctrl-C, those of the finished simulations.

    Raises:
        TypeError: if the model or the engine cannot be used.
        ValueError: if the model cannot simulate, draws do not fit, or the file is of another run.
        RuntimeError: if a simulation fails; finished ones are kept in the file.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        ...
        >>> engine = ifpyro.calibration.ManySMC(particles=64)
        >>> result = ifpyro.calibration.sbc(model, engine, 50, args=(torch.zeros(()),), progress=False)
        >>> result.num_simulations, result.names, result.passed
        (50, ('x', 'log_likelihood'), True)
    """
    check_count("num_simulations", num_simulations, 1)
    seed = check_seed(seed)
    prob = check_probability("prob", prob)
    problem = _problem(model, engine, args, kwargs or {}, block, batch_size)
    name = described(engine)
    if path is not None:
        check_writable(path)
    records = Records.load(path, seed) if path is not None and Path(path).exists() else Records(seed, name)
    remaining = [index for index in range(num_simulations) if index not in records]
    if records.count:  # also where all are finished: they must not vouch for a model or an engine that never ran
        records.check(
            lambda index: _rank(problem.run([index], seed), [index], seed)[0], name, alone=not hasattr(engine, "sample")
        )
    blocks = [remaining[start : start + problem.block] for start in range(0, len(remaining), problem.block)]
    with tqdm(total=num_simulations, initial=num_simulations - len(remaining), disable=not progress, desc="SBC") as bar:
        try:
            for indices, ranked in _results(problem, blocks, seed, executor):
                for index, row in zip(indices, ranked, strict=True):
                    records.add(index, row.names, row)
                if path is not None:
                    try_to_write(partial(records.save, path), "the simulations go on")
                bar.update(len(indices))
        except KeyboardInterrupt:
            if not records.count:
                raise
            warnings.warn(f"interrupted: {records.count} of {num_simulations} simulations are finished", stacklevel=2)
    return records.result(prob, num_simulations)


def described(engine: Any) -> str:
    """What an engine calls itself: a function its name, an engine with options these too."""
    if hasattr(engine, "sample"):
        text = repr(engine)
    else:
        while isinstance(engine, partial):
            engine = engine.func
        text = f"{getattr(engine, '__module__', '')}.{getattr(engine, '__qualname__', type(engine).__qualname__)}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _problem(
    model: Any, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any], block: int | None, batch_size: int | None
) -> Problem:
    many = hasattr(engine, "sample") and hasattr(engine, "block")
    if not many and not callable(engine):
        raise TypeError(
            f"engine must be ManySMC(...), ManyHMC(...) or a function, got {type(engine).__name__}; for one run per "
            "data set pass a function, such as lambda model: ifpyro.SMC(model, progress=False)"
        )
    if isinstance(model, Simulator):
        if many:
            raise TypeError("ManySMC and ManyHMC need a Pyro model; with a Simulator, engine is a function of the data")
        if args or kwargs:
            raise TypeError("a Simulator takes no args or kwargs")
        return SimulatorProblem(model, engine, block or 1)
    if not callable(model):
        raise TypeError(f"expected a Pyro model (a callable) or a Simulator, got {type(model).__name__}")
    return PyroProblem(model, tuple(args), kwargs, engine, block or (engine.block if many else 10), batch_size)


def _results(
    problem: Problem, blocks: list[list[int]], seed: int, executor: Executor | None
) -> Iterator[tuple[list[int], list[Ranked]]]:
    if executor is None:
        for indices in blocks:
            yield indices, _work(problem, indices, seed)
        return
    futures: dict[Future[list[Ranked]], list[int]] = {
        executor.submit(_work, problem, indices, seed): indices for indices in blocks
    }
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()


def _work(problem: Problem, indices: list[int], seed: int) -> list[Ranked]:
    try:
        return _rank(problem.run(indices, seed), indices, seed)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        raise RuntimeError(
            f"simulations {indices[0]} to {indices[-1]} of seed {seed} failed ({type(error).__name__}: {error})"
        ) from error


def _rank(found: Sequence[Quantities], indices: Sequence[int], seed: int) -> list[Ranked]:
    """Thin to the effective number of draws and rank."""
    ranked = []
    for index, quantities, ess in zip(indices, found, _effective(found), strict=True):
        names, truth, draws = quantities
        draws = draws.reshape(-1, len(names))
        keep = thin(len(draws), ess)
        rng = np.random.default_rng(seed_of(seed, index, RANKS))
        ranks = uniform_ranks(truth[None], draws[None, keep], rng)[0]
        ranked.append(Ranked(names, ranks, truth, draws.mean(0), draws.std(0), ess))
    return ranked


def thin(num: int, ess: float) -> Array:
    """Indices of ``ess`` evenly spaced ones among ``num`` draws."""
    count = max(1, min(num, int(ess)))
    return ((np.arange(count) + 0.5) * num / count).astype(int)


def _effective(found: Sequence[Quantities]) -> list[float]:
    """The smallest bulk ESS over quantities of each data set; those of one shape are measured together."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for k, quantities in enumerate(found):
        shapes.setdefault(quantities.draws.shape, []).append(k)
    smallest = np.zeros(len(found))
    for members in shapes.values():
        draws = np.stack([found[k].draws for k in members], 2)  # (chains, draws, members, Q)
        ess = diagnostics.bulk_ess(draws)
        constant = np.ptp(draws, axis=(0, 1)) == 0  # says nothing about mixing
        ess = np.where(constant | ~np.isfinite(ess), draws.shape[0] * draws.shape[1], ess)
        smallest[members] = ess.min(-1)
    return smallest.tolist()
