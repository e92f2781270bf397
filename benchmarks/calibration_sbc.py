"""Simulation-based calibration of the engines: are their posteriors those of the model? One core.

    python benchmarks/calibration_sbc.py [--only ...] [--engines SMC HMC SVI] [--simulations 500] [--seed 0]

Problems: a conjugate Gaussian (four latents, two observed sums); a prior that is a mixture of three Gaussians, as a
flow with its exact velocity, one of two coordinates observed (sd 0.4); a flow trained on two moons, its second
coordinate observed (sd 0.2, standardised units); and two hierarchical models with a plate and a positive scale, one
in the centred form (a funnel), one not. SVI is Pyro's AutoNormal on the latents of the mixture, fitted to all data
sets in one plate; it is expected to fail. Engines run hundreds of data sets in one batch. Rows are printed, and replace
those of the same problem and engine in ``benchmarks/calibration.md``.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import ifpyro
from calibration_common import write_rows
from ifpyro.calibration import SBC, ManyHMC, ManySMC
from ifpyro.calibration.simulated import sbc
from ifpyro.infer.model.many import ManyDataSets
from results import CACHE

ENGINES = ["SMC", "HMC", "SVI"]
ABOVE = [
    "### Simulation-based calibration of the engines",
    "",
    "ESS: median over data sets of the smallest effective number of draws; ranks use that many. Quantities: every "
    "coordinate of every latent site, of what flows make of it, and the log-likelihood. Outside: quantities whose "
    "rank distribution leaves its 99% simultaneous band; then the smallest p-value of a band, and that of all tests "
    "together, which also look at shift and spread. Off: largest deviation of the coverage of 90% intervals from 0.9 "
    "over quantities. Processor seconds.",
    "",
    "| problem | engine | simulations | ESS | quantities | outside | least band p | p of all | 90% off by | s | seed |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]
SMC = ManySMC(particles=128, islands=2)
HMC = ManyHMC(chains=4, warmup=100, draws=60, particles=64, block=500)


class Case(NamedTuple):
    """A model, arguments that give the shape of its data, and sizes of the engines that suit it."""

    model: Callable[..., None]
    args: tuple[Any, ...]
    smc: ManySMC
    hmc: ManyHMC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES)
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plots", type=Path, default=None, help="a folder for pictures of the bands")
    parser.add_argument("--quick", action="store_true", help="20 simulations, nothing written")
    options = parser.parse_args()
    options.simulations = 20 if options.quick else options.simulations
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("\n".join(ABOVE), flush=True)
    for name in options.only:
        case = CASES[name]()
        engines: dict[str, Any] = {"SMC": case.smc, "HMC": case.hmc}
        if name == "mixture":
            engines["SVI"] = PlateSVI()
        for engine in options.engines:
            if engine in engines:
                row = run(name, case, engine, engines[engine], options)
                print(row, flush=True)
                if not options.quick:
                    write_rows("sbc", ABOVE, [row], list(CASES))


def run(name: str, case: Case, label: str, engine: Any, options: argparse.Namespace) -> str:
    """One line of the table."""
    start = time.process_time()
    result = sbc(case.model, engine, options.simulations, args=case.args, seed=options.seed, progress=False)
    seconds = time.process_time() - start
    if options.plots is not None:
        options.plots.mkdir(parents=True, exist_ok=True)
        result.plot().savefig(options.plots / f"{name}-{label}.png".replace(" ", "-"), dpi=110)
        (options.plots / f"{name}-{label}.txt".replace(" ", "-")).write_text(str(result))
    outside = ", ".join(result.outside)
    if len(result.outside) > 3:
        outside = f"all {len(result.tests)}" if len(result.outside) == len(result.tests) else f"{len(result.outside)}"
    least = min(test.band for test in result.tests.values())
    return (
        f"| {name} | {label} | {result.num_simulations} | {np.median(result.ess):.0f} | {len(result.tests)} | "
        f"{outside or 'none'} | {least:.2g} | {result.p_value:.2g} | {off_by(result, 0.9):.3f} | {seconds:.0f} "
        f"| {options.seed} |"
    )


def off_by(result: SBC, level: float) -> float:
    """Largest deviation of the coverage of central intervals from their level, over quantities."""
    covered = (np.abs(2 * result.ranks - 1) <= level).mean(0)
    return float(np.abs(covered - level).max())


# -- problems --------------------------------------------------------------------------------------------------------


def gaussian() -> Case:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("y", dist.Normal(x[..., :2] + 0.5 * x[..., 1:3], 0.5).to_event(1), obs=y)

    return Case(model, (torch.zeros(2),), SMC, ManyHMC(draws=60, warmup=100, init="prior", block=500))


def mixture() -> Case:
    weights = torch.tensor([0.5, 0.3, 0.2])
    means = torch.tensor([[-2.0, 0.5], [1.5, 1.0], [1.0, -1.5]])
    factors = torch.tensor([[[0.6, 0.0], [0.3, 0.3]], [[0.4, 0.0], [0.0, 0.7]], [[0.5, 0.0], [-0.4, 0.3]]])
    flow = ifpyro.InflationaryFlow.from_gaussian_mixture(weights, means, factors @ factors.mT)
    return Case(second_coordinate(flow, 0.4), (torch.zeros(()),), SMC, HMC)


def moons() -> Case:
    # Any flow serves, since truths are drawn from it: a small network, solved loosely, is several times faster.
    path = CACHE / "calibration-moons.safetensors"
    if not path.exists():
        x = ifpyro.datasets.moons(0.1).unit_variance().sample(20_000, seed=0)
        path.parent.mkdir(exist_ok=True)
        network = {"width": 48, "blocks": 2}
        ifpyro.fit(x, seed=0, network=network, max_steps=4000, tolerance=5e-3, progress=False).save(path)
    flow = ifpyro.load(path)
    return Case(second_coordinate(flow, 0.2), (torch.zeros(()),), SMC, HMC)


def second_coordinate(flow: ifpyro.InflationaryFlow, noise: float) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 1], noise), obs=y)

    return model


def schools_centred() -> Case:
    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return Case(model, (torch.zeros(5), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3])), ManySMC(256), HMC)


def schools() -> Case:
    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(5.0))
        with pyro.plate("schools", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)

    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Case(model, (torch.zeros(8), sigma), SMC, HMC)


CASES: dict[str, Callable[[], Case]] = {
    "gaussian": gaussian,
    "mixture": mixture,
    "moons": moons,
    "schools": schools,
    "schools, centred": schools_centred,
}


# -- SVI -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlateSVI:
    """Pyro's AutoNormal on the latents of all data sets, in one plate: the same guide for each as one by one."""

    steps: int = 600
    draws: int = 200
    block: int = 250

    def sample(self, density: ManyDataSets, seed: int) -> Tensor:
        """Unconstrained draws, ``(S, 1, draws, dim)``."""

        def model() -> None:
            with pyro.plate("data sets", density.families):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([density.dim]).to_event(1))
                with pyro.poutine.block():
                    log_likelihood = density(z)[1]
                pyro.factor("likelihood", log_likelihood)

        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = AutoNormal(model, init_scale=0.3)
        optimiser = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.1 ** (1 / self.steps)})
        svi = SVI(model, guide, optimiser, Trace_ELBO())
        for _ in range(self.steps):
            svi.step()
        with torch.no_grad():
            return torch.stack([guide()["z"] for _ in range(self.draws)], 1)[:, None]


if __name__ == "__main__":
    main()
