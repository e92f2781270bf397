"""The main job on real data: half of a scanned digit is hidden, the rest noisy; what was the digit?

The 1,797 digits that scikit-learn ships are dequantised (a pixel value ``v`` in 0..16 becomes ``(v + u)/17``, ``u``
uniform), a flow is trained on four fifths of them, and the posterior over one held-out image is sampled through the
flow by tempered SMC, in four islands that check one another.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..core.figures import check_picture, image_rows, posterior_images, save_figure
from ..flow.flow import InflationaryFlow
from ..infer import SMC
from ..training import fit

NOISE = 0.1  # standard deviation of the pixel noise, images are in [0, 1]


def digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Dequantised digits, ``(N, 8, 8)`` in (0, 1): four fifths to train on, one fifth held out, shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn; install it with: pip install 'ifpyro[demo]'") from error
    rng = np.random.default_rng(seed)
    grey = load_digits().images
    images = torch.as_tensor((grey + rng.uniform(0.001, 0.999, grey.shape)) / 17, dtype=torch.float32)
    images = images[torch.as_tensor(rng.permutation(len(images)))]
    cut = len(images) * 4 // 5
    return images[:cut], images[cut:]


def in_painting(flow: InflationaryFlow, seen: Tensor, noise: float = NOISE) -> Any:
    """A Pyro model of noisy pixels: ``y ~ Normal(image[seen], noise)``, with the flow as the prior of the image.

    Args:
        flow: prior over images ``(8, 8)``.
        seen: boolean mask of the pixels that are observed.
        noise: standard deviation of the pixel noise.
    """
    pixels = seen.flatten().nonzero().flatten()

    def model(y: Tensor) -> None:
        image = pyro.sample("image", flow.prior())
        pyro.sample("y", dist.Normal(image.flatten(-2)[..., pixels], noise).to_event(1), obs=y)

    return model


def run_demo(
    out: str | Path, *, seed: int = 0, max_steps: int | None = None, particles: int = 1024, progress: bool = True
) -> dict[str, float]:
    """Train, infer, write pictures, the flow and the ArviZ summary into a folder.

    Args:
        out: folder, made if missing.
        seed: of everything.
        max_steps: fewer training steps, for a quick look.
        particles: SMC particles, in four islands.
        progress: show progress bars.

    Returns:
        The figures that are printed: R-hat, evidence, errors, seconds.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    check_picture(out / "prior.png")
    train, held_out = digits(seed)
    start = time.perf_counter()
    flow = fit(train, support=constraints.unit_interval, seed=seed, max_steps=max_steps, progress=progress)
    trained = time.perf_counter()
    flow.save(out / "prior.safetensors")
    rows = [("held-out digits", held_out[:10]), ("samples of the prior", flow.sample(10, seed=seed))]
    save_figure(image_rows(rows), out / "prior.png")

    truth = held_out[0]
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[:4] = True
    generator = torch.Generator().manual_seed(seed)
    y = truth[seen] + NOISE * torch.randn(int(seen.sum()), generator=generator)
    smc = SMC(in_painting(flow, seen), particles, seed=seed, progress=progress)
    smc.run(y)
    sampled = time.perf_counter()

    draws = smc.get_samples()["image"]
    observation = torch.full((8, 8), torch.nan)
    observation[seen] = y
    save_figure(posterior_images(observation, draws, truth), out / "posterior.png")
    from ..infer.results.arviz import to_arviz

    data = to_arviz(smc, progress=False)
    summary = smc.summary(var_names=["image"])
    summary.to_csv(out / "summary.csv")
    data.to_netcdf(str(out / "posterior.nc"))
    print(summary.to_string(max_rows=12))
    hidden = ~seen
    figures = {
        "R-hat over islands, worst pixel": float(summary["r_hat"].astype(float).max()),
        "log-evidence": smc.log_evidence,
        "log-evidence standard error": smc.log_evidence_se,
        "RMSE of hidden pixels, posterior mean": _rmse(draws.mean(0)[hidden], truth[hidden]),
        "RMSE of hidden pixels, mean of the training digits": _rmse(train.mean(0)[hidden], truth[hidden]),
        "seconds of training": trained - start,
        "seconds of inference": sampled - trained,
    }
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    print(f"pictures, summary, posterior and flow are in {out}/")
    return figures


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())
