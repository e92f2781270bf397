"""How few evaluations make a guide: what the methods' cheap maps are worth to a sampler.

    python benchmarks/guides.py [--only moons scurve digits]

The samplers follow a cheap map's density and let the exact one accept (see ifpyro.infer.engines.guided_density). On 256
draws of the three posteriors of posterior.py (from the references of peers_reference.py), this prints the acceptance
between two of them, were the guide followed perfectly: the mean, and what all but a twentieth of the draws reach. Grids
are those of the flow, ``t = u^p`` with its own ``p``. Chains ask for 0.85 and 0.50, SMC's particles for 0.70 and 0.20.
"""

import argparse
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

import posterior
from ifpyro.flow.solver.grid import TABLEAUX, Grid
from ifpyro.infer.engines.guided_density import CLOSE, LOOSE
from peers_reference import reference
from results import RESULTS, machine, write_section

EVALUATIONS = (1, 2, 3, 4, 6, 8, 12, 16)
METHODS = ("euler", "midpoint", "heun3", "rk4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(posterior.PROBLEMS), choices=list(posterior.PROBLEMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["## Guides: acceptance, mean / all but a twentieth, by evaluations of the cheap map\n"]
    lines.append(
        "| flow | method | " + " | ".join(map(str, EVALUATIONS)) + " | chains need | particles need |\n"
        "|---" + "|---" * (3 + len(EVALUATIONS)) + "|"
    )
    for name in options.only:
        for method in METHODS:
            lines.append(f"| {name} | {method} | {' | '.join(cells(name, method))} |")
            print(lines[-1], flush=True)
    lines.append(f"\n`python benchmarks/guides.py --only {' '.join(options.only)}`; {machine()}")
    write_section(RESULTS, "guides", lines)


def cells(name: str, method: str) -> list[str]:
    """Acceptances at every number of evaluations that makes steps, and the fewest that suffice."""
    stages, found, enough = TABLEAUX[method].stages, [], {}
    for evaluations in EVALUATIONS:
        if evaluations % stages:
            found.append("")
            continue
        mean, nearly_all = acceptance(name, method, evaluations // stages)
        found.append(f"{mean:.2f} / {nearly_all:.2f}")
        for agreement in (CLOSE, LOOSE):
            if mean >= agreement.mean and nearly_all >= agreement.nearly_all:
                enough.setdefault(agreement, evaluations)
    return found + [str(enough.get(agreement, "more")) for agreement in (CLOSE, LOOSE)]


@cache
def draws_of(name: str) -> tuple[posterior.Problem, Grid, Tensor, Tensor]:
    """A problem, its flow's grid, latents of draws of its posterior, and their exact log-likelihoods."""
    problem = posterior.PROBLEMS[name](False)
    flow = problem.flow
    x, w = reference(name)
    rows = x[torch.multinomial(w, 256, replacement=True, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        z = flow.encode(rows.reshape(-1, *flow.event_shape))
        return problem, flow.grid, z, problem.likelihood(flow.decode(z))


def acceptance(name: str, method: str, steps: int) -> tuple[float, float]:
    """Of proposals from one draw to another that follow the map of so many steps."""
    problem, grid, z, exact = draws_of(name)
    problem.flow.grid = replace(grid, steps=steps, method=method)
    with torch.no_grad():
        gap = problem.likelihood(problem.flow.decode(z)) - exact
    accept = (gap[:, None] - gap[None]).clamp(max=0).exp().nan_to_num(0.0).mean(1)
    return float(accept.mean()), float(accept.quantile(0.05))


if __name__ == "__main__":
    main()
