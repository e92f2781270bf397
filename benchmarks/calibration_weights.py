"""Weights of a mixture in the latent, inferred from data (the paper's appendix B.6), for 200 data sets at once.

    python benchmarks/calibration_weights.py [--flows ...] [--engines ...] [--seed 0] [--quick]

Latents are drawn from a mixture of three Gaussians with weights (0.5, 0.25, 0.25) and decoded by a flow trained on two
circles, preserving or reducing. Given the decoded points, the weights have a Dirichlet(1, 1, 1) prior; points are
encoded, and the log-determinant of the map, which does not depend on the weights, drops out:

    p(w | x) ~ Dirichlet(w) prod_i sum_k w_k N(encode(x_i); m_k, 0.5^2 I).

The posteriors of all data sets are sampled in one batch, by SMC and by HMC. Beyond the paper: coverage of 90% intervals
over the data sets, with the paper's weights and with weights drawn from the prior, for which coverage should be exact.
Flows are those of ``paper_flows.py``, trained with fixed seeds if they are not in ``benchmarks/.cache``; the table goes
to ``benchmarks/calibration.md``.
"""

import argparse
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import ifpyro
from calibration_common import write_rows
from ifpyro.calibration import Coverage, ManyHMC, ManySMC, coverage
from ifpyro.calibration.ranks import uniform_ranks
from ifpyro.infer.model.many import ManyDataSets
from paper_flows import Key, flow_of

WEIGHTS = torch.tensor([0.5, 0.25, 0.25])
MEANS = torch.tensor([[-1.2, 0.0], [0.8, 1.0], [0.8, -1.0]])
SPREAD = 0.5
POINTS, SETS = 200, 200
FLOWS = ["preserving", "reducing"]
ABOVE = [
    "### Weights of a mixture in the latent of the circles (the paper's appendix B.6)",
    "",
    f"Weights (0.5, 0.25, 0.25), {POINTS} points a data set, {SETS} data sets. First data set: posterior mean ± sd of "
    "the weights, and the probability in percent of the smallest ellipse of the posterior that reaches the truth. "
    "Coverage in percent over the data sets: of 90% ellipses; of 90% intervals of each weight, and pooled ± standard "
    "error over data sets, for the paper's weights and for weights from the prior. Moved: largest change of a mean, in "
    "posterior sd, had the latents been known without decoding and encoding. Processor seconds.",
    "",
    "| flow | engine | first data set | reached | 90% ellipses | 90% intervals | from the prior | moved | s | seed |",
    "|---|---|---|---|---|---|---|---|---|---|",
]
ENGINES = {
    "SMC": ManySMC(particles=128, islands=2),
    "HMC": ManyHMC(chains=4, warmup=100, draws=100, init="prior"),
}


def model(z: Tensor) -> None:
    """Latents ``(n, 2)`` of the data."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("points", len(z)):
        pyro.sample("z", mixture(weights), obs=z)


def mixture(weights: Tensor) -> dist.TorchDistribution:
    """The law of a latent: weights ``(*batch, 3)``."""
    components = dist.Normal(MEANS, SPREAD).expand([*weights.shape, 2]).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(weights), components)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", nargs="*", default=FLOWS, choices=FLOWS)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="barely trained flows, few data sets, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(ABOVE), flush=True)
    for kind in options.flows:
        flow = flow_of(Key("circles", kind), options.quick)
        for engine in options.engines:
            cells = row(flow, engine, 5 if options.quick else SETS, options.seed)
            line = f"| {kind} | {engine} | {cells} | {options.seed} |"
            print(line, flush=True)
            if not options.quick:
                write_rows("weights", ABOVE, [line], FLOWS)


def row(flow: ifpyro.InflationaryFlow, engine: str, sets: int, seed: int) -> str:
    """The cells of one flow and engine."""
    start = time.process_time()
    rng = np.random.default_rng(seed)
    z = latents(WEIGHTS.expand(sets, 3), rng)
    encoded = through(flow, z)
    draws = posteriors(encoded, engine, seed)
    moved = largest_change(draws, z, encoded)
    fixed = coverage(WEIGHTS.expand(sets, 3), draws, levels=[0.9], seed=seed)
    prior = torch.as_tensor(rng.dirichlet(np.ones(3), sets), dtype=torch.float32)
    drawn = coverage(prior, posteriors(through(flow, latents(prior, rng)), engine, seed), levels=[0.9], seed=seed)
    region = smallest_region(WEIGHTS.expand(sets, 3).double().numpy(), draws, seed)
    weights = ", ".join(f"{m:.2f} ± {s:.2f}" for m, s in zip(draws[0].mean(0), draws[0].std(0), strict=True))
    return (
        f"{weights} | {100 * region[0]:.0f} | {100 * (region <= 0.9).mean():.1f} | {percent(fixed)} | {percent(drawn)} "
        f"| {moved:.0e} | {time.process_time() - start:.0f}"
    )


def latents(weights: Tensor, rng: np.random.Generator) -> Tensor:
    """Points of every data set, ``(S, n, 2)``, for weights ``(S, 3)``."""
    which = (torch.as_tensor(rng.random((len(weights), POINTS, 1))) > weights.cumsum(-1)[:, None, :-1]).sum(-1)
    return (MEANS[which] + SPREAD * torch.as_tensor(rng.normal(size=(*which.shape, 2)))).float()


def through(flow: ifpyro.InflationaryFlow, z: Tensor) -> Tensor:
    """What encoding makes of decoded points."""
    with torch.no_grad():
        return torch.stack([flow.encode(flow.decode(points)) for points in z])


def posteriors(z: Tensor, engine: str, seed: int) -> np.ndarray:
    """Draws of the weights, ``(S, L, 3)``, for latents ``(S, n, 2)``."""
    density = ManyDataSets(model, (z[0],), {}, {"z": z}, seed=seed)
    draws = ENGINES[engine].sample(density, seed).flatten(1, 2)
    weights = density.sites(draws.flatten(0, 1))["weights"]
    return weights.reshape(*draws.shape[:2], 3).double().numpy()


def largest_change(draws: np.ndarray, exact: Tensor, encoded: Tensor) -> float:
    """Of a posterior mean, in posterior sd, were the latents exact: draws are reweighted by their likelihoods."""
    weights = torch.as_tensor(draws)
    pairs = zip(weights, exact, encoded, strict=True)
    change = torch.stack([log_likelihood(w, z) - log_likelihood(w, seen) for w, z, seen in pairs])
    mean = (change.softmax(1)[..., None] * weights).sum(1)
    return float(((mean - weights.mean(1)).abs() / weights.std(1)).max())


def log_likelihood(weights: Tensor, z: Tensor) -> Tensor:
    """``(L,)`` for weights ``(L, 3)`` and points ``(n, 2)``, double precision."""
    parts = -0.5 * ((z[:, None].double() - MEANS) / SPREAD).square().sum(-1)
    return (parts.exp() @ weights.mT).log().sum(0)


def smallest_region(truth: np.ndarray, draws: np.ndarray, seed: int) -> np.ndarray:
    """Probability of the smallest ellipse of each posterior, ``(S,)``, that reaches the truth: uniform under
    calibration."""
    centre = draws.mean(1, keepdims=True)[..., :2]  # the third weight is what is left
    precision = np.linalg.inv(np.einsum("sli,slj->sij", draws[..., :2] - centre, draws[..., :2] - centre))

    def distance(w: np.ndarray) -> np.ndarray:
        return np.einsum("sli,sij,slj->sl", w[..., :2] - centre, precision, w[..., :2] - centre)

    return uniform_ranks(distance(truth[:, None])[:, 0], distance(draws), np.random.default_rng(seed))


def percent(found: Coverage) -> str:
    """Of each weight; and pooled."""
    each = ", ".join(f"{100 * share:.1f}" for share in found.covered[0])
    return f"{each}; {100 * found.pooled[0]:.1f} ± {100 * found.pooled_error[0]:.1f}"


if __name__ == "__main__":
    main()
