"""Inverse problems whose posterior is known: ours and guided diffusion samplers, with the same exact denoiser.

    python benchmarks/truth_mixture.py [--only in-painting tomography phase] [--problems 3] [--quick]

The prior is a Gaussian mixture of six components in 16 dimensions (4x4 pixels), so that the posterior is a mixture
again; the kinds of problem are those of arXiv 2503.03007, in small. *In-painting*: eight of the pixels. *Tomography*:
sums along four rows, four columns and two diagonals. *Phase*: ``|M x + noise|`` for six directions ``M``: the signs are
lost, and the posterior has up to 384 components. The noise has standard deviation 0.1.

Ours: SMC (4 islands of 128) and HMC (64 chains, 8 draws each) through the exact flow of the mixture, whose velocity is
a reparameterised denoiser. azula's: DPS, PGDM and MMPS (with DDPM steps), given the same exact denoiser and, for each
draw, as many of its evaluations as our SMC used (theirs differentiate through it at every step, ours at most of them).
What they leave to their user is chosen in their favour, against the truth: DPS's strength among three, MMPS's solver
iterations among two.

Figures, against the exact posterior: sliced Wasserstein-2 distance over 256 directions, beside that of as many exact
draws; half the summed error of the components' weights; and the exact probability of the draws' central 90% intervals,
averaged over pixels. Means over problems, ranges in brackets.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance import DPSSampler, MMPSDenoiser, PGDMSampler
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import VPSchedule
from azula.sample import DDPMSampler
from torch import Tensor

import ifpyro
from ifpyro.velocity import Velocity
from results import CACHE, RESULTS, machine, write_section
from truth_problems import DIM, MATRICES, NOISE, Mixture, Problem, make_prior, make_problem, sample

DRAWS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MATRICES), choices=list(MATRICES))
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one problem of each kind, nothing written")
    parser.add_argument("--table", action="store_true", help="only make the table again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prior = make_prior()
    for name in [] if options.table else options.only:
        rows: dict[str, list[tuple[float, ...]]] = {}
        for seed in range(1 if options.quick else options.problems):
            for label, row in solve(prior, make_problem(prior, name, seed), seed).items():
                rows.setdefault(label, []).append(row)
                print(name, seed, label, ", ".join(f"{v:.3f}" for v in row), flush=True)
        if not options.quick:
            CACHE.mkdir(exist_ok=True)
            (CACHE / f"truth-{name}.json").write_text(json.dumps(rows))
    if not options.quick:
        lines = table()
        print("\n".join(lines))
        write_section(RESULTS, "truth", lines)


def table() -> list[str]:
    """One line a kind of problem and sampler, from all that is in the cache."""
    lines = [
        "## Exact truth: posteriors under a Gaussian mixture prior\n",
        "| problem | sampler | evaluations a draw | seconds | sliced Wasserstein | weights' error | coverage of 90% |",
        "|---" * 7 + "|",
    ]
    for name in MATRICES:
        path = CACHE / f"truth-{name}.json"
        if path.exists():
            for label, values in json.loads(path.read_text()).items():
                lines.append(f"| {name} | {label} | {cells(values)} |")
    lines.append(f"\n`python benchmarks/truth_mixture.py`; seeds 0, 1, ...; {machine('azula', 'pyro-ppl')}")
    return lines


def cells(values: list[tuple[float, ...]]) -> str:
    """Means over problems, and ranges of the figures."""
    columns = list(zip(*values, strict=True))
    parts = [f"{sum(columns[0]) / len(values):.0f}", f"{sum(columns[1]) / len(values):.1f}"]
    for column in columns[2:]:
        parts.append(f"{sum(column) / len(column):.3f} [{min(column):.3f}, {max(column):.3f}]")
    return " | ".join(parts)


# -- samplers ----------------------------------------------------------------------------------------------------------


class Counted(Velocity):
    """A velocity that counts the rows it evaluates."""

    def __init__(self, inner: Velocity) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def embed(self, t: Tensor) -> Tensor:
        """As inside."""
        return self.inner.embed(t)

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """As inside."""
        self.rows += y.shape[:-1].numel()
        return self.inner(y, embedding)


class ExactDenoiser(Denoiser):
    """``E[x | alpha x + sigma n]`` under the mixture."""

    def __init__(self, prior: Mixture) -> None:
        super().__init__()
        self.prior, self.schedule, self.rows = prior, VPSchedule(), 0
        self.variances, self.axes = torch.linalg.eigh(prior.covariances)  # (K, D), (K, D, D)
        self.centres = torch.einsum("kde,kd->ke", self.axes, prior.means)

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
        """The exact mean, as azula wants it."""
        self.rows += len(x_t)
        alpha, sigma = self.schedule(t)
        noised = alpha**2 * self.variances + sigma**2
        residual = torch.einsum("kde,nd->nke", self.axes, x_t) - alpha * self.centres
        log_part = -0.5 * (residual.square() / noised + noised.log()).sum(-1)
        share = torch.softmax(self.prior.weights.log() + log_part, -1)
        part = self.centres + alpha * self.variances / noised * residual
        return DiracPosterior(torch.einsum("kde,nke->nd", self.axes, share[..., None] * part))


def solve(prior: Mixture, problem: Problem, seed: int) -> dict[str, tuple[float, ...]]:
    """Evaluations a draw, seconds, and the three figures of every sampler."""
    flow = ifpyro.InflationaryFlow.from_gaussian_mixture(*prior)
    flow.velocity = Counted(flow.velocity)
    flow.requires_grad_(False)
    found: dict[str, tuple[float, ...]] = {}

    def add(label: str, x: Tensor, evaluations: float, began: float) -> None:
        found[label] = (evaluations / len(x), time.process_time() - began, *figures(problem, x.double(), seed))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", flow.prior())
        mean = x @ problem.matrix.T
        if problem.signs_lost:
            both = torch.stack([dist.Normal(mean, NOISE).log_prob(s * y) for s in (1.0, -1.0)])
            pyro.factor("y", both.logsumexp(0).sum(-1))
        else:
            pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)

    generator = torch.Generator().manual_seed(1000 + seed)
    add("exact draws", sample(problem.posterior, generator, DRAWS), 0, time.process_time())
    began = time.process_time()
    smc = ifpyro.SMC(model, DRAWS, seed=seed, progress=False)
    smc.run(problem.y)
    add("ifpyro SMC", smc.get_samples()["x"], flow.velocity.rows, began)
    budget = flow.velocity.rows // DRAWS
    began, before = time.process_time(), flow.velocity.rows
    hmc = ifpyro.MCMC(ifpyro.HMC(model), DRAWS // 64, 30, num_chains=64, seed=seed, progress=False)
    hmc.run(problem.y)
    add("ifpyro HMC", hmc.get_samples()["x"], flow.velocity.rows - before, began)
    for label, choices in guided(prior, problem, budget).items():
        tried = []
        for choice in choices:
            torch.manual_seed(seed)
            began = time.process_time()
            sampler, denoiser = choice()
            x = sampler(sampler.init((DRAWS, DIM), dtype=torch.double))
            bad = ~x.isfinite().all(-1)
            x[bad] = 0.0
            tried.append((figures(problem, x, seed)[0], x, denoiser.rows, began, time.process_time()))
        _, x, rows, began, ended = min(tried, key=lambda t: t[0])
        add(label, x, rows, time.process_time() - (ended - began))
    return found


def guided(prior: Mixture, problem: Problem, steps: int) -> dict[str, list[Callable[[], tuple[Any, ExactDenoiser]]]]:
    """azula's samplers by name; several where their user has a choice."""
    y, forward = problem.y, problem.forward
    options: dict[str, Any] = {"steps": steps, "silent": True, "dtype": torch.double}

    def dps(zeta: float) -> tuple[Any, ExactDenoiser]:
        denoiser = ExactDenoiser(prior)
        # azula's DPS normalises its gradient by the norm of the whole batch
        return DPSSampler(denoiser, y, forward, zeta=zeta * math.sqrt(DRAWS), **options), denoiser

    def mmps(iterations: int) -> tuple[Any, ExactDenoiser]:
        denoiser = ExactDenoiser(prior)
        noise = IsotropicCovariance(torch.tensor(NOISE**2, dtype=torch.double))
        guide = MMPSDenoiser(denoiser, y, forward, noise, iterations=iterations)
        return DDPMSampler(guide, **options), denoiser

    def pgdm() -> tuple[Any, ExactDenoiser]:
        denoiser = ExactDenoiser(prior)
        inverse = torch.linalg.pinv(problem.matrix)
        return PGDMSampler(denoiser, y, forward, lambda v: v @ inverse.T, eta=1.0, **options), denoiser

    found: dict[str, list[Callable[[], tuple[Any, ExactDenoiser]]]] = {
        "azula DPS": [lambda z=z: dps(z) for z in (0.01, 0.03, 0.1)],
        "azula MMPS": [lambda n=n: mmps(n) for n in (1, 5)],
    }
    if not problem.signs_lost:
        found["azula PGDM"] = [pgdm]
    return found


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(problem: Problem, x: Tensor, seed: int) -> tuple[float, float, float]:
    """Sliced Wasserstein-2, error of the weights, exact probability of the draws' central 90% intervals."""
    generator = torch.Generator().manual_seed(2000 + seed)
    exact = sample(problem.posterior, generator, DRAWS)
    directions = torch.randn(DIM, 256, generator=generator, dtype=torch.double)
    directions = directions / directions.norm(dim=0)
    a, b = (torch.sort(v @ directions, 0).values for v in (x, exact))
    sliced = float((a - b).square().mean(0).mean().sqrt())
    error = 0.5 * float((problem.posterior.shares(x) - problem.posterior.weights).abs().sum())
    low, high = torch.quantile(x, torch.tensor([0.05, 0.95]).double(), dim=0)
    sd = problem.posterior.covariances.diagonal(dim1=1, dim2=2).sqrt()

    def cdf(q: Tensor) -> Tensor:
        return problem.posterior.weights @ torch.special.ndtr((q - problem.posterior.means) / sd)

    return sliced, error, float((cdf(high) - cdf(low)).mean())


if __name__ == "__main__":
    main()
