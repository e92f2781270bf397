"""Conditional flows against an exact conditional mixture: densities, rows against single conditions, and cost.

    python benchmarks/conditional.py [--rows 1000 10000] [--steps N]

Pairs ``(x, c)`` from a mixture of three Gaussians in four columns, of which two are given. *Gap*: the exact conditional
log-density minus the flow's, averaged over 4,000 held-out pairs. Seconds are processor seconds.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ifpyro
from ifpyro import Grid
from results import machine, show, write_section

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoos"))
from conditional_zoo import conditional_flow, log_conditional, pairs

TARGET = Path(__file__).parent / "conditional.md"


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The least processor seconds of a call."""
    call()
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=[1_000, 10_000])
    parser.add_argument("--steps", type=int, default=None, help="most steps of training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    show(lines, "## Conditional flows\n")
    show(lines, machine())
    exact = conditional_flow(start=1e-3, end=math.pi / 2 - 1e-4, grid=Grid(24))
    x, c = pairs(256, seed=5, dtype=torch.double)
    error = (exact.log_prob(x, c) - log_conditional(x, c)).abs()
    show(
        lines,
        f"\nExact conditional mixture, 24 steps: log-density off by {error.mean():.1e} on average, "
        f"{error.max():.1e} at most (256 pairs, nat).",
    )
    held_x, held_c = pairs(4_000, seed=9)
    truth = log_conditional(held_x, held_c)
    flow = None
    for rows in options.rows:
        x, c = pairs(rows)
        began = time.process_time()
        flow = ifpyro.fit(x, condition=c, seed=0, progress=False, max_steps=options.steps)
        training = time.process_time() - began
        regression = ifpyro.fit(x, condition=c, seed=0, progress=False, max_steps=0)
        gaps = [float((truth - f.log_prob(held_x, held_c, batch_size=2_000)).mean()) for f in (regression, flow)]
        report = flow.report["training"]
        show(
            lines,
            f"{rows} pairs: gap {gaps[1]:.3f} nat after {report['steps']} steps ({training:.0f} s, "
            f"{report['stopped']}), regression {gaps[0]:.3f}.",
        )
    assert flow is not None
    single = flow.given(held_c[0])
    z = torch.randn(1_000, 2, generator=torch.Generator().manual_seed(0))
    plain = ifpyro.fit(pairs(1_000)[0], seed=0, progress=False, max_steps=0, network={"width": 64, "blocks": 3})
    plain.grid = single.grid
    many = flow.given(held_c[:1_000])
    with torch.no_grad():
        apart = torch.stack([flow.given(held_c[i]).decode(z[i]) for i in range(50)])
        off = float((apart - many.decode(z)[:50]).abs().max())
        costs = [seconds(lambda f=f: f.decode(z)) for f in (plain, single, many)]
    show(lines, f"50 single conditions against rows of one batch: decodes differ by {off:.1e} at most.")
    show(
        lines,
        f"1,000 decodes of {single.grid.evaluations} evaluations: {1e3 * costs[0]:.1f} ms without conditions, "
        f"{1e3 * costs[1]:.1f} at one condition, {1e3 * costs[2]:.1f} at 1,000 conditions.",
    )
    began = time.process_time()
    z = flow.encode(held_x[:1_000], held_c[:1_000])
    flow.given(held_c[:1_000]).sample((63,), seed=0)
    show(lines, f"1,000 pairs: latents and 63 draws of each in {time.process_time() - began:.1f} s.")
    write_section(TARGET, "conditional", lines)


if __name__ == "__main__":
    main()
