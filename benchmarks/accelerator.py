"""On an accelerator: decodes and gradients beside bare network passes, memory, posteriors of images.

    python benchmarks/accelerator.py [passes images memory smc] [--device cuda] [--cases 16:deblurring] [--out FOLDER]

Wall-clock seconds, the device waited for. All but *passes* take the flows of image patches that ``images_flows.py``
trains on a processor, from ``benchmarks/.cache``. Tables are printed, and replace those of the same sections in
``benchmarks/accelerator.md``; draws are kept in the cache, or in ``--out``.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import accelerator_images
import ifpyro
from ifpyro.precision import full_precision
from images_flows import train
from results import CACHE, machine, show, write_section
from throughput import bare_passes, random_flow

RESULTS = CACHE.parent / "accelerator.md"
HEADER = """# On an accelerator

Tables are by `python benchmarks/accelerator.py`, in wall-clock seconds of one process alone on the device unless a
section says otherwise. Everything else that is measured in this folder ran on one core of a processor.
"""
TABLE = (
    "",
    "| D | rows | decode ms | gradient ms | decode / limit | gradient / limit | recorded decode ms | gradient ms "
    "| recorded decode / limit | gradient / limit | million evaluations a second, recorded |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
STEPS = 8
WARM = 3  # rounds
SIZES = ((2, 64), (2, 65_536), (64, 64), (64, 4096), (64, 65_536), (784, 4096), (3072, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"all by default: {', '.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="*", default=list(accelerator_images.CASES), help="of smc")
    parser.add_argument("--out", type=Path, default=CACHE)
    options = parser.parse_args()
    write_section(RESULTS, "header", [HEADER, _machine(options.device)])
    for name in options.sections:
        lines: list[str] = []
        for line in SECTIONS[name](options):
            show(lines, line)
        write_section(RESULTS, name, lines)


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return f"{name}; {machine('diffusers').replace(', one core;', ';')}"


# -- time --------------------------------------------------------------------------------------------------------------


def passes(options: argparse.Namespace) -> Iterator[str]:
    """Decodes and gradients over the network's passes alone, and recorded."""
    yield "### Decodes and gradients beside bare network passes"
    yield ""
    yield (
        f"{4 * STEPS} evaluations, networks of throughput.py with random weights. Medians of alternating runs. Limit: "
        "as many bare passes of the network, launched one by one, forward and for gradients back. Small networks take "
        "as long as their kernels take to launch, whatever the rows; *recorded* (`flow.cuda_graphs`) they are launched "
        "together."
    )
    yield from TABLE
    for dim, rows in SIZES:
        yield line(random_flow(dim, STEPS).to(options.device), f"{dim:,}", rows)


def images(options: argparse.Namespace) -> Iterator[str]:
    """The same of a U-Net."""
    yield "### The same of the U-Net of 32 x 32 patches"
    yield from TABLE
    for precision in (None, torch.bfloat16):
        flow = train("32").to(options.device)
        flow.grid, flow.autocast = replace(flow.grid, steps=2), precision
        for rows in (64, 1024):
            yield line(flow, f"3,072{', bfloat16' if precision else ''}", rows)


def line(flow: ifpyro.InflationaryFlow, what: str, rows: int) -> str:
    """One line of the table."""
    z = _latents(flow, rows)
    alone, recorded = full_precision()(bare_passes(flow)), copy.deepcopy(flow)
    recorded.cuda_graphs = True
    ms = times(
        {
            "decode": _value(flow.decode, z),
            "limit": _value(alone, z),
            "recorded": _value(recorded.decode, z),
            "gradient": _gradient(flow.decode, z),
            "both": _gradient(alone, z),
            "recorded gradient": _gradient(recorded.decode, z),
        }
    )
    cells = [f"{ms[name]:.2f}" for name in ("decode", "gradient")]
    cells += [f"{ms['decode'] / ms['limit']:.2f}", f"{ms['gradient'] / ms['both']:.2f}"]
    cells += [f"{ms[name]:.2f}" for name in ("recorded", "recorded gradient")]
    cells += [f"{ms['recorded'] / ms['limit']:.2f}", f"{ms['recorded gradient'] / ms['both']:.2f}"]
    cells.append(f"{rows * flow.grid.evaluations / ms['recorded'] / 1000:.2f}")
    return f"| {what} | {rows:,} | {' | '.join(cells)} |"


def _latents(flow: ifpyro.InflationaryFlow, rows: int) -> Tensor:
    generator = torch.Generator(flow.device).manual_seed(0)
    return torch.randn(rows, flow.latent_dim, device=flow.device, generator=generator)


def _gradient(function: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], None]:
    def work() -> None:
        leaf = z.clone().requires_grad_(True)
        torch.autograd.grad(function(leaf).sum(), leaf)

    return work


def _value(function: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            function(z)

    return work


def times(jobs: dict[str, Callable[[], None]], repeats: int = 7) -> dict[str, float]:
    """Medians in milliseconds, of jobs in turn; the first rounds warm up, and record."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + WARM):
        for name, job in jobs.items():
            wait()
            start = time.perf_counter()
            job()
            wait()
            if repeat >= WARM:
                found[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def wait() -> None:
    """For the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> Iterator[str]:
    """Peak memory of one gradient of the log-posterior of an image."""
    flow, rows = train("32").to(options.device), 64
    yield "### Memory at D = 3,072"
    yield ""
    yield (
        f"{rows} rows, {flow.grid.steps} steps ({flow.grid.evaluations} evaluations). Growth of the peak that torch's "
        "allocator counts, to the byte, over what is there before. The log-posterior is that of a noisy image."
    )
    yield ""
    yield "| what | MiB | over one pass and gradient of the network | over one pass, nothing kept |"
    yield "|---|---|---|---|"
    z = torch.zeros(rows, flow.latent_dim, device=options.device)
    embedding = flow.solver(z).to_data[0].embedding[0]

    def posterior(function: Callable[[Tensor], Tensor]) -> None:
        leaf = z.clone().requires_grad_(True)
        x = function(leaf)
        torch.autograd.grad(0.5 * (leaf.square().sum() + x.square().sum()), leaf)

    def network(y: Tensor) -> Tensor:
        return flow.velocity(y, embedding)

    found = {
        "one pass of the network, nothing kept": peak(_value(network, z)),
        "one pass of the network and its gradient": peak(lambda: posterior(network)),
        "one decode, nothing kept": peak(_value(flow.decode, z)),
        "gradient of the log-posterior, all activations kept": peak(lambda: posterior(flow.decode)),
    }
    flow.gradient_checkpointing = True
    found["the same with `gradient_checkpointing`"] = peak(lambda: posterior(flow.decode))
    nothing, both = list(found.values())[:2]
    for what, size in found.items():
        yield f"| {what} | {size / 2**20:.1f} | {size / both:.2f} | {size / nothing:.2f} |"


def peak(work: Callable[[], None]) -> int:
    """Bytes by which the peak grows, once everything is warm."""
    work()
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    wait()
    return torch.cuda.max_memory_allocated() - before


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "passes": passes,
    "images": images,
    "memory": memory,
    "smc": accelerator_images.smc,
}

if __name__ == "__main__":
    main()
