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
from functools import partial
from pathlib import Path

import torch

import ifpyro
from accelerator_images import CASES as POSTERIORS
from accelerator_images import smc
from ifpyro.core.precision import full_precision
from images_flows import train
from images_numerics import CASES, memory_table, work
from results import CACHE, machine, show, write_section
from throughput import bare_passes, gradient_of, interleaved, random_flow, without_graph

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
WARM = 3  # rounds; decodes are recorded in the third
SIZES = ((2, 64), (2, 65_536), (64, 64), (64, 4096), (64, 65_536), (784, 4096), (3072, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"all by default: {', '.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="*", default=list(POSTERIORS), choices=list(POSTERIORS), help="of smc")
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
    generator = torch.Generator(flow.device).manual_seed(0)
    z = torch.randn(rows, flow.latent_dim, device=flow.device, generator=generator)
    alone, recorded = full_precision()(bare_passes(flow)), copy.deepcopy(flow)
    recorded.cuda_graphs = True
    jobs: dict[str, Callable[[], object]] = {
        "decode": without_graph(flow.decode, z),
        "limit": without_graph(alone, z),
        "recorded": without_graph(recorded.decode, z),
        "gradient": lambda: gradient_of(flow.decode, z),
        "both": lambda: gradient_of(alone, z),
        "recorded gradient": lambda: gradient_of(recorded.decode, z),
    }
    ms = {name: 1000 * statistics.median(seconds) for name, seconds in interleaved(jobs, 7, now, WARM).items()}
    cells = [f"{ms[name]:.2f}" for name in ("decode", "gradient")]
    cells += [f"{ms['decode'] / ms['limit']:.2f}", f"{ms['gradient'] / ms['both']:.2f}"]
    cells += [f"{ms[name]:.2f}" for name in ("recorded", "recorded gradient")]
    cells += [f"{ms['recorded'] / ms['limit']:.2f}", f"{ms['recorded gradient'] / ms['both']:.2f}"]
    cells.append(f"{rows * flow.grid.evaluations / ms['recorded'] / 1000:.2f}")
    return f"| {what} | {rows:,} | {' | '.join(cells)} |"


def now() -> float:
    """Seconds on the wall, once the device has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
    found = {}
    for case in CASES:
        flow.gradient_checkpointing = case == "checkpointed"
        found[case] = peak(partial(work, flow, case, rows)) / 2**20
    yield from memory_table(found)


def peak(job: Callable[[], None]) -> int:
    """Bytes by which the peak grows, once everything is warm."""
    job()
    now()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    now()
    return torch.cuda.max_memory_allocated() - before


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "passes": passes,
    "images": images,
    "memory": memory,
    "smc": smc,
}

if __name__ == "__main__":
    main()
