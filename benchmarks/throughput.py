"""What one call costs, beside the least it can cost (the network passes alone), and beside zuko's CNF.

    python benchmarks/throughput.py [--only limits options cnf] [--dims 2 16 ...] [--quick]

*limits*. A flow is a number of network passes with a little arithmetic in between. For dimensions from 2 to 3072, this
prints the milliseconds of one decode, encode, log-density and gradient, and three machine-independent figures:

* *decode / limit*: a decode over its network forward passes alone, run on rows of the same shape (goal: 1.15);
* *gradient / limit*: the gradient of a sum over decoded data with respect to the latent, over the forward and backward
  passes of the same networks chained without the flow's arithmetic (goal: 1.3);
* *saved*: bytes that autograd keeps for the gradient, per row.

*options*. What ``flow.compile()`` and ``flow.gradient_checkpointing`` change, the seconds of compilation included.
*cnf*. Decode, gradient and log-density of a trained flow and of a zuko CNF (which solves adaptively), on moons.

In the first two parts networks have random weights: nothing there depends on training. Ratios are medians over
interleaved repeats in one process, on one core.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import ifpyro
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.grid import Grid
from results import RESULTS, machine, write_section

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
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--dims", nargs="*", type=int, default=list(WIDTHS), choices=list(WIDTHS), help="of the limits")
    parser.add_argument("--quick", action="store_true", help="few small cases, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        lines = []
        part = limits(options.quick, options.dims) if name == "limits" else PARTS[name](options.quick)
        for text in part:
            print(text, flush=True)
            lines.append(text)
        dims = f" --dims {' '.join(map(str, options.dims))}" if name == "limits" else ""
        lines.append(f"\n`python benchmarks/throughput.py --only {name}{dims}`; {machine('zuko')}")
        if not options.quick:
            write_section(RESULTS, f"throughput-{name}", lines)


def limits(quick: bool, dims: Sequence[int] = tuple(WIDTHS)) -> Iterator[str]:
    yield f"## Throughput: calls beside bare network passes\n\n{HEADER}"
    for dim, rows, steps in cases(quick):
        if dim not in dims:
            continue
        yield line(dim, rows, steps, measure(dim, rows, steps, repeats=5 if quick else 9))


def cases(quick: bool) -> list[tuple[int, int, int]]:
    """``(dimension, rows, solver steps)``: rows at a fixed grid, then grids at a fixed number of rows."""
    if quick:
        return [(2, 64, 8), (16, 64, 8), (64, 64, 8)]
    rows = [(dim, rows, 8) for dim in WIDTHS for rows in (1, 64, 1024, 4096) if dim * rows <= 16 * 1024]
    return rows + [(dim, 256, steps) for dim in (64, 784) for steps in (2, 32)]


HEADER = (
    "| D | rows | evaluations | decode ms | encode ms | log-density ms | gradient ms "
    "| decode / limit | gradient / limit | saved, kB/row |\n" + "|---" * 10 + "|"
)


def line(dim: int, rows: int, steps: int, cost: Cost) -> str:
    times = " | ".join("–" if math.isnan(v) else f"{v:.2f}" for v in cost[:4])
    ratios = f"{cost.decode_ratio:.2f} | {cost.gradient_ratio:.2f}"
    return f"| {dim} | {rows} | {4 * steps} | {times} | {ratios} | {cost.saved / rows / 1024:.1f} |"


def random_flow(dim: int, steps: int) -> ifpyro.InflationaryFlow:
    """A flow with a random network of moderate slope, the same in every call; an outlet of zeros would hide work."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(dim)
        velocity = MLP(dim, width=WIDTHS[dim])
        velocity.outlet.weight.normal_(0.0, 0.02)
    scale = torch.linspace(1.0, 0.1, dim)
    basis = Basis(mean=torch.zeros(dim), rotation=torch.eye(dim), scale=scale)
    return ifpyro.InflationaryFlow(basis, ifpyro.Schedule.details_first(), velocity, grid=Grid(steps), refinements=1)


def measure(dim: int, rows: int, steps: int, repeats: int) -> Cost:
    """Medians over interleaved repeats of everything in one line."""
    flow = random_flow(dim, steps)
    z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    passes = bare_passes(flow)
    with torch.no_grad():
        x = flow.decode(z)
    jobs: dict[str, Callable[[], object]] = {
        "decode": without_graph(flow.decode, z),
        "forward": without_graph(passes, z),
        "gradient": lambda: _gradient(flow, z),
        "both": lambda: gradient_of(passes, z),
        "encode": lambda: flow.encode(x),
    }
    if dim <= LOG_DENSITY_UP_TO:
        jobs["log_prob"] = lambda: flow.log_prob(x)
    seconds = interleaved(jobs, repeats)
    ms = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return Cost(
        ms["decode"],
        ms["encode"],
        ms.get("log_prob", math.nan),
        ms["gradient"],
        _ratio(seconds, "decode", "forward"),
        _ratio(seconds, "gradient", "both"),
        saved_bytes(flow.decode, z, list(flow.velocity.parameters())),
    )


def bare_passes(flow: ifpyro.InflationaryFlow) -> Callable[[Tensor], Tensor]:
    """The networks one after another: what any decode, and any gradient, of as many evaluations must pay for."""
    embedding = flow.velocity.embed(torch.tensor([0.5], dtype=torch.double, device=flow.device))[0].detach()

    velocity = flow.evaluated_velocity()

    def passes(y: Tensor) -> Tensor:
        for _ in range(flow.grid.evaluations):
            y = velocity(y, embedding)
        return y

    return passes


def options(quick: bool) -> Iterator[str]:
    yield "## Throughput: compiled, and checkpointed\n"
    yield (
        "| D | rows | evaluations | compilation, s | compiled decode / limit | decode: compiled / eager "
        "| gradient: compiled / eager | checkpointed gradient / plain, time | bytes kept |\n" + "|---" * 9 + "|"
    )
    for dim in (2, 64) if quick else (2, 16, 64, 784):
        flow, compiled = random_flow(dim, 8), random_flow(dim, 8)
        took = compiled.compile()
        for rows in (1, 64, 1024):
            limit, decode, gradient = compiled_over_eager(flow, compiled, rows)
            slower, memory = gradient_saving(dim, rows, 8)
            costs = f"{limit:.2f} | {decode:.2f} | {gradient:.2f} | {slower:.2f} | {memory:.3f}"
            yield f"| {dim} | {rows} | {flow.grid.evaluations} | {took:.0f} | {costs} |"
    yield "\nBytes kept by the checkpointed gradient, D = 64, 256 rows, over the plain one's, by number of steps: "
    yield ", ".join(f"{steps}: {gradient_saving(64, 256, steps, repeats=1)[1]:.3f}" for steps in (4, 16, 64)) + "."


def compiled_over_eager(
    flow: ifpyro.InflationaryFlow, compiled: ifpyro.InflationaryFlow, rows: int
) -> tuple[float, float, float]:
    """Ratios of seconds: of a decode to the eager network's bare passes, and of a decode and of its gradient to the
    eager flow's, once their results are seen to agree."""
    z = torch.randn(rows, flow.latent_dim, generator=torch.Generator().manual_seed(0))
    difference = float((flow.decode(z) - compiled.decode(z)).abs().max())
    if not difference < 1e-4:
        raise RuntimeError(f"compiled and eager decodes differ by {difference}")
    decode = {
        "eager": without_graph(flow.decode, z),
        "compiled": without_graph(compiled.decode, z),
        "forward": without_graph(bare_passes(flow), z),
    }
    gradient = {"eager": lambda: _gradient(flow, z), "compiled": lambda: _gradient(compiled, z)}
    seconds = interleaved(decode, 9)
    return (
        _ratio(seconds, "compiled", "forward"),
        _ratio(seconds, "compiled", "eager"),
        _ratio(interleaved(gradient, 9), "compiled", "eager"),
    )


def gradient_saving(dim: int, rows: int, steps: int, repeats: int = 9) -> tuple[float, float]:
    """Seconds, and bytes kept for the backward pass, of a checkpointed gradient over those of a plain one."""
    plain, checkpointed = random_flow(dim, steps), random_flow(dim, steps)
    checkpointed.gradient_checkpointing = True
    z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    jobs = {"plain": lambda: _gradient(plain, z), "checkpointed": lambda: _gradient(checkpointed, z)}
    kept = [saved_bytes(f.decode, z, list(f.velocity.parameters())) for f in (checkpointed, plain)]
    return _ratio(interleaved(jobs, repeats), "checkpointed", "plain"), kept[0] / kept[1]


def cnf(quick: bool) -> Iterator[str]:
    """Both are trained for the same processor seconds; their errors are printed beside the costs."""
    from peers_density import PEERS, scores, train_flow

    toy = ifpyro.datasets.moons(0.05).unit_variance()
    x, test = toy.sample(20_000, seed=0), toy.sample(4_000, seed=1)
    seconds = 3.0 if quick else 30.0
    flow = ifpyro.fit(x, seed=0, max_seconds=seconds, progress=False)
    torch.manual_seed(0)
    peer = train_flow(PEERS["zuko CNF"](2), (x[:18_000], x[18_000:]), seconds, 0).requires_grad_(False)
    exact = float(toy.log_prob(test).mean())
    z, rows = torch.randn(1024, 2, generator=torch.Generator().manual_seed(0)), test[:1024]
    transform = peer().transform
    yield f"## Throughput: beside zuko's CNF, moons, both trained for {seconds:.0f} s; milliseconds for 1,024 rows\n"
    yield "| model | nats below exact | round trip | decode | gradient | log-density |\n" + "|---" * 6 + "|"
    models = {
        "ifpyro": (flow.decode, flow.encode, flow.log_prob),
        "zuko CNF": (transform.inv, transform, lambda x: peer().log_prob(x)),
    }
    for label, (decode, encode, log_prob) in models.items():
        gap = exact - float(scores(log_prob, test).mean())
        with torch.no_grad():
            error = float((decode(encode(rows)) - rows).square().mean().sqrt())
        jobs = {
            "decode": without_graph(decode, z),
            "gradient": lambda decode=decode: gradient_of(decode, z),
            "log_prob": without_graph(log_prob, rows),
        }
        ms = {name: 1000 * statistics.median(t) for name, t in interleaved(jobs, 5).items()}
        yield f"| {label} | {gap:.4f} | {error:.1e} | " + " | ".join(f"{v:.1f}" for v in ms.values()) + " |"


PARTS: dict[str, Callable[[bool], Iterator[str]]] = {"limits": limits, "options": options, "cnf": cnf}


# -- timing ------------------------------------------------------------------------------------------------------------


def interleaved(
    jobs: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    warm: int = 1,
) -> dict[str, list[float]]:
    """Processor seconds of every job, one after another in every round; the first ``warm`` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + warm):
        for name, job in jobs.items():
            start = clock()
            job()
            if repeat >= warm:
                seconds[name].append(clock() - start)
    return seconds


def _ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def without_graph(function: Callable[[Tensor], Tensor], value: Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            function(value)

    return work


def _gradient(flow: ifpyro.InflationaryFlow, z: Tensor) -> None:
    gradient_of(flow.decode, z)


def gradient_of(function: Callable[[Tensor], Tensor], z: Tensor) -> None:
    leaf = z.clone().requires_grad_(True)
    torch.autograd.grad(function(leaf).sum(), leaf)


def saved_bytes(function: Callable[[Tensor], Tensor], z: Tensor, weights: list[Tensor]) -> int:
    """Bytes that autograd saves in a forward pass, each storage counted once; weights are not counted."""
    sizes: dict[int, int] = {}
    known = {weight.untyped_storage().data_ptr() for weight in weights}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(z.clone().requires_grad_(True))  # kept, so that no address is used twice
    del result
    return sum(sizes.values())


if __name__ == "__main__":
    main()
