"""Inverse problems whose posterior is known: ours and guided diffusion samplers, with the same exact denoiser.

    python benchmarks/truth_mixture.py [--only in-painting tomography phase] [--problems 3] [--quick]

The prior is a Gaussian mixture of six components in 16 dimensions (4x4 pixels), so that the posterior is a mixture
again; the kinds of problem are those of arXiv 2503.03007, in small. *In-painting*: eight of the pixels. *Tomography*:
sums along four rows, four columns and two diagonals. *Phase*: ``|M x + noise|`` for six directions ``M``: the signs are
lost, and the posterior has up to 384 components. The noise has standard deviation 0.1.

Ours, through the exact flow of the mixture, whose velocity is a reparameterised denoiser, on the grid that ``fit``
would choose: SMC with its defaults (512 particles, 4 islands), and with 2,048 particles, of which every fourth draw
counts. For linear observations also `ifpyro.linear_posterior`.

azula's DPS, PGDM and MMPS (with DDPM steps) get the same exact denoiser. What they leave to their user is chosen in
their favour, against the truth, at 1,000 steps: DPS's strength among five, MMPS's solver iterations among two. Then
they run once more with as many evaluations a draw as our SMC, but at most 4,000 (DPS's strength in inverse
proportion to the number of steps), and the better of the two runs counts.

Figures, against the exact posterior: sliced Wasserstein-2 distance over 256 directions between 512 draws and as many
exact ones; half the summed error of the components' weights; and the exact probability of the draws' central 90%
intervals, averaged over pixels. Means over problems, ranges in brackets. The first line of a kind shows what other
exact draws reach, five times 512. All samplers compute in single precision.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
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
from ifpyro.flow.networks.velocity import Velocity
from ifpyro.flow.tuning import choose_grid
from results import CACHE, RESULTS, machine, write_section
from truth_problems import DIM, MATRICES, NOISE, Mixture, Problem, make_prior, make_problem, sample

DRAWS = 512
OURS = "ifpyro SMC"
TRIAL, MOST = 1000, 4000  # steps of azula's samplers: when choices are made, and at most

READING = """
All samplers have the same exact denoiser. Exact draws show how near 512 independent draws come. A well separated
mixture is the worst case for gradients in the latent: its map all but tears between components, so that proposals fail
there at any step size. `linear_posterior` anneals its noise in few sweeps, and each draw stays in the component where
it is when the noise no longer carries it across.

What it shows. Our SMC is where exact draws are on all three kinds, in distance and in coverage; on phase retrieval
(51 modes in the first problem) the weights of its modes are a little farther off (0.056 and 0.035), and none of
azula's samplers comes near. Tomography takes it four to eight times as many evaluations as the others: one of the two
problems needs small steps and many moves. azula's DPS and PGDM find the component in the linear problems, with
intervals far too narrow; MMPS has better intervals and wrong means. They are given 4,000 evaluations at most, fewer
than SMC takes, but more would not help: from 1,000 to 4,000 their distances fell by a tenth or rose.
"""


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
            for label, row in solve(prior, make_problem(prior, name, seed), seed):
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
    lines.append(READING.rstrip())
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


def solve(prior: Mixture, problem: Problem, seed: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Every sampler's name, evaluations a draw, seconds, and the three figures."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(5):
        yield "exact draws", (0.0, 0.0, *figures(problem, sample(problem.posterior, generator, DRAWS), seed))
    prior = Mixture(*(v.float() for v in prior))
    budget = 0.0
    for label, draw in ours(prior, problem, seed).items():
        began = time.process_time()
        x, evaluations = draw()
        seconds = time.process_time() - began
        budget = evaluations if label == OURS else budget
        yield label, (evaluations, seconds, *figures(problem, x, seed))
    for label, choices in guided(problem).items():
        runs = [run_guided(prior, problem, choice, TRIAL, seed) for choice in choices]
        best = min(range(len(runs)), key=lambda k: runs[k][2])
        longer = run_guided(prior, problem, choices[best], min(round(budget), MOST), seed)
        print(f"  {label}: choice {best} of {len(runs)}; {TRIAL} steps", *(f"{run[2]:.3f}" for run in runs), flush=True)
        yield label, min(runs[best], longer, key=lambda run: run[2])


def ours(prior: Mixture, problem: Problem, seed: int) -> dict[str, Callable[[], tuple[Tensor, float]]]:
    """What draws ``(DRAWS, DIM)``, by name, and tells the evaluations of each."""
    flow = ifpyro.InflationaryFlow.from_gaussian_mixture(*prior)
    choose_grid(flow, sample(prior, torch.Generator().manual_seed(0), DRAWS), tolerance=1e-3)
    matrix, observed = problem.matrix.float(), problem.y.float()
    flow.velocity = counted = Counted(flow.velocity)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", flow.prior())
        mean = x @ matrix.T
        if problem.signs_lost:
            both = torch.stack([dist.Normal(mean, NOISE).log_prob(s * y) for s in (1.0, -1.0)])
            pyro.factor("y", both.logsumexp(0).sum(-1))
        else:
            pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)

    def smc(times: int) -> tuple[Tensor, float]:
        counted.rows = 0
        sampler = ifpyro.SMC(model, times * DRAWS, seed=seed, progress=False)
        x = sampler.run(observed).get_samples()["x"]
        return x[::times], counted.rows / DRAWS

    def linear() -> tuple[Tensor, float]:
        counted.rows = 0
        options: dict[str, Any] = {"draws": DRAWS, "ratio": 0.9, "seed": seed, "batch_size": DRAWS, "progress": False}
        return ifpyro.linear_posterior(flow, matrix, observed, NOISE, **options), counted.rows / DRAWS

    found = {OURS: lambda: smc(1), f"{OURS}, 2,048 particles": lambda: smc(4)}
    return found if problem.signs_lost else found | {"ifpyro linear_posterior": linear}


Guided = Callable[[ExactDenoiser, int], Any]


def run_guided(prior: Mixture, problem: Problem, choice: Guided, steps: int, seed: int) -> tuple[float, ...]:
    """Evaluations a draw, seconds, and figures of one of azula's samplers."""
    torch.manual_seed(seed)
    denoiser = ExactDenoiser(prior)
    sampler = choice(denoiser, steps)
    began = time.process_time()
    x = sampler(sampler.init((DRAWS, DIM)))
    seconds = time.process_time() - began
    x[~x.isfinite().all(-1)] = 0.0
    return denoiser.rows / DRAWS, seconds, *figures(problem, x, seed)


def guided(problem: Problem) -> dict[str, list[Guided]]:
    """azula's samplers by name; several where their user has a choice."""
    y, forward = problem.y.float(), problem.forward

    def options(steps: int) -> dict[str, Any]:
        return {"steps": steps, "silent": True, "dtype": torch.float}

    def dps(denoiser: ExactDenoiser, steps: int, zeta: float) -> Any:
        # azula's DPS normalises its gradient by the norm of the whole batch
        return DPSSampler(denoiser, y, forward, zeta=zeta * math.sqrt(DRAWS) * TRIAL / steps, **options(steps))

    def mmps(denoiser: ExactDenoiser, steps: int, iterations: int) -> Any:
        noise = IsotropicCovariance(torch.tensor(NOISE**2))
        return DDPMSampler(MMPSDenoiser(denoiser, y, forward, noise, iterations=iterations), **options(steps))

    def pgdm(denoiser: ExactDenoiser, steps: int) -> Any:
        inverse = torch.linalg.pinv(problem.matrix).float()
        return PGDMSampler(denoiser, y, forward, lambda v: v @ inverse.T, eta=1.0, **options(steps))

    found: dict[str, list[Guided]] = {
        "azula DPS": [partial(dps, zeta=z) for z in (0.03, 0.1, 0.3, 1.0, 3.0)],
        "azula MMPS": [partial(mmps, iterations=n) for n in (1, 5)],
    }
    return found if problem.signs_lost else found | {"azula PGDM": [pgdm]}


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(problem: Problem, x: Tensor, seed: int) -> tuple[float, float, float]:
    """Sliced Wasserstein-2, error of the weights, exact probability of the draws' central 90% intervals."""
    x = x.double()
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
