"""Reduced precision and memory layout of a convolutional network inside a flow, ratios in one run.

    python benchmarks/precision.py [--device cpu] [--size 16]

A U-Net whose weights are not trained but far from zero decodes 16 latents: seconds over those of single precision in
the default layout, median of repeats, and the root-mean-square change of the images in standard deviations of the data.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn

import ifpyro
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.images import unet
from ifpyro.flow.solver.grid import Grid
from results import RESULTS, machine, show, write_section


def example(size: int, device: str) -> ifpyro.InflationaryFlow:
    """A flow of colour images with the identity as basis."""
    torch.manual_seed(0)
    network = unet((3, size, size), (32, 64))
    nn.init.normal_(network.network.net.conv_out.weight, std=0.02)
    dim = 3 * size**2
    basis = Basis(torch.zeros(dim), torch.zeros(dim, 0), torch.ones(dim))
    schedule = ifpyro.Schedule.preserving()
    flow = ifpyro.InflationaryFlow(basis, schedule, network, event_shape=(3, size, size), grid=Grid(2))
    return flow.to(device)


def seconds(flow: ifpyro.InflationaryFlow, z: Tensor) -> float:
    """Of one decode."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        flow.decode(z).sum().item()  # waits for an accelerator
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = example(options.size, options.device)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    z = torch.randn(16, plain.latent_dim, generator=torch.Generator().manual_seed(0)).to(options.device)
    reference, base = plain.decode(z), seconds(plain, z)
    lines: list[str] = []
    shape = f"3 x {options.size} x {options.size}"
    show(lines, f"## Precision and layout: a U-Net on {shape} images, {options.device}\n")
    show(lines, "| precision | layout | seconds over single precision | change of the images |\n|---|---|---|---|")
    moved = float((reference.flatten(1) - z).square().mean().sqrt())
    for dtype in (None, torch.bfloat16):
        for layout, flow in (("default", plain), ("channels last", last)):
            flow.autocast = dtype
            change = float((flow.decode(z) - reference).square().mean().sqrt())
            name = "float32" if dtype is None else "bfloat16"
            show(lines, f"| {name} | {layout} | {seconds(flow, z) / base:.2f} | {change:.1e} |")
    show(lines, f"\nThe network moves the images by {moved:.2f}.")
    show(lines, f"`python benchmarks/precision.py`; {machine('diffusers')}")
    write_section(RESULTS, f"precision-{options.device}", lines)


if __name__ == "__main__":
    main()
