"""Section ``posterior``: all latents of a half-hidden digit against the first K."""

import math
import time
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import ifpyro
from ifpyro.cli import demo
from ifpyro.flow.decoder import Decoder
from paper_flows import Key, data, flow_of

LATENTS = (4, 16)


def keys(quick: bool) -> list[Key]:
    """All flows of the section."""
    return [Key("digits, logits", f"details first, p = {p}") for p in ((2,) if quick else (1, 2))]


def posterior(quick: bool) -> Iterator[str]:
    """Half-hidden digits: all latents against the first K, with and without the price of the others."""
    images, particles = ((0,), 32) if quick else ((0, 1, 2, 3), 256)
    yield "## Posterior of a half-hidden digit over K latents\n"
    yield (
        f"Upper half of held-out digits {', '.join(map(str, images))} seen, sd 0.1; SMC, {particles} particles. "
        "Means over images: root mean square error of the posterior mean in seen and hidden pixels, sd and coverage "
        "of 90% intervals of hidden pixels, log-evidence, temperatures, processor seconds. Lost: share of the pixels' "
        "variance on the validation rows of `fit`. With the price: noise variance is raised by what is lost a pixel, "
        "and the answer's with it.\n"
    )
    yield (
        "| flow | latents | lost (PCA) | seen | hidden | sd | coverage | log-evidence | temperatures | seconds |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for key in keys(quick):
        flow = flow_of(key, quick)
        yield _row(key.schedule, flow, flow.latent_dim, False, images, particles)
        for k in LATENTS[: 1 if quick else None]:
            for priced in (False, True):
                yield _row(key.schedule, flow, k, priced, images, particles)


def _row(
    label: str, flow: ifpyro.InflationaryFlow, k: int, priced: bool, images: tuple[int, ...], particles: int
) -> str:
    """The cells of one model."""
    rows, decoder = data("digits, logits"), flow.decoder(k)
    variance = rows.train.var(0).mean()
    noise = math.sqrt(demo.NOISE**2 + priced * decoder.reconstruction_error * float(variance))
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[:4] = True
    model = demo.in_painting(flow, seen) if k == flow.latent_dim else in_k_latents(decoder, seen, noise)
    figures = []
    for index in images:
        truth = rows.held_out[index]
        y = truth[seen] + demo.NOISE * torch.randn(32, generator=torch.Generator().manual_seed(index))
        start = time.process_time()
        smc = ifpyro.SMC(model, particles, seed=0, progress=False)
        smc.run(y)
        seconds = time.process_time() - start
        draws = smc.get_samples()["image"].reshape(-1, 8, 8)
        if priced:  # what the other latents leave out is part of the answer, too
            left_out = math.sqrt(noise**2 - demo.NOISE**2)
            draws = draws + left_out * torch.randn(draws.shape, generator=torch.Generator().manual_seed(1))
        error = draws.mean(0) - truth
        low, high = draws.quantile(0.05, 0), draws.quantile(0.95, 0)
        inside = ((low <= truth) & (truth <= high))[~seen].float().mean()
        figures.append(
            [
                float(error[seen].square().mean()),
                float(error[~seen].square().mean()),
                float(draws.std(0)[~seen].mean()),
                float(inside),
                smc.log_evidence,
                len(smc.stages),
                seconds,
            ]
        )
    seen_error, hidden_error, sd, coverage, evidence, steps, seconds = torch.tensor(figures).mean(0).tolist()
    what = "all" if k == flow.latent_dim else f"{k}, with the price" if priced else str(k)
    price = f"{decoder.reconstruction_error:.3f} ({decoder.pca_error:.3f})"
    return (
        f"| {label} | {what} | {price} | {seen_error**0.5:.3f} | {hidden_error**0.5:.3f} | {sd:.3f} | {coverage:.0%} "
        f"| {evidence:.1f} | {steps:.0f} | {seconds:.1f} |"
    )


def in_k_latents(decoder: Decoder, seen: torch.Tensor, noise: float) -> Any:
    """The model of ``demo.in_painting`` on a decoder of few latents."""
    pixels, k = seen.flatten().nonzero().flatten(), decoder.k

    def model(y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(k), 1.0).to_event(1))
        image = pyro.deterministic("image", decoder(z), event_dim=2)
        pyro.sample("y", dist.Normal(image.flatten(-2)[..., pixels], noise).to_event(1), obs=y)

    return model
