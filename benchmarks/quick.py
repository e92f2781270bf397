"""Regression guard: the figures that matter, free of the machine's speed, beside the committed ones.

    python benchmarks/quick.py [--update]

Under five minutes on one core. Costs are ratios measured in one process; the rest is seeded. ``--update`` writes what
was found to ``benchmarks/quick.json``, to be committed when a change of the figures is wanted. A figure that moved by
more than its tolerance is marked, and the exit status is then 1.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import ifpyro
from ifpyro.flow.tuning import measure as numerical_errors
from ifpyro.infer.results.diagnostics import convergence
from throughput import gradient_saving, measure

COMMITTED = Path(__file__).parent / "quick.json"
COST, QUALITY = 1.25, 1.5  # a figure may grow by so much before it is marked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="make these the committed figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    found: dict[str, float] = {}
    worse = []
    print("| figure (smaller is better) | now | committed | now / committed |\n|---|---|---|---|")
    for part, tolerance in ((costs, COST), (quality, QUALITY)):
        for name, value in part().items():
            found[name] = value
            before = committed.get(name)
            ratio = float("nan") if before is None else value / before
            mark = " **worse**" if ratio > tolerance else ""
            worse += [name] if mark else []
            text = "–" if before is None else f"{before:.3g}"
            print(f"| {name} | {value:.3g} | {text} | {ratio:.2f}{mark} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s. A cost may grow by a factor of {COST}, an error by {QUALITY}.")
    if options.update:
        COMMITTED.write_text(
            json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}, indent=1) + "\n"
        )
        print(f"These are the committed figures now: {COMMITTED}")
    elif not committed:
        sys.exit("There are no committed figures to compare with; quick.py --update makes these the committed ones.")
    elif worse:
        sys.exit(f"WORSE than the committed figures: {'; '.join(worse)}")
    else:
        print("No figure is worse than the committed one.")


def costs() -> dict[str, float]:
    """Ratios of costs, for networks with random weights."""
    found = {}
    for dim in (2, 16, 64):
        cost = measure(dim, rows=64, steps=8, repeats=15)
        found[f"decode / bare passes, D={dim}"] = cost.decode_ratio
        found[f"gradient / bare passes forward and backward, D={dim}"] = cost.gradient_ratio
        found[f"encode / decode, D={dim}"] = cost.encode / cost.decode
        found[f"log-density / decode, D={dim}"] = cost.log_prob / cost.decode
    found["gradient, 64 rows / 1 row, D=2"] = (
        measure(2, rows=64, steps=8, repeats=15).gradient / measure(2, rows=1, steps=8, repeats=15).gradient
    )
    slower, memory = gradient_saving(dim=16, rows=256, steps=16)
    found["checkpointed gradient: seconds / plain"] = slower
    found["checkpointed gradient: bytes kept / plain"] = memory
    return found


def quality() -> dict[str, float]:
    """What a flow of 1,500 seeded steps on the moons is worth, and a posterior through it."""
    moons = ifpyro.datasets.moons(0.05).unit_variance()
    x, test = moons.sample(20_000, seed=0), moons.sample(4_000, seed=1)
    flow = ifpyro.fit(x, seed=0, max_steps=1500, progress=False)
    with torch.no_grad():
        gap = float((moons.log_prob(test) - flow.log_prob(test)).mean())
    numbers = numerical_errors(flow, test[:1000])
    found = {
        "moons, 1,500 steps: nats below exact": gap,
        "evaluations of one decode": float(numbers["evaluations"]),
        "round trip, standard deviations": numbers["round_trip_rmse"],
    }
    y = torch.tensor([0.3])

    def model(y: torch.Tensor) -> None:
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 1:], 0.2).to_event(1), obs=y)

    prior = flow.sample(100_000, seed=2)
    log_weight = dist.Normal(prior[:, 1], 0.2).log_prob(y).double()
    evidence = float(log_weight.exp().mean().log())
    smc = ifpyro.SMC(model, 2048, seed=0, progress=False)
    smc.run(y)
    found["SMC 4 x 512: error of the log-evidence"] = abs(smc.log_evidence - evidence) + 0.01
    weight, order = torch.softmax(log_weight, 0), prior[:, 0].argsort()
    draws = smc.get_samples()["x"][:, 0].sort().values.contiguous()
    below = torch.searchsorted(draws, prior[order, 0].contiguous(), right=True) / len(draws)
    found["SMC 4 x 512: largest gap of the distribution function"] = float(
        (below - weight[order].cumsum(0)).abs().max()
    )
    mcmc = ifpyro.MCMC(ifpyro.HMC(model), 100, 60, num_chains=64, seed=0, progress=False)
    mcmc.run(y)
    figures = convergence({"x": mcmc.get_samples(group_by_chain=True)["x"]})["x"]
    found["HMC: transitions per effective draw"] = 6400 / float(np.nanmin(figures["n_eff"]))
    found["HMC: R-hat"] = float(np.nanmax(figures["r_hat"]))
    return found


if __name__ == "__main__":
    main()
