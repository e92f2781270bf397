"""What one call costs, beside the least it can cost: the network passes alone.

    python benchmarks/throughput.py [--quick]

A flow is a number of network passes with a little arithmetic in between. For dimensions from 2 to 3072, this prints the
milliseconds of one decode, encode, log-density and gradient, and three machine-independent figures:

* *decode / limit*: a decode over its network forward passes alone, run on rows of the same shape (goal: 1.15);
* *gradient / limit*: the gradient of a sum over decoded data with respect to the latent, over the forward and backward
  passes of the same networks chained without the flow's arithmetic (goal: 1.3);
* *saved*: bytes that autograd keeps for the gradient, per row.

Networks have random weights: nothing here depends on training.
Ratios are medians over interleaved repeats in one process, on one core.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import ifpyro
from ifpyro.basis import Basis
from ifpyro.ode import Grid
from ifpyro.velocity import MLP

WIDTHS = {2: 128, 16: 256, 64: 256, 784: 512, 3072: 1024}
LOG_DENSITY_UP_TO = 64  # dimensions: above, an exact Jacobian a stage is not what anybody would ask for


class Cost(NamedTuple):
    """One line of the table."""

    decode: float
    encode: float
    log_prob: float
    gradient: float
    decode_ratio: float
    gradient_ratio: float
    saved: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three small cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEADER)
    for dim, rows, steps in cases(options.quick):
        print(line(dim, rows, steps, measure(dim, rows, steps, repeats=5 if options.quick else 9)), flush=True)


def cases(quick: bool) -> list[tuple[int, int, int]]:
    """``(dimension, rows, solver steps)``: rows at a fixed grid, then grids at a fixed number of rows."""
    if quick:
        return [(2, 64, 8), (16, 64, 8), (64, 64, 8)]
    rows = [(dim, rows, 8) for dim in WIDTHS for rows in (1, 64, 1024, 4096) if dim * rows <= 784 * 1024]
    return rows + [(dim, 256, steps) for dim in (2, 64, 784) for steps in (2, 32)]


HEADER = (
    "| D | rows | evaluations | decode ms | encode ms | log-density ms | gradient ms "
    "| decode / limit | gradient / limit | saved, kB/row |\n" + "|---" * 10 + "|"
)


def line(dim: int, rows: int, steps: int, cost: Cost) -> str:
    times = " | ".join("–" if math.isnan(v) else f"{v:.2f}" for v in cost[:4])
    ratios = f"{cost.decode_ratio:.2f} | {cost.gradient_ratio:.2f}"
    return f"| {dim} | {rows} | {4 * steps} | {times} | {ratios} | {cost.saved / rows / 1024:.1f} |"


def random_flow(dim: int, steps: int) -> ifpyro.InflationaryFlow:
    """A flow with a random network of moderate slope: the outlet starts at zero and would hide the work."""
    generator = torch.Generator().manual_seed(dim)
    velocity = MLP(dim, width=WIDTHS[dim])
    with torch.no_grad():
        velocity.outlet.weight.copy_(0.02 * torch.randn(velocity.outlet.weight.shape, generator=generator))
    scale = torch.linspace(1.0, 0.1, dim)
    basis = Basis(mean=torch.zeros(dim), rotation=torch.eye(dim), scale=scale)
    return ifpyro.InflationaryFlow(basis, ifpyro.Schedule.details_first(), velocity, grid=Grid(steps), refinements=1)


def measure(dim: int, rows: int, steps: int, repeats: int) -> Cost:
    """Medians over interleaved repeats of everything in one line."""
    flow = random_flow(dim, steps)
    z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    embedding = flow.velocity.embed(torch.tensor([0.5], dtype=torch.double))[0].detach()

    def passes(y: Tensor) -> Tensor:
        """The networks one after another: what any gradient of as many evaluations must pay for."""
        for _ in range(flow.grid.evaluations):
            y = flow.velocity(y, embedding)
        return y

    def without_graph(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def work() -> None:
            with torch.no_grad():
                function(z)

        return work

    def gradient(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def work() -> None:
            leaf = z.clone().requires_grad_(True)
            torch.autograd.grad(function(leaf).sum(), leaf)

        return work

    with torch.no_grad():
        x = flow.decode(z)
    jobs = {
        "decode": without_graph(flow.decode),
        "forward": without_graph(passes),
        "gradient": gradient(flow.decode),
        "both": gradient(passes),
        "encode": lambda: flow.encode(x),
    }
    if dim <= LOG_DENSITY_UP_TO:
        jobs["log_prob"] = lambda: flow.log_prob(x)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    ms = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return Cost(
        ms["decode"],
        ms["encode"],
        ms.get("log_prob", math.nan),
        ms["gradient"],
        ratio("decode", "forward"),
        ratio("gradient", "both"),
        saved_bytes(gradient(flow.decode), list(flow.velocity.parameters())),
    )


def saved_bytes(work: Callable[[], None], weights: list[Tensor]) -> int:
    """Bytes that autograd saves for the backward pass, each storage counted once; weights are not counted."""
    sizes: dict[int, int] = {}
    known = {weight.untyped_storage().data_ptr() for weight in weights}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())


if __name__ == "__main__":
    main()
