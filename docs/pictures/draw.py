"""The picture of the landing page: ``python docs/pictures/draw.py`` (a few seconds, no training).

The flow is the exact one of two noisy moons, whose posterior is known; nothing in the picture depends on a network.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import ifpyro

MEASURED, NOISE = 0.3, 0.1


def main() -> None:
    """Samples, latent, posterior, from left to right."""
    moons = ifpyro.datasets.moons(noise=0.1)
    flow = ifpyro.InflationaryFlow.from_gaussian_mixture(*moons.mixture())
    x = moons.sample(1500, seed=0, dtype=torch.double)
    with torch.no_grad():
        z = flow.encode(x)

    def model(y: torch.Tensor) -> None:
        place = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(place[..., 1], NOISE), obs=y)

    smc = ifpyro.SMC(model, num_particles=1024, seed=0, progress=False).run(torch.tensor(MEASURED, dtype=torch.double))
    draws = smc.get_samples()["x"]

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained")
    colour = x[:, 0]
    axes[0].scatter(*x.T, c=colour, s=4, cmap="viridis")
    axes[0].set_title("your samples become the prior")
    axes[1].scatter(*z.T, c=colour, s=4, cmap="viridis")
    axes[1].set_title("the same points in the Gaussian latent")
    axes[2].scatter(*x.T, color="0.85", s=4)
    axes[2].axhspan(MEASURED - NOISE, MEASURED + NOISE, color="C1", alpha=0.2, label="measured, ± 1 sd")
    axes[2].scatter(*draws.T, color="C3", s=4, label="posterior draws")
    axes[2].legend(loc="lower left", fontsize=8)
    axes[2].set_title("one measurement later")
    for axis, names in zip(axes, (("x₁", "x₂"), ("z₁", "z₂"), ("x₁", "x₂")), strict=True):
        axis.set_xlabel(names[0])
        axis.set_ylabel(names[1])
        axis.set_aspect("equal", "datalim")
    figure.savefig(Path(__file__).parent / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
