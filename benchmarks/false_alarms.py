"""How often do runs that are right warn? Conjugate models, whose posteriors every engine samples well, by many seeds.

python benchmarks/false_alarms.py [--seeds 100] [--engines smc,hmc,slice]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import ifpyro
from results import machine, show, write_section

Y = torch.randn(30, generator=torch.Generator().manual_seed(0))


def mean(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


def regression(y: torch.Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    x = torch.stack([torch.ones(len(y)), torch.linspace(-1, 1, len(y)), torch.linspace(-1, 1, len(y)) ** 2], -1)
    pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)


def rate(y: torch.Tensor) -> None:
    mean = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("k", dist.Poisson(mean).expand([len(y)]).to_event(1), obs=y.abs().round())


def share(y: torch.Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("k", dist.Binomial(30, p), obs=(y > 0.5).sum().float())


MODELS = {"normal mean": mean, "regression": regression, "gamma-Poisson": rate, "beta-binomial": share}


def sampler(engine: str, model: Callable[..., None], seed: int) -> Any:
    if engine == "smc":
        return ifpyro.SMC(model, 256, seed=seed, progress=False)
    kernel = ifpyro.HMC(model) if engine == "hmc" else ifpyro.EllipticalSlice(model)
    return ifpyro.MCMC(kernel, 100, num_chains=16, seed=seed, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--engines", default="smc,hmc,slice")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines: list[str] = []
    show(lines, f"## Runs that warn although they are right: {arguments.engines}")
    show(lines, "")
    show(lines, machine("pyro-ppl"))
    show(lines, "")
    show(lines, f"SMC: 256 particles; HMC and slices: 16 chains of 100 draws. {arguments.seeds} seeds each.")
    show(lines, "")
    show(lines, "| engine | model | warned | processor seconds a run | the first warning |")
    show(lines, "|---|---|---|---|---|")
    for engine in arguments.engines.split(","):
        for name, model in MODELS.items():
            if engine == "slice" and name in ("gamma-Poisson", "beta-binomial"):
                continue  # it needs a standard normal prior
            began, said = time.process_time(), []
            for seed in range(arguments.seeds):
                run = sampler(engine, model, seed).run(Y)
                said += [] if run.converged else [run.attributes["convergence"]]
            seconds = (time.process_time() - began) / arguments.seeds
            first = said[0].split("To do")[0] if said else ""
            show(lines, f"| {engine} | {name} | {len(said)} of {arguments.seeds} | {seconds:.2f} | {first} |")
    write_section(
        Path(__file__).parent / "posteriordb.md", "false-alarms-" + arguments.engines.replace(",", "-"), lines
    )


if __name__ == "__main__":
    main()
