# %% [markdown]
# # Images
#
# A prior learnt from photographs, and what it is good for: filling a hole, sharpening a blur, each with honest
# uncertainty for every pixel. At the end, somebody else's denoiser becomes a prior without any training of ours.

# %%
import os
import time
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_images

import ifpyro
from ifpyro.calibration import coverage
from ifpyro.flow.networks.images import unet
from ifpyro.training.recipe import Recipe

SMOKE = os.environ.get("IFPYRO_SMOKE") == "1"
SIZE = 8 if SMOKE else 16
torch.set_num_threads(1)

# %% [markdown]
# ## Patches
#
# Two photographs come with scikit-learn. We cut 16 by 16 pixels from the left three quarters of the first to learn
# from; its last quarter is held out, and so is the whole second photograph. A little noise, of standard deviation 0.01
# on a scale from 0 to 1, stands for the camera's, and gives the patches a density.


# %%
def patches(image, count, size, seed):
    """Random squares of an image (height, width, 3) at half its resolution, with grain: (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.nn.functional.avg_pool2d(torch.as_tensor(np.array(image)).movedim(-1, 0).float() / 255, 2)
    windows = half.unfold(1, size, 1).unfold(2, size, 1)
    top = torch.randint(windows.shape[1], (count,), generator=generator)
    left = torch.randint(windows.shape[2], (count,), generator=generator)
    found = windows[:, top, left].movedim(1, 0)
    return found + 0.01 * torch.randn(found.shape, generator=generator)


china, flower = load_sample_images().images
edge = 3 * china.shape[1] // 4
train = patches(china[:, :edge], 1_000 if SMOKE else 30_000, SIZE, seed=0)
validation = patches(china[: china.shape[0] // 2, edge:], 50 if SMOKE else 2_000, SIZE, seed=1)
held_out = patches(china[china.shape[0] // 2 :, edge:], 16, SIZE, seed=2)
elsewhere = patches(flower, 12, SIZE, seed=3)

# %% [markdown]
# ## The prior
#
# A flow of 768 dimensions. A convolutional network sees images; the flow turns its own axes, the principal components,
# into image space and back. The small details of an image turn into noise first, and the broad strokes last.
#
# Training takes minutes. The benchmark trains such a flow on eight photographs
# (`python benchmarks/images_flows.py 16`); it is used here if it is there, otherwise we train five minutes on this one.

# %%
trained = Path("../benchmarks/.cache/images-16.safetensors")
if trained.exists() and not SMOKE:
    flow = ifpyro.load(trained)
else:
    flow = ifpyro.fit(
        train,
        validation=validation,
        schedule=ifpyro.Schedule.details_first(octaves=0.5),
        network=unet((3, SIZE, SIZE), (8,) if SMOKE else (32,), patch=2),
        recipe=Recipe(max_steps=10 if SMOKE else 100_000, batch=64, shared=1, rate=1e-3, patience=100_000),
        max_seconds=300,
        seed=0,
        progress=False,
        tolerance=1e-2,
    )
print({key: flow.report["training"][key] for key in ("rows", "seconds", "validation_loss", "validation_loss_gaussian")})
print(flow.report["numerics"])


def show(rows, columns=12):
    """Rows of patches under captions; what is hidden is pink."""
    _, axes = plt.subplots(len(rows), columns, figsize=(0.8 * columns + 1.6, 0.82 * len(rows)), squeeze=False)
    for line, (caption, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            pixels = image.movedim(0, -1).numpy()
            axis.imshow(np.where(np.isnan(pixels), [0.91, 0.63, 0.63], pixels).clip(0, 1))
        line[0].text(-0.15, 0.5, caption, transform=line[0].transAxes, ha="right", va="center")
    plt.show()


show({"held out": held_out, "flower": elsewhere, "drawn from the flow": flow.sample(12, seed=1)})

# %% [markdown]
# The flow is a Pyro distribution (`flow.prior()`) of 768 dimensions and can stand in any model. A tempered sampler
# would need very many temperatures here, because hundreds of pixels are seen, each narrowly. Where the observation is
# *linear with Gaussian noise*, there is a shorter way: `ifpyro.linear_posterior` adds noise to an image and removes it
# again with the flow's own network, level by level, each time in agreement with what was seen. It takes no gradients,
# and there is nothing to tune. Beyond 32 axes, as here, it is an *approximation*, exact only for a Gaussian flow, and
# its result says so: `draws.exact` is False. (For tables of up to 32 columns its draws are those of the posterior
# itself.)
#
# ## Filling a hole
#
# The central 8 by 8 pixels are hidden, the others seen with noise of standard deviation 0.05. The model is
# `y ~ Normal(A x, 0.05)`, and `A` picks the pixels that are seen.

# %%
NOISE = 0.05
seen = torch.ones(3, SIZE, SIZE, dtype=torch.bool)
seen[:, SIZE // 4 : 3 * SIZE // 4, SIZE // 4 : 3 * SIZE // 4] = False
pick = torch.eye(seen.numel())[seen.flatten()]


def observe(images, operator, seed=0):
    """Images through an operator, with noise."""
    clean = images.flatten(1) @ operator.T
    return clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def draw(flow, operator, y):
    """Sixteen images for every observation."""
    start = time.perf_counter()
    options = {"draws": 2, "sweeps": 1, "ratio": 0.5} if SMOKE else {"draws": 16}
    draws = ifpyro.linear_posterior(flow, operator, y, NOISE, seed=1, progress=False, **options)
    print(f"{time.perf_counter() - start:.0f} s for {len(y)} observations")
    return draws


def with_holes(y, seen):
    """Seen pixels at their places, NaN elsewhere."""
    images = torch.full((len(y), seen.numel()), torch.nan)
    images[:, seen.flatten()] = y
    return images.view(-1, *seen.shape)


def show_posterior(truth, observed, draws):
    """Truth, observation, and what the draws say."""
    show(
        {
            "truth": truth,
            "seen": observed,
            "posterior mean": draws.mean(1),
            "a draw": draws[:, 0],
            "another": draws[:, 1],
            "sd, 5 times": 5 * draws.std(1),
        }
    )


truth = held_out[:2] if SMOKE else held_out
y = observe(truth, pick)
filled = draw(flow, pick, y)
show_posterior(truth, with_holes(y, seen), filled)

# %% [markdown]
# Edges are continued into the hole; where the surroundings do not say, draws differ and the standard deviation is
# large. Are the intervals right? Of the hidden pixels, 90% should lie in their 90% interval. (Pixels of a patch depend
# on each other, so the standard error is over patches.)

# %%
hidden = ~seen.flatten()
print(coverage(truth.flatten(1)[:, hidden].numpy(), filled.flatten(2)[..., hidden].numpy()))

# %% [markdown]
# ## Sharpening a blur
#
# Now `A` is a Gaussian blur of 1.5 pixels, with the same noise: all is seen, but nothing clearly.

# %%
line = torch.exp(-0.5 * ((torch.arange(SIZE)[:, None] - torch.arange(SIZE)) / 1.5).square())
line = line / line.sum(1, keepdim=True)
blur = torch.block_diag(*[torch.kron(line, line)] * 3)
y = observe(truth, blur)
sharp = draw(flow, blur, y)
show_posterior(truth, y.view_as(truth), sharp)
print(coverage(truth.flatten(1).numpy(), sharp.flatten(2).numpy()))

# %% [markdown]
# ## A denoiser of somebody else's
#
# Many people have a network that removes noise, and every such network is a prior. Here is one in plain PyTorch,
# trained as such networks are (Karras et al. 2022): it is shown patches with noise of a known size, and returns them
# without. To be quick, it is small, and the patches are 8 by 8.

# %%
small = patches(china[:, :edge], 400 if SMOKE else 30_000, 8, seed=4)
SD = float(small.std())


class Denoiser(torch.nn.Module):
    """``D(x; sigma)``, five convolutions."""

    def __init__(self, width=48):
        super().__init__()
        sizes = [4, width, width, width, width, 3]
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))

    def forward(self, image, sigma):
        """Images without noise."""
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = (sigma**2 + SD**2).sqrt()
        centred = image - 0.5
        h = torch.cat([centred / total, sigma.log().div(4).expand_as(image[:, :1])], 1)
        for layer in self.layers[:-1]:
            h = torch.nn.functional.silu(layer(h))
        return 0.5 + (SD / total) ** 2 * centred + sigma * SD / total * self.layers[-1](h)


torch.manual_seed(0)
denoiser = Denoiser()
optimiser = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
steps = 5 if SMOKE else 4_000
annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
for _ in range(steps):
    x = small[torch.randint(len(small), (64,))]
    sigma = torch.exp(1.8 * torch.randn(64) - 1.7)
    error = denoiser(x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x), sigma) - x
    loss = (error.square().mean((1, 2, 3)) * (sigma**2 + SD**2) / (sigma * SD) ** 2).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    annealing.step()

# %% [markdown]
# `from_denoiser` makes it a flow: nothing is trained, the weights stay where they are. The samples give the flow its
# axes and tune its solver. Networks that predict noise (DDPM) or velocities, and pipelines of the diffusers library,
# work the same way.
#
# The report compares the network's error at five noise levels with that of a Gaussian. A few convolutions, trained for
# a minute or two, do not see a patch as a whole, and are hardly better where the noise is large; a real denoiser is.

# %%
borrowed = ifpyro.from_denoiser(denoiser, (0.002, 20.0), samples=small[: 200 if SMOKE else 1_000], tolerance=1e-2)
print(borrowed)
print(borrowed.report["denoiser"])
others = patches(china[china.shape[0] // 2 :, edge:], 12, 8, seed=5)
print("round trip", float((borrowed.decode(borrowed.encode(others)) - others).square().mean().sqrt()))

seen = torch.ones(3, 8, 8, dtype=torch.bool)
seen[:, :, 4:] = False
pick = torch.eye(seen.numel())[seen.flatten()]
y = observe(others, pick)
filled = draw(borrowed, pick, y)
show(
    {
        "held out": others,
        "its prior": borrowed.sample(12, seed=1),
        "left half seen": with_holes(y, seen),
        "posterior mean": filled.mean(1),
        "a draw": filled[:, 0],
        "another": filled[:, 1],
    }
)

# %% [markdown]
# ## Where to go from here
#
# * Other observations, such as counts, saturation or an unknown blur, are ordinary Pyro models with `flow.prior()` in
#   them ([posteriors](02_posteriors.ipynb)); keep the dimension moderate, or the noise large.
# * Numbers for these patches, against the exact posterior of a Gaussian prior, are in
#   [benchmarks/images.md](../benchmarks/images.md).
