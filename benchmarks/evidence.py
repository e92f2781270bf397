"""Is the evidence of SMC as good as it says? Its error over many seeds, in the standard errors that it reports.

    python benchmarks/evidence.py                                     # problems that need nothing else
    python benchmarks/evidence.py --sbibm DIR                         # with slcp (observation 1)
    python benchmarks/evidence.py --only funnel --seeds 20

Every row is a section of `evidence.md`. Exact values are sums or quadratures; those of the flow and of slcp are
importance sampling with many prior draws. A sampler that is honest has rms 1 and mean 0.
"""

import argparse
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ifpyro.infer import SMC
from results import machine, read_sections, show, write_section

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoos"))
from exact_densities import GaussianMixture
from regressions import Regression, calendar, summers

RESULTS = Path(__file__).with_name("evidence.md")
SLCP = -20.80
"""Log-evidence of slcp's first observation by 12 million prior draws, to 0.03."""


class Problem(NamedTuple):
    """A model with its arguments, and its log-evidence."""

    model: Any
    args: tuple[Any, ...]
    log_evidence: float


class Funnel:
    """``v ~ N(0, 3)``, nine ``x ~ N(0, exp(v / 2))`` seen with noise: a centred hierarchy of few data."""

    gaussian_prior, dim = False, 10

    def __init__(self, sd: float = 0.3) -> None:
        self.sd = sd
        self.y = 0.3 * torch.randn(9, generator=torch.Generator().manual_seed(5))
        v = np.linspace(-20, 20, 20_001)
        variance = np.exp(v)[:, None] + sd**2
        joint = -0.5 * (np.log(2 * np.pi * variance) + self.y.double().numpy() ** 2 / variance).sum(1)
        joint = joint - 0.5 * (v / 3) ** 2 - math.log(3 * math.sqrt(2 * math.pi))
        self.log_evidence = float(np.log(np.trapezoid(np.exp(joint), v)))

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prior and log-likelihood."""
        v, x = q[:, 0], q[:, 1:]
        constant = 0.5 * math.log(2 * math.pi)
        prior = (-0.5 * x.square() * (-v[:, None]).exp() - 0.5 * v[:, None] - constant).sum(1)
        prior = prior - 0.5 * (v / 3).square() - math.log(3) - constant
        return prior, (-0.5 * ((self.y - x) / self.sd).square() - math.log(self.sd) - constant).sum(1)

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """Exact draws."""
        v = 3 * torch.randn(num, 1, generator=generator)
        return torch.cat([v, (v / 2).exp() * torch.randn(num, 9, generator=generator)], 1)

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """All in one."""
        return {"q": q}


def far_modes() -> GaussianMixture:
    """Two modes of the prior, 48 of their standard deviations apart, seen through half of the coordinates."""
    mean, covariance = torch.tensor([[-12.0] * 4, [12.0] * 4]), torch.stack([torch.eye(4), 0.5 * torch.eye(4)])
    return GaussianMixture([0.5, 0.5], mean, covariance, torch.eye(4)[:2], [1.2, -0.6], 4.0)


def ill_conditioned() -> GaussianMixture:
    """Fifty coordinates under a standard normal, whose posterior has variances from 1 to 1e-6 along oblique axes."""
    generator = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64))[0]
    sd = torch.logspace(-3, 0.3, 50, dtype=torch.float64)
    y = axes @ torch.randn(50, generator=generator, dtype=torch.float64) / sd
    return GaussianMixture([1.0], torch.zeros(1, 50), torch.eye(50)[None], axes / sd[:, None], y, 1.0)


def regression(columns: int, seed: int) -> Regression:
    """Columns far from zero, of scales from 0.1 to 100, 46 rows."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 2, columns, dtype=torch.float64)
    x = scale * (5 + torch.randn(46, columns, generator=generator, dtype=torch.float64))
    x = torch.cat([torch.ones(46, 1, dtype=torch.float64), x], 1)
    slope = torch.randn(columns + 1, generator=generator, dtype=torch.float64)
    slope[1:] /= scale
    y = x @ slope + 0.5 * torch.randn(46, generator=generator, dtype=torch.float64)
    prior = torch.cat([torch.full((1,), 50.0, dtype=torch.float64), 20 / scale])
    return Regression(x, y, torch.zeros(columns + 1), prior, 100.0)


def slcp(directory: Path) -> Problem:
    """The task with four modes and five parameters of the simulation-based inference benchmark."""
    tasks = loaded(directory / "tasks.py")
    return Problem(tasks.MODELS["slcp"], (tasks.data("slcp", 1),), SLCP)


def moons() -> Problem:
    """The flow of `posterior.py`, trained briefly; its evidence by 400,000 prior draws."""
    import pyro

    import posterior

    problem = posterior.PROBLEMS["moons"](True)
    with torch.no_grad(), torch.random.fork_rng():
        pyro.set_rng_seed(0)
        log_likelihood = torch.cat(
            [problem.likelihood(problem.flow.prior().sample((20_000,))) for _ in range(20)]
        ).double()
    return Problem(problem.model, (problem.y,), float(log_likelihood.logsumexp(0)) - math.log(len(log_likelihood)))


def loaded(path: Path) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact(make: Callable[[], Any]) -> Problem:
    density = make()
    return Problem(density, (), density.log_evidence)


def row(problem: Problem, particles: int, seeds: int) -> str:
    """Errors over seeds, in nats and in reported standard errors."""
    error, reported, warned = [], [], 0
    start = time.process_time()
    for seed in range(seeds):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            smc = SMC(problem.model, particles, seed=seed, progress=False).run(*problem.args)
        warned += bool(caught)
        error.append(smc.log_evidence - problem.log_evidence)
        reported.append(smc.log_evidence_se)
    miss = np.array(error)
    z = miss / np.array(reported)
    seconds = (time.process_time() - start) / seeds
    return (
        f"{problem.log_evidence:.2f} | {seeds} | {miss.mean():+.2f} | {np.sqrt((miss**2).mean()):.2f} | "
        f"{np.mean(reported):.2f} | {np.sqrt((z**2).mean()):.2f} | {z.mean():+.2f} | {warned} | {seconds:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    problems: dict[str, Callable[[], Problem]] = {
        "regression-3": partial(exact, partial(regression, 3, 0)),
        "regression-6": partial(exact, partial(regression, 6, 1)),
        "calendar": partial(exact, calendar),
        "summers": partial(exact, summers),
        "funnel": partial(exact, Funnel),
        "far-modes": partial(exact, far_modes),
        "ill-conditioned": partial(exact, ill_conditioned),
        "moons": moons,
    }
    parser.add_argument("--only", nargs="*", help="names of problems")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--particles", type=int, default=512)
    parser.add_argument("--sbibm", type=Path, help="directory with tasks.py")
    options = parser.parse_args()
    if options.sbibm:
        problems["slcp"] = partial(slcp, options.sbibm)
    torch.set_num_threads(1)
    for name in options.only or problems:
        lines: list[str] = []
        show(lines, f"{name} | {row(problems[name](), options.particles, options.seeds)}")
        write_section(RESULTS, name, lines)
    rows = [text.strip() for name, text in read_sections(RESULTS).items() if name != "table"]
    table = [
        "| problem | log-evidence | seeds | mean error | rms error | reported | rms in errors | mean in errors "
        "| warned | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(f"| {text} |" for text in rows),
        f"\n{options.particles} particles; processor seconds of a run; {machine('pyro-ppl')}",
    ]
    write_section(RESULTS, "table", table)


if __name__ == "__main__":
    main()
