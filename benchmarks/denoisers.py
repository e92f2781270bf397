"""Pretrained denoisers as flows: one network trained under every parametrisation, beside a flow trained directly.

    python benchmarks/denoisers.py [--steps 20000] [--only fit edm epsilon v x0 flow azula] [--train]

Moons, 20,000 points, whose exact density is known. Every denoiser is the same residual network trained by the recipe of
its own literature (Adam, annealed, moving average), as any other library would have; ``ifpyro.from_denoiser`` then
makes it a flow. Means are over 5,000 held-out points. Trained networks are kept in ``benchmarks/.cache``; ``--train``
stops after that. And the estimates of the log-density of many axes: their errors
and standard errors on a flow of the 64 pixels of digits, where the exact value can still be had.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn
from tqdm.auto import tqdm

import ifpyro
from results import CACHE, RESULTS, machine, show, write_section

NOISE = 0.05
BATCH = 1024
SIGMAS = (0.005, 80.0)
TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.double), 0)  # Ho et al. (2020)


class Residual(nn.Module):
    """Three residual blocks and sines of one number: the network inside every denoiser."""

    def __init__(self, dim: int, width: int = 128):
        super().__init__()
        self.inlet, self.outlet = nn.Linear(dim + 33, width), nn.Linear(width, dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width + 33, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(3)
        )
        nn.init.zeros_(self.outlet.weight)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Of rows ``(n, dim)`` and numbers ``(n,)``."""
        phase = c.unsqueeze(-1) * torch.logspace(-1, 1, 16, dtype=c.dtype, device=c.device)
        features = torch.cat([phase.sin(), phase.cos(), c.unsqueeze(-1)], -1)
        h = self.inlet(torch.cat([x, features], -1))
        for block in self.blocks:
            h = h + block(torch.cat([nn.functional.silu(h), features], -1))
        return self.outlet(nn.functional.silu(h))


class EDM(nn.Module):
    """``D(x; sigma)`` with the preconditioning of Karras et al. (2022, table 1), data of standard deviation one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(2)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoised rows."""
        s = sigma.unsqueeze(-1)
        total = (1 + s**2).sqrt()
        return x / total**2 + s / total * self.inner(x / total, sigma.log() / 4)

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Weighted error of the denoised rows."""
        sigma = (1.8 * torch.randn(len(x), generator=generator) - 1.2).exp().clamp(*SIGMAS)
        noised = x + sigma.unsqueeze(-1) * torch.randn(x.shape, generator=generator)
        weight = (1 + sigma**2) / sigma**2
        return (weight.unsqueeze(-1) * (self(noised, sigma) - x).square()).mean()


class DDPM(nn.Module):
    """A network that sees ``sqrt(share) x_0 + sqrt(1 - share) n`` and one of a thousand times."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.inner, self.prediction = Residual(2), prediction

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        """The prediction."""
        return self.inner(image, time / 100)

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Mean square error of the prediction."""
        index = torch.randint(0, len(TABLE), (len(x),), generator=generator)
        share = TABLE[index].float().unsqueeze(-1)
        n = torch.randn(x.shape, generator=generator)
        alpha, sigma = share.sqrt(), (1 - share).sqrt()
        target = {"x0": x, "epsilon": n, "v": alpha * n - sigma * x, "flow": n - x}[self.prediction]
        return (self(alpha * x + sigma * n, index.float()) - target).square().mean()


def azula_denoiser() -> nn.Module:
    """The same network inside azula's ``KarrasDenoiser``."""
    from azula.denoise import KarrasDenoiser
    from azula.noise import VPSchedule

    class Trained(KarrasDenoiser):
        def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:  # times from the generator
            return super().loss(x, torch.rand(len(x), generator=generator))

    return Trained(Residual(2), VPSchedule())


OF_DATA = (
    "A velocity is the prediction of the data divided by the noise (`x0`), which is 0.01 at the first of the DDPM's "
    "levels: the network's errors come out a hundredfold there. EDM's preconditioning exists to prevent this."
)

KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "edm": (EDM, {"noise": SIGMAS}),
    **{
        name: (lambda name=name: DDPM(name), {"noise": TABLE, "prediction": name})
        for name in ("epsilon", "v", "x0", "flow")
    },
    "azula": (azula_denoiser, {}),
}


def train(network: Any, x: Tensor, steps: int) -> nn.Module:
    """Adam on random batches, the rate annealed to zero, and the moving average of the weights."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    average = copy.deepcopy(network)
    for step in tqdm(range(steps)):
        optimiser.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = x[torch.randint(0, len(x), (BATCH,), generator=generator)]
        optimiser.zero_grad()
        network.loss(rows, generator).backward()
        optimiser.step()
        with torch.no_grad():
            for mean, new in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(new, 0.005)
    return average


def trained(name: str, x: Tensor, steps: int) -> Any:
    """A denoiser from the cache, or from training."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"denoisers-{name}-{steps}.safetensors"
    torch.manual_seed(0)
    network = KINDS[name][0]()
    if not path.exists():
        save_file(train(network, x, steps).state_dict(), path)
    network.load_state_dict(load_file(path))
    return network


def direct(name: str, x: Tensor, steps: int) -> ifpyro.InflationaryFlow:
    """A flow trained by this library, from the cache or from training."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"denoisers-{name}-{steps}.safetensors"
    if not path.exists():
        ifpyro.fit(x, seed=0, max_steps=steps).save(path)
    return ifpyro.load(path)


def moons(names: list[str], steps: int, only_train: bool, lines: list[str]) -> None:
    """The table of parametrisations."""
    x = torch.as_tensor(make_moons(20_000, noise=NOISE, random_state=0)[0], dtype=torch.float32)
    test = torch.as_tensor(make_moons(5_000, noise=NOISE, random_state=1)[0], dtype=torch.float32)
    mean, sd = x.mean(0), x.std(0)
    exact = ifpyro.datasets.moons(NOISE).log_prob(test) + sd.log().sum()
    white, held_out = (x - mean) / sd, (test - mean) / sd
    show(lines, f"## Denoisers trained elsewhere, as flows: moons, {steps} steps of {BATCH} points each\n")
    show(lines, "| network | nats below exact | standard error | evaluations | round trip | latent variance |")
    show(lines, "|---|---|---|---|---|---|")
    for name in names:
        source = direct("fit", white, steps) if name == "fit" else trained(name, white, steps)
        if only_train:
            continue
        flow = source if name == "fit" else ifpyro.from_denoiser(source, samples=held_out[:2000], **KINDS[name][1])
        with torch.no_grad():
            gap = exact - flow.log_prob(held_out)
            variance = float(flow.encode(held_out).square().mean())
        numbers = flow.report["numerics"]
        show(
            lines,
            f"| {name} | {float(gap.mean()):.4f} | {float(gap.std()) / len(gap) ** 0.5:.4f} | {numbers['evaluations']} "
            f"| {numbers['round_trip_rmse']:.0e} | {variance:.3f} |",
        )
    if "x0" in names and not only_train:
        show(lines, "\n" + OF_DATA)


def estimates(steps: int, lines: list[str]) -> None:
    """Errors of the estimated log-density against the exact one, on the 64 pixels of digits."""
    pixels = torch.as_tensor(load_digits().data, dtype=torch.float32)
    pixels = pixels + torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    flow = direct("digits", pixels[:1500], steps)
    x = pixels[1500:1564]
    with torch.no_grad():
        exact = flow.log_prob(x)
        flow.exact_up_to = 1
        show(
            lines,
            f"\n## Log-density of {flow.latent_dim} axes, estimated: held-out digits, exact {exact.mean():.1f} nats\n",
        )
        show(
            lines,
            "| method | products an evaluation | error (RMSE, nats) | its standard error | inside 90% | seconds |",
        )
        show(lines, "|---|---|---|---|---|---|")
        fixed = (flow.log_prob(x) - exact).square().mean().sqrt()
        show(lines, f"| `log_prob`, fixed signs | 8 | {float(fixed):.3f} | | | |")
        for method in ("hutchinson", "hutch++"):
            for probes in (12, 24, 48):
                began = time.perf_counter()
                value, error = flow.log_prob_estimate(x, probes=probes, method=method)
                took = time.perf_counter() - began
                count = probes if method == "hutchinson" else probes // 3
                inside = ((value - exact).abs() < float(stats.t.ppf(0.95, count - 1)) * error).float().mean()
                show(
                    lines,
                    f"| {method} | {probes} | {float((value - exact).square().mean().sqrt()):.3f} "
                    f"| {float(error.square().mean().sqrt()):.3f} | {float(inside):.0%} | {took:.1f} |",
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="of training each (default: %(default)s)")
    names = ["fit", *KINDS]
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--train", action="store_true", help="train and keep what is missing, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    moons(options.only, options.steps, options.train, lines)
    if not options.train:
        estimates(options.steps, lines)
        show(lines, f"\n`python benchmarks/denoisers.py --steps {options.steps}`; seed 0; {machine('azula')}")
        write_section(RESULTS, "denoisers", lines)


if __name__ == "__main__":
    main()
