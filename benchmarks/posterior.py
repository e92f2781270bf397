"""Posteriors through a flow, one core, one run: effective draws per second beside Pyro's NUTS on the same fine map.

    python benchmarks/posterior.py [--only moons scurve digits gradient] [--quick] [--nuts-seconds 170]

Problems: moons with the second coordinate observed (sd 0.2), the S-curve with two of three coordinates observed (sd
0.1; both in standardised units), and an 8x8 digit whose upper half is observed (sd 0.1, pixels in [0, 1]).

Columns: processor seconds of the whole run (set-up, initialisation and warm-up included; other work on the machine does
not count), the smallest bulk ESS over the coordinates of ``x`` that are not constant, that ESS per second, the largest
R-hat (islands are the chains of SMC; one chain is split in halves), and the error: the largest gap between the marginal
distribution functions of the draws and those of prior draws weighted by the likelihood, which in two and three
dimensions are an independent reference. A sampler that never found a mode has an error, whatever its ESS says.

Pyro's NUTS runs one chain until its time is up, warm-up included. All seeds are 0 (training, splits, samplers) unless a
table says otherwise. Flows are trained once and kept in ``benchmarks/.cache``. Tables are printed, and replace those of
the same sections in ``benchmarks/posterior.md``; ``--quick`` writes nothing.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS
from sklearn.datasets import load_digits, make_moons, make_s_curve
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.distributions import constraints

import ifpyro
from ifpyro.cli import demo
from ifpyro.infer.model.batched import BatchedModel
from ifpyro.infer.model.density import log_density_and_grad
from ifpyro.infer.results.diagnostics import convergence
from results import CACHE, machine, show, write_section

HERE = Path(__file__).parent
RESULTS = HERE / "posterior.md"
CHAINS = 64


class Problem(NamedTuple):
    """A model, its data, and the flow that is the prior of its site ``x``."""

    flow: ifpyro.InflationaryFlow
    model: Callable[[Tensor], None]
    y: Tensor
    likelihood: Callable[[Tensor], Tensor]


class Sizes(NamedTuple):
    """How long everything runs."""

    particles: int
    warmup: int
    draws: int
    nuts_warmup: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*PROBLEMS, "gradient"]
    parser.add_argument("--only", nargs="*", default=everything, choices=everything)
    parser.add_argument("--quick", action="store_true", help="a tenth of the draws and barely trained flows")
    parser.add_argument("--nuts-seconds", type=float, default=170.0, help="seconds for Pyro's NUTS per problem")
    options = parser.parse_args()
    torch.set_num_threads(1)
    nuts_seconds = 15.0 if options.quick else options.nuts_seconds
    for name in options.only:
        lines = gradients(options.quick) if name == "gradient" else TABLES[name](options.quick, nuts_seconds)
        show(lines, f"\nSeed 0; {machine('pyro-ppl', 'arviz')}")
        if not options.quick:
            write_section(RESULTS, name, lines)


# -- problems --------------------------------------------------------------------------------------------------------


def moons(quick: bool) -> Problem:
    x = make_moons(20_000, noise=0.05, random_state=0)[0]
    flow = trained("moons", (x - x.mean(0)) / x.std(0), quick, max_seconds=45)
    return observed(flow, [1], torch.tensor([0.3]), 0.2)


def scurve(quick: bool) -> Problem:
    x = make_s_curve(20_000, noise=0.05, random_state=0)[0]
    flow = trained("scurve", (x - x.mean(0)) / x.std(0), quick, max_seconds=40)
    return observed(flow, [0, 1], torch.tensor([0.5, 0.2]), 0.1)


def digits(quick: bool) -> Problem:
    train, held_out = demo.digits(0)
    flow = trained("digits", train, quick, support=constraints.unit_interval)
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[:4] = True
    truth = held_out[0]
    y = truth[seen] + 0.1 * torch.randn(int(seen.sum()), generator=torch.Generator().manual_seed(0))
    return observed(flow, seen.flatten().nonzero().flatten().tolist(), y, 0.1)


PROBLEMS = {"moons": moons, "scurve": scurve, "digits": digits}


def observed(flow: ifpyro.InflationaryFlow, columns: list[int], y: Tensor, noise: float) -> Problem:
    """Some columns of the flattened event, seen with noise."""
    dims = len(flow.event_shape)

    def normal(x: Tensor) -> Any:
        return dist.Normal(x.flatten(-dims)[..., columns], noise).to_event(1)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", normal(x), obs=y)

    return Problem(flow, model, y, lambda x: normal(x).log_prob(y))


def trained(name: str, x: Any, quick: bool, **options: Any) -> ifpyro.InflationaryFlow:
    """The flow of a problem, from the cache if it is there."""
    path = CACHE / f"{name}{'-quick' if quick else ''}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        if quick:
            options["max_seconds"] = 5.0
        ifpyro.fit(torch.as_tensor(x, dtype=torch.float32), seed=0, progress=False, **options).save(path)
    return ifpyro.load(path)


# -- samplers --------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Draws of ``x``, ``(chains, draws, D)``, and what they cost."""

    x: Tensor
    seconds: float
    engine: Any = None


def run_smc(problem: Problem, sizes: Sizes, seed: int = 0) -> Result:
    return _timed(ifpyro.SMC(problem.model, sizes.particles, seed=seed, progress=False), problem)


def run_hmc(problem: Problem, sizes: Sizes, seed: int = 0) -> Result:
    return _timed(_mcmc(ifpyro.HMC(problem.model), sizes, seed), problem)


def run_elliptical(problem: Problem, sizes: Sizes, seed: int = 0) -> Result:
    return _timed(_mcmc(ifpyro.EllipticalSlice(problem.model), sizes, seed), problem)


def _mcmc(kernel: Any, sizes: Sizes, seed: int) -> Any:
    return ifpyro.MCMC(kernel, sizes.draws, sizes.warmup, num_chains=CHAINS, seed=seed, progress=False)


def _timed(engine: Any, problem: Problem) -> Result:
    start = time.process_time()
    engine.run(problem.y)
    x = engine.get_samples(group_by_chain=True)["x"].flatten(2)
    return Result(x, time.process_time() - start, engine)


class _TimeIsUp(Exception):
    pass


def run_nuts(problem: Problem, sizes: Sizes, seconds: float, seed: int = 0) -> Result:
    """Pyro's NUTS on the reparameterised model, one chain, fine map; what it drew when time is up counts."""
    draws: list[Tensor] = []
    start = time.process_time()

    def hook(kernel: Any, params: dict[str, Tensor], stage: str, index: int) -> None:
        if stage == "Sample":
            draws.append(params["x_base"].clone())
        if time.process_time() - start > seconds:
            raise _TimeIsUp

    pyro.set_rng_seed(seed)
    mcmc = PyroMCMC(
        NUTS(ifpyro.reparam(problem.model)),
        num_samples=1_000_000,  # until time is up
        warmup_steps=sizes.nuts_warmup,
        hook_fn=hook,
        disable_progbar=True,
    )
    with contextlib.suppress(_TimeIsUp):
        mcmc.run(problem.y)
    x = torch.stack(draws)[None] if draws else torch.empty(1, 0, problem.flow.latent_dim)
    return Result(problem.flow.decode(x).flatten(2), time.process_time() - start)


# -- figures ---------------------------------------------------------------------------------------------------------

COLUMNS = "| sampler | draws | seconds | ESS | ESS/s | R-hat | error |\n|---|---|---|---|---|---|---|"


def row(label: str, result: Result, reference: tuple[Tensor, Tensor] | None) -> str:
    chains, draws = result.x.shape[:2]
    what = f"| {label} | {chains} x {draws} | {result.seconds:.1f} |"
    if draws < 8:
        return f"{what} – | – | – | – |"
    figures = convergence({"x": result.x})["x"]
    if chains == 1:  # two halves of one chain stand for two
        halves = result.x[:, : draws - draws % 2].reshape(2, -1, result.x.shape[-1])
        figures = {**figures, "r_hat": convergence({"x": halves})["x"]["r_hat"]}
    ess, r_hat = float(np.nanmin(figures["n_eff"])), float(np.nanmax(figures["r_hat"]))
    error = "–" if reference is None else f"{cdf_gap(result.x.flatten(0, 1), *reference):.3f}"
    return f"{what} {ess:.0f} | {ess / result.seconds:.2f} | {r_hat:.3f} | {error} |"


def reference_draws(problem: Problem, num: int) -> tuple[Tensor, Tensor]:
    """Prior draws ``(num, D)`` and their posterior weights."""
    x = torch.cat([problem.flow.sample(10_000, seed=seed) for seed in range(1000, 1000 + num // 10_000)])
    return x, torch.softmax(problem.likelihood(x).double(), 0)


def cdf_gap(draws: Tensor, reference: Tensor, weight: Tensor) -> float:
    """Largest gap between marginal distribution functions, over coordinates."""
    gaps = []
    for k in range(draws.shape[1]):
        value, order = reference[:, k].sort()
        exact = weight[order].cumsum(0)
        ours = torch.searchsorted(draws[:, k].sort().values.contiguous(), value, right=True) / len(draws)
        gaps.append(float((ours - exact).abs().max()))
    return max(gaps)


# -- tables ----------------------------------------------------------------------------------------------------------


def plane_table(name: str, title: str, quick: bool, nuts_seconds: float) -> list[str]:
    """A problem of few dimensions, with a reference."""
    problem, lines = PROBLEMS[name](quick), []
    sizes = Sizes(1024, 30, 30, 20) if quick else Sizes(2048, 60, 100, 150)
    reference = reference_draws(problem, 100_000 if quick else 400_000)
    size = float(1 / reference[1].square().sum())
    log_evidence = float(problem.likelihood(reference[0]).double().exp().mean().log())
    show(lines, f"### {title}\n")
    show(lines, f"Reference: {len(reference[0]):,} weighted prior draws, effectively {size:,.0f}.\n\n{COLUMNS}")
    results = {}
    for label, run in ENGINES.items():
        results[label] = run(problem, sizes)
        show(lines, row(label, results[label], reference))
    show(lines, row("Pyro NUTS, 1 chain", run_nuts(problem, sizes, nuts_seconds), reference))
    smc = results["SMC"].engine
    show(
        lines,
        f"\nLog-evidence: SMC {smc.log_evidence:.3f} ± {smc.log_evidence_se:.3f}, reference {log_evidence:.3f} ± "
        f"{(1 / size - 1 / len(reference[0])) ** 0.5:.3f}.",
    )
    return lines


def digits_table(quick: bool, nuts_seconds: float) -> list[str]:
    problem, lines = digits(quick), []
    sizes = Sizes(256, 20, 20, 20) if quick else Sizes(1024, 60, 100, 150)
    show(lines, f"### Digits: upper half of 8x8 pixels observed, sd 0.1\n\n{COLUMNS}")
    results = {}
    for label, run in ENGINES.items():
        results[label] = run(problem, sizes)
        show(lines, row(label, results[label], None))
    show(lines, row("Pyro NUTS, 1 chain", run_nuts(problem, sizes, nuts_seconds), None))
    smc = results["SMC"].engine
    islands = smc.island_log_evidence
    show(lines, f"\nSMC's four islands: log-evidences {', '.join(f'{float(v):.2f}' for v in islands)};")
    show(lines, f"largest minus smallest {float(islands.max() - islands.min()):.2f};")
    show(lines, f"pooled {smc.log_evidence:.2f} ± {smc.log_evidence_se:.2f}.")

    show(lines, "\nMode weights: the share of draws that a classifier of digits takes for each class, in percent,")
    show(
        lines, "with the largest binomial standard error of independent draws (of chains, for chains that stay put).\n"
    )
    other = run_smc(problem, sizes, seed=1)
    pools = {
        "SMC": (results["SMC"].engine.get_samples()["x"], sizes.particles),
        "SMC, another seed": (other.engine.get_samples()["x"], sizes.particles),
    }
    for label in ("HMC from SMC", "elliptical slice from SMC"):
        pools[label] = (results[label].engine.get_samples()["x"], CHAINS)
        pools[f"{label}, first draw"] = (results[label].x[:, 0], CHAINS)
    show(lines, "| draws | " + " | ".join(map(str, range(10))) + " | ± |\n" + "|---" * 12 + "|")
    for label, (draws, number) in pools.items():
        share = classes(draws)
        error = float((share * (1 - share) / number).max() ** 0.5)
        cells = " | ".join(f"{100 * float(v):.0f}" for v in share)
        show(lines, f"| {label} | {cells} | {100 * error:.0f} |")
    return lines


def classes(images: Tensor) -> Tensor:
    """Share of images in each class of digits, by a logistic regression on scikit-learn's digits."""
    data = load_digits()
    classifier = LogisticRegression(max_iter=1000).fit(data.data / 17, data.target)
    labels = classifier.predict(images.reshape(len(images), 64).numpy())
    return torch.bincount(torch.as_tensor(labels), minlength=10) / len(labels)


def gradients(quick: bool) -> list[str]:
    """Cost of one gradient of the log-density, for one chain and for many."""
    lines: list[str] = []
    show(lines, "### One gradient of the log-density, milliseconds (median)\n")
    show(lines, "| problem | map | steps | 1 chain | 64 chains | ratio | 256 chains |\n|---|---|---|---|---|---|---|")
    for name, problem in PROBLEMS.items():
        made = problem(quick)
        density = BatchedModel(made.model, (made.y,))
        for level in ("fine", "coarse"):
            with ifpyro.fidelity(level):
                cost = [milliseconds(density, n, 5 if quick else 40) for n in (1, 64, 256)]
            steps = made.flow.grid.steps if level == "fine" else made.flow.coarse_steps
            figures = f"{cost[0]:.1f} | {cost[1]:.1f} | {cost[1] / cost[0]:.2f} | {cost[2]:.1f}"
            show(lines, f"| {name} | {level} | {steps} | {figures} |")
    return lines


def milliseconds(density: Any, chains: int, repeats: int) -> float:
    q = density.sample_prior(chains, torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(repeats + 3):
        start = time.process_time()
        log_density_and_grad(density, q)
        seconds.append(time.process_time() - start)
    return 1000 * float(np.median(seconds[3:]))


ENGINES = {"SMC": run_smc, "HMC from SMC": run_hmc, "elliptical slice from SMC": run_elliptical}
TABLES: dict[str, Callable[[bool, float], list[str]]] = {
    "moons": lambda quick, seconds: plane_table("moons", "Moons: second coordinate observed, sd 0.2", quick, seconds),
    "scurve": lambda quick, seconds: plane_table("scurve", "S-curve: x and y of (x, y, z), sd 0.1", quick, seconds),
    "digits": digits_table,
}

if __name__ == "__main__":
    main()
