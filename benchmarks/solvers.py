"""Error of a decode by evaluations: the flow's Runge-Kutta grids beside multistep and exponential integrators.

    python benchmarks/solvers.py [--only moons scurve digits]

Trained flows of posterior.py (moons, S-curve and digits), 256 latents, root-mean-square difference from the same flow
solved with 256 steps of dopri5, in standard deviations. Every method gets the best of four grids (``t = u^p``, p of 1,
1.5, 2, 3); *rk4, placed* has its steps where `ifpyro.flow.tuning.knots_for` puts them. *AB2*, *AB4*: Adams-Bashforth,
one evaluation a step, started by Runge-Kutta steps (Hairer, Norsett & Wanner 1993, section III.1), with coefficients
for uneven steps. *2M*: the second-order multistep exponential integrator on the prediction of the data
(DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, algorithm 2), per axis.
"""

import argparse
from itertools import pairwise

import torch
from torch import Tensor

import ifpyro
import posterior
from ifpyro.flow.solver.grid import TABLEAUX, Grid
from ifpyro.flow.tuning import knots_for
from results import RESULTS, machine, write_section

EVALUATIONS = (16, 24, 32, 48, 64, 96)
POWERS = (1.0, 1.5, 2.0, 3.0)
PLACED = "rk4, placed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(posterior.PROBLEMS), choices=list(posterior.PROBLEMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["## Solvers: error of a decode by number of evaluations\n"]
    lines.append(
        "| flow | method | " + " | ".join(map(str, EVALUATIONS)) + " |\n" + "|---" * (2 + len(EVALUATIONS)) + "|"
    )
    for name in options.only:
        flow = posterior.PROBLEMS[name](False).flow.double()
        z = torch.randn(256, flow.latent_dim, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        with torch.no_grad():
            right = flow.map.on_grid(z, Grid(256, 1.5, "dopri5"))
            knots = knots_for(flow, z)
            for method in [*TABLEAUX, PLACED, "AB2", "AB4", "2M"]:
                cells = []
                for evaluations in EVALUATIONS:
                    if method == PLACED:
                        errors = [rmse(flow.map.on_grid(z, Grid(evaluations // 4, knots=knots)), right)]
                    else:
                        errors = [rmse(solve(flow, z, method, evaluations, power), right) for power in POWERS]
                    cells.append(f"{min(errors):.1e}")
                lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    lines.append(f"\n`python benchmarks/solvers.py --only {' '.join(options.only)}`; {machine()}")
    write_section(RESULTS, "solvers", lines)


def rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def solve(flow: ifpyro.InflationaryFlow, z: Tensor, method: str, evaluations: int, power: float) -> Tensor:
    if method in TABLEAUX:
        return flow.map.on_grid(z, Grid(max(1, evaluations // TABLEAUX[method].stages), power, method))
    steps = evaluations if method == "2M" else evaluations - 3 * {"AB2": 1, "AB4": 3}[method]
    times = Grid(steps, power).times().flip(0)
    return exponential(flow, z, times) if method == "2M" else adams(flow, z, times, {"AB2": 2, "AB4": 4}[method])


def slope(flow: ifpyro.InflationaryFlow, y: Tensor, t: Tensor) -> Tensor:
    return -flow.angles.speed(t[None])[0] * flow.velocity(y, flow.velocity.embed(t[None])[0])


def adams(flow: ifpyro.InflationaryFlow, y: Tensor, times: Tensor, order: int) -> Tensor:
    """Adams-Bashforth on an uneven grid; the first steps are rk4's."""
    past: list[tuple[Tensor, Tensor]] = []
    for start, end in pairwise(times):
        past = [*past, (start, slope(flow, y, start))][-order:]
        h = end - start
        if len(past) < order:
            k1 = past[-1][1]
            k2 = slope(flow, y + 0.5 * h * k1, start + 0.5 * h)
            k3 = slope(flow, y + 0.5 * h * k2, start + 0.5 * h)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(flow, y + h * k3, end))
            continue
        # weights that integrate polynomials through the past nodes exactly from start to end
        nodes = torch.stack([(t - start) / h for t, _ in past])
        powers = torch.arange(order, dtype=torch.double)
        weights = torch.linalg.solve(nodes[None] ** powers[:, None], 1 / (powers + 1))
        y = y + h * sum(w * k for w, (_, k) in zip(weights, past, strict=True))
    return y


def exponential(flow: ifpyro.InflationaryFlow, y: Tensor, times: Tensor) -> Tensor:
    """DPM-Solver++(2M) with the angle of every axis: alpha = cos theta, sigma = sin theta."""
    theta = flow.angles(times)
    log_snr = -theta.tan().log()
    before, last = None, None
    for k in range(len(times) - 1):
        embedding = flow.velocity.embed(times[k : k + 1])[0]
        data = theta[k].cos() * y + theta[k].sin() * flow.velocity(y, embedding)
        h = log_snr[k + 1] - log_snr[k]
        guess = data if before is None else data + 0.5 * (h / last) * (data - before)
        y = theta[k + 1].sin() / theta[k].sin() * y - theta[k + 1].cos() * torch.expm1(-h) * guess
        before, last = data, h
    return y


if __name__ == "__main__":
    main()
