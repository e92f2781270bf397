"""Hierarchies: many objects with a flow prior each, against quadrature. Writes ``hierarchy.md``.

Every object has two coordinates from an exact mixture of four Gaussians (nothing is trained), three noisy sightings of
the first one, and the noise scale is unknown. Given the scale every object is a mixture, so that the posterior of the
scale is known by quadrature. ``python benchmarks/hierarchy.py --objects 40 300``; ``--all-at-once`` moves the objects
together, as any other model's latents.
"""

import argparse
import math
import time
import warnings
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats

import ifpyro

RESULTS = Path(__file__).parent / "hierarchy.md"
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])
MEANS = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, 3.0], [3.0, -2.0]])
COVARIANCES = torch.tensor(
    [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]], [[0.5, -0.2], [-0.2, 0.3]], [[0.1, 0.0], [0.0, 0.1]]]
)
SIGHTINGS, NOISE = 3, 0.7
HEADER = (
    "| objects | chains x draws | processor s | s per object | scale: error / sd | sd ratio | R-hat of the scale | "
    "ESS of the scale | worst R-hat of an object | worst ESS of an object |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, nargs="+", default=[40])
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--draws", type=int, default=150)
    parser.add_argument("--all-at-once", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [row(num, options) for num in options.objects]
    intro = "Written by `python benchmarks/hierarchy.py`; its docstring says what the columns are."
    text = "\n".join(["# Hierarchies", "", intro, "", HEADER, *lines, ""])
    RESULTS.write_text(text)
    print(text)


def row(num: int, options: argparse.Namespace) -> str:
    flow = ifpyro.InflationaryFlow.from_gaussian_mixture(WEIGHTS, MEANS, COVARIANCES)
    y = data(num, options.seed)
    mean, sd = exact(y)
    began = time.process_time()
    kernel = ifpyro.HMC(model, rows=not options.all_at_once)
    mcmc = ifpyro.MCMC(kernel, options.draws, num_chains=options.chains, seed=options.seed, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mcmc.run(y, flow)
    seconds = time.process_time() - began
    draws = {name: mcmc.get_samples()[name].reshape(options.chains, options.draws, -1).numpy() for name in ("s", "x")}
    rhat = {name: np.asarray([az.rhat(value[..., k]) for k in range(value.shape[-1])]) for name, value in draws.items()}
    ess = {name: np.asarray([az.ess(value[..., k]) for k in range(value.shape[-1])]) for name, value in draws.items()}
    return (
        f"| {num} | {options.chains} x {options.draws} | {seconds:.1f} | {seconds / num:.2f} | "
        f"{(draws['s'].mean() - mean) / sd:+.3f} | {draws['s'].std() / sd:.3f} | {rhat['s'].max():.3f} | "
        f"{ess['s'].min():.0f} | {rhat['x'].max():.3f} | {ess['x'].min():.0f} |"
    )


def model(y: torch.Tensor, flow: ifpyro.InflationaryFlow) -> None:
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("objects", len(y), dim=-1):
        x = pyro.sample("x", flow.prior())
        with pyro.plate("sightings", SIGHTINGS, dim=-2):
            pyro.sample("y", dist.Normal(x[..., 0], s), obs=y.T)


def data(num: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    kind = torch.multinomial(WEIGHTS, num, True, generator=generator)
    factor = torch.linalg.cholesky(COVARIANCES)[kind]
    x = MEANS[kind] + (factor @ torch.randn(num, 2, 1, generator=generator)).squeeze(-1)
    return x[:, :1] + NOISE * torch.randn(num, SIGHTINGS, generator=generator)


def exact(y: torch.Tensor) -> tuple[float, float]:
    """Mean and sd of the noise scale by quadrature."""
    y_ = y.double().numpy()
    scale = np.linspace(0.3, 1.5, 1200)
    within = ((y_ - y_.mean(1, keepdims=True)) ** 2).sum(1)
    sd = np.sqrt(COVARIANCES[:, 0, 0].double().numpy()[:, None, None] + scale**2 / SIGHTINGS)
    parts = stats.norm.pdf(y_.mean(1)[:, None], MEANS[:, 0].double().numpy()[:, None, None], sd)
    log = np.log((WEIGHTS.double().numpy()[:, None, None] * parts).sum(0))
    log = (log - (SIGHTINGS - 1) * np.log(scale) - within[:, None] / (2 * scale**2)).sum(0) + stats.halfnorm.logpdf(
        scale
    )
    mass = np.exp(log - log.max())
    mass /= mass.sum()
    mean = float((mass * scale).sum())
    return mean, math.sqrt(float((mass * (scale - mean) ** 2).sum()))


if __name__ == "__main__":
    main()
