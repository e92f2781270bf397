"""Numerical error of trained flows, and the price of a decode over bare network passes, one core, one run.

    python benchmarks/numerics.py [--seconds 20]

Round trip: ``decode(encode(x)) - x`` on held-out rows in standard deviations. Log-determinant: against
autograd of the map.
Cost: seconds of a decode over (evaluations x seconds of one bare network forward pass), median of repeats.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_breast_cancer, make_circles, make_moons, make_s_curve
from torch import Tensor

import ifpyro
from ifpyro.flow.tuning import measure
from results import RESULTS, machine, write_section


def data() -> dict[str, Tensor]:
    """Samples by name."""
    sets = {
        "moons": make_moons(20_000, noise=0.05, random_state=0)[0],
        "circles": make_circles(20_000, noise=0.05, factor=0.5, random_state=0)[0],
        "S-curve": make_s_curve(20_000, noise=0.05, random_state=0)[0],
        "breast cancer": torch.as_tensor(load_breast_cancer().data).clamp(min=1e-3).log(),
    }
    return {name: torch.as_tensor(x, dtype=torch.float32) for name, x in sets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="training time per set (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"## Numerical error, and the price of a decode over bare passes; flows trained for {options.seconds:.0f} s\n",
        "| data | evaluations | step doubling | round trip | log-density error | log-det error | decode cost |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, x in data().items():
        cut = len(x) * 4 // 5
        flow = ifpyro.fit(x[:cut], seed=0, max_seconds=options.seconds, progress=False)
        found = measure(flow, x[cut:][:2000])
        lines.append(
            f"| {name} | {found['evaluations']} | {found['doubling_rmse']:.1e} | {found['round_trip_rmse']:.1e} "
            f"| {found['log_prob_error']:.1e} | {log_det_error(flow):.1e} | {decode_cost(flow):.2f} |"
        )
        print(lines[-1], flush=True)
    lines.append(f"\n`python benchmarks/numerics.py`; seed 0; {machine()}")
    write_section(RESULTS, "numerics", lines)


def log_det_error(flow: ifpyro.InflationaryFlow) -> float:
    """Largest difference over 100 latents of the log-determinant from that of autograd's Jacobian."""
    z = torch.randn(100, flow.latent_dim, generator=torch.Generator().manual_seed(0))
    jacobian = torch.func.vmap(torch.func.jacrev(flow.decode))(z)
    return float((flow.decode_and_log_det(z)[1] - torch.linalg.slogdet(jacobian).logabsdet).abs().max())


def decode_cost(flow: ifpyro.InflationaryFlow, rows: int = 1024, repeats: int = 15) -> float:
    """Seconds of a decode over the seconds of its network passes alone."""
    z = torch.randn(rows, flow.latent_dim, generator=torch.Generator().manual_seed(0))
    embedding = flow.velocity.embed(torch.tensor([0.5], dtype=torch.double))[0]

    def passes() -> None:
        for _ in range(flow.grid.evaluations):
            flow.velocity(z, embedding)

    with torch.no_grad():
        flow.decode(z)
        pairs = [(_seconds(lambda: flow.decode(z)), _seconds(passes)) for _ in range(repeats)]
    return statistics.median(a / b for a, b in pairs)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
