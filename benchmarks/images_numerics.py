"""Of flows of 2 to 3,072 dimensions: evaluations for a given error, time and memory of a decode and of a gradient."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ifpyro
from ifpyro.flow.tuning import STEPS, doubling_error, knots_for, round_trip
from images_flows import data, train

SIZES = {2: "pair", 16: "4-grey", 64: "8-grey", 192: "8-colour", 768: "16", 3072: "32"}
ERRORS = (3e-2, 1e-2, 3e-3)
ROWS = 16
CASES = {
    "network pass": "one pass of the network, nothing kept",
    "network gradient": "one pass of the network and its gradient",
    "decode": "one decode, nothing kept",
    "gradient": "gradient of the log-posterior, all activations kept",
    "checkpointed": "the same with `gradient_checkpointing`",
}


def evaluations(quick: bool) -> Iterator[str]:
    """The table of evaluations against dimension."""
    yield "### Evaluations of the network against dimension"
    yield ""
    yield (
        "Fewest evaluations of one decode (Runge-Kutta 4, steps where they are needed) whose root-mean-square error, "
        "against a decode with twice the steps and in standard deviations of each axis, is below the number in the "
        f"column's head; latents of {ROWS} held-out rows. Round trip: `decode(encode(x))` against `x` on the grid for "
        f"{ERRORS[1]:g}, with the evaluations of encode and decode together; the inverse of the discrete map closes "
        "it on any grid, the iterations say how quickly."
    )
    yield ""
    errors = " | ".join(f"{error:g}" for error in ERRORS)
    yield f"| D | data | {errors} | round trip | in evaluations | iterations |"
    yield "|---|---|" + "---|" * (len(ERRORS) + 3)
    for dim, name in list(SIZES.items())[: 3 if quick else None]:
        flow = train(name, 2.0 if quick else None)
        x = data(name, ROWS, "places", seed=4)
        with torch.no_grad():
            z = flow.encode(x)
            needed = {}
            knots = knots_for(flow, z)
            for steps in STEPS[:2] if quick else STEPS:
                grid = replace(flow.grid, steps=steps, knots=knots)
                found = doubling_error(flow, z, grid)
                for error in ERRORS:
                    if found <= error and error not in needed:
                        needed[error] = grid
                if len(needed) == len(ERRORS):
                    break
            cells = [str(needed[error].evaluations) if error in needed else f"> {4 * STEPS[-1]}" for error in ERRORS]
            flow.grid = needed.get(ERRORS[1], flow.grid)
            for flow.refinements in range(1, 9):
                trip = round_trip(flow, x)[0]
                if trip <= 1e-4:
                    break
            count = flow.grid.evaluations * (2 + flow.refinements)
        yield f"| {dim:,} | {name} | {' | '.join(cells)} | {trip:.0e} | {count} | {flow.refinements} |"


def cost(quick: bool) -> Iterator[str]:
    """Time of a decode over its network passes, and memory of a gradient."""
    name, rows = ("8-colour", 16) if quick else ("32", 64)
    flow = train(name, 2.0 if quick else None)
    flow.grid = replace(flow.grid, steps=4)
    z = torch.randn(rows, flow.latent_dim, generator=torch.Generator().manual_seed(0))
    ratios = decode_ratios(flow, z, 1 if quick else 5)
    yield f"### Time and memory at D = {flow.latent_dim:,}"
    yield ""
    yield (
        f"{rows} rows, 4 steps (16 evaluations). A decode takes {ratios[0]:.3f} times its bare evaluations of the "
        f"velocity, and {ratios[1]:.3f} times as many bare passes of the U-Net, without the rotation into image space "
        f"(processor time, medians of alternating runs). Axes: `{flow.basis.kind}`."
    )
    yield ""
    yield (
        "Memory: growth of the peak resident size in a fresh process, after one row has gone the same way. "
        "The log-posterior is that of a noisy image."
    )
    yield ""
    yield from memory_table({case: _peak(name, case, rows) for case in CASES})


def memory_table(found: dict[str, float]) -> Iterator[str]:
    """MiB of every case beside those of one pass of the network."""
    yield "| what | MiB | over one pass and gradient of the network | over one pass, nothing kept |"
    yield "|---|---|---|---|"
    for case, what in CASES.items():
        ratios = [f"{found[case] / found[other]:.2f}" for other in ("network gradient", "network pass")]
        yield f"| {what} | {found[case]:.1f} | {' | '.join(ratios)} |"


def decode_ratios(flow: ifpyro.InflationaryFlow, z: Tensor, repeats: int) -> tuple[float, float]:
    """Processor time of a decode over that of as many evaluations of the velocity, and of the network inside it."""
    step = flow.map.steps(z).to_data[0]
    embedding, count = step.embedding[0], flow.grid.evaluations
    network = flow.velocity.network
    image = z.reshape(-1, *flow.event_shape)
    when = embedding[:1].expand(len(z))
    times: list[list[float]] = [[], [], []]
    with torch.no_grad():
        flow.decode(z)
        for _ in range(repeats):
            for found, work in zip(
                times,
                (
                    lambda: flow.decode(z),
                    lambda: [flow.velocity(z, embedding) for _ in range(count)],
                    lambda: [network(image, when) for _ in range(count)],
                ),
                strict=True,
            ):
                start = time.process_time()
                work()
                found.append(time.process_time() - start)
    whole, velocity, bare = (sorted(found)[len(found) // 2] for found in times)
    return whole / velocity, whole / bare


def _peak(name: str, case: str, rows: int) -> float:
    """MiB by which the peak grows, measured in a process of its own."""
    command = [sys.executable, __file__, name, case, str(rows)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _measure(name: str, case: str, rows: int) -> float:
    torch.set_num_threads(1)
    flow = train(name)
    flow.grid = replace(flow.grid, steps=4)
    flow.gradient_checkpointing = case == "checkpointed"
    job = partial(work, flow, case)
    job(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten
    before = _status("VmRSS")
    job(rows)
    return (_status("VmHWM") - before) / 1024


def work(flow: ifpyro.InflationaryFlow, case: str, rows: int) -> None:
    """What a case of the memory table is about, once."""
    z = torch.zeros(rows, flow.latent_dim, device=flow.device)
    z.requires_grad_("gradient" in case or case == "checkpointed")
    embedding = flow.map.steps(z.detach()).to_data[0].embedding[0]
    if case == "network pass":
        with torch.no_grad():
            flow.velocity(z, embedding)
    elif case == "decode":
        with torch.no_grad():
            flow.decode(z)
    else:
        x = flow.velocity(z, embedding) if case == "network gradient" else flow.decode(z)
        energy = 0.5 * (z.square().sum() + x.square().sum())
        torch.autograd.grad(energy, z)


def _status(entry: str) -> int:
    """Resident size or its peak in KiB, from Linux."""
    return int(re.findall(rf"{entry}:\s*(\d+)", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    print(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))
