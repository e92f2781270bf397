# %% [markdown]
# # What a latent means
#
# A flow sorts the axes of the data by variance and turns them into noise, each on its own schedule. The latents all
# have unit variance, so nothing in them says which matter. The *schedule* decides that: this page shows how, on a
# curve whose flow is known exactly and on scanned digits, and then infers in a few latents instead of all.

# %%
import math
import os
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, constraints

import ifpyro
from ifpyro import InflationaryFlow, Schedule
from ifpyro.cli import demo
from ifpyro.flow.reconstruction import lost
from ifpyro.flow.solver.grid import Grid

SMOKE = os.environ.get("IFPYRO_SMOKE") == "1"
torch.set_num_threads(1)
plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## A curve in the plane
#
# The data lie along a parabola: 24 short Gaussians, so that the velocity of the flow is known and no network is
# involved. Position along the parabola is one number. Does the first latent hold it?

# %%
u = Normal(0.0, 1.0).icdf((torch.arange(24, dtype=torch.double) + 0.5) / 24)
means = torch.stack([2 * u, 0.35 * (u.square() - 1)], -1)
along = torch.stack([torch.full_like(u, 0.5), 0.175 * u], -1)
covariances = 0.2 * along[:, :, None] * along[:, None, :] + 0.03**2 * torch.eye(2)
weights = torch.full((24,), 1 / 24, dtype=torch.double)
torch.manual_seed(0)
points = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances)).sample((200,))

SCHEDULES = {
    "reducing (the paper's order)": Schedule.reducing(keep=1, gap=1.0),
    "preserving": Schedule.preserving(),
    "details first, p = 1": Schedule.details_first(1.0),
    "details first, p = 2": Schedule.details_first(2.0),
}


def draw_first_latent(schedules, points):
    """Above, the angles of both axes over time; below, the data coloured by their first latent.

    Black is what the first latent alone decodes to, the second at its mean.
    """
    figure, axes = plt.subplots(
        2, len(schedules), figsize=(3.1 * len(schedules), 4.6), height_ratios=(1, 1.6), layout="constrained"
    )
    t = torch.linspace(0, 1, 101, dtype=torch.double)
    for (upper, lower), (name, schedule) in zip(axes.T, schedules.items(), strict=True):
        flow = InflationaryFlow.from_gaussian_mixture(weights, means, covariances, schedule=schedule, grid=Grid(24))
        upper.plot(t, flow.angles(t) / (math.pi / 2), label=["long axis", "short axis"])
        upper.set_title(name, fontsize=10)
        upper.set_xlabel("time", fontsize=8)
        with torch.no_grad():
            z = flow.encode(points)
            line = flow.decoder(1)(torch.linspace(-2.2, 2.2, 200, dtype=torch.double)[:, None])
        ours, theirs, total = lost(flow, points, points, [1])
        lower.scatter(*points.T, c=z[:, 0], cmap="coolwarm", vmin=-2.5, vmax=2.5, s=9)
        lower.plot(*line.T, color="black", lw=2)
        lower.set_xlim(-5.5, 5.5)
        lower.set_ylim(-0.9, 2.2)
        lower.set_xticks([])
        lower.set_yticks([])
        share = 100 * float(ours.sum() / total.sum())
        lower.set_title(f"loses {share:.1f}% (PCA {100 * float(theirs.sum() / total.sum()):.1f}%)", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].set_ylabel("angle / 90°", fontsize=8)
    return figure


draw_first_latent(SCHEDULES, points[:20] if SMOKE else points)
plt.show()

# %% [markdown]
# Generation runs from right to left: at the end of time both axes are noise, and the axis whose angle leaves 90° first
# is made first, out of its own latent alone. The other is then made *given* it.
#
# * In the reducing order the short axis is made first. It holds the height of the parabola, so when the long axis is
#   made all that is left to say is left or right, and how far within the thickness of the line: the first latent is
#   Gaussian *given the height*. Its colours repeat along the curve, and alone it reconstructs a short piece.
# * When the details inflate first, they are made last. The long axis comes out of the first latent alone, and the
#   height follows from it: one latent holds the whole curve, which no straight line does.
# * The exponent `p` says how far apart in time the axes are kept. With `p = 0` (preserving) they are made together.
#
# `ifpyro.fit` takes `p = 1` unless told otherwise: the same noise on every axis. A larger `p` says more with few
# latents, at a price in likelihood; [benchmarks/paper.md](../benchmarks/paper.md) has the figures.
#
# ## Digits
#
# The same on 8 by 8 images, whose flow works on the logits of the pixels. It is trained with `details_first(2)`;
# `flow.decoder(k)` is the map from `k` latents, and knows the share of the pixels' variance that it loses, measured by
# `fit` on the validation rows.

# %%
train, held_out = demo.digits(seed=0)
flow = ifpyro.fit(
    train,
    schedule=Schedule.details_first(2.0),
    support=constraints.unit_interval,
    seed=0,
    max_steps=100 if SMOKE else None,
    progress=False,
)
print("latents   lost   PCA")
for k in (1, 2, 4, 8, 16, 32):
    decoder = flow.decoder(k)
    print(f"{k:7} {decoder.reconstruction_error:6.3f} {decoder.pca_error:6.3f}")


# %%
def show_rows(rows):
    """Rows of images under captions."""
    columns = max(len(images) for _, images in rows)
    _, axes = plt.subplots(len(rows), columns, figsize=(0.75 * columns + 1.6, 0.8 * len(rows)), squeeze=False)
    for line, (caption, images) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, cmap=plt.get_cmap("gray_r").with_extremes(bad="#e8a0a0"), vmin=0, vmax=1)
        line[0].text(-0.15, 0.5, caption, transform=line[0].transAxes, ha="right", va="center")
    plt.show()


def by_principal_components(x, k):
    """The digits as their first k principal components leave them."""
    rows, mean = train.flatten(1), train.flatten(1).mean(0)
    axes = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:k]
    return (mean + (x.flatten(1) - mean) @ axes.T @ axes).reshape(x.shape)


shown = held_out[:10]
rows = [("held out", shown)]
for k in (4, 16):
    decoder = flow.decoder(k)
    rows += [(f"{k} latents", decoder(decoder.encode(shown))), (f"{k} components", by_principal_components(shown, k))]
show_rows(rows)

# %% [markdown]
# A principal component is a picture that is added or not; what a latent adds depends on the latents before it, so a few
# latents make strokes where as many components make clouds.
#
# ## Inference in a few latents
#
# A decoder is a surface of `k` dimensions in the space of images. It has no density there, so it is no prior
# distribution of an image, but it can stand inside a model, on a Gaussian of `k` latents. What the surface cannot
# reach is an error of the model, of known size: its variance a pixel is the price, and belongs into the noise.

# %%
NOISE, K = 0.1, 16
seen = torch.zeros(8, 8, dtype=torch.bool)
seen[:4] = True
pixels = seen.flatten().nonzero().flatten()
truth = held_out[0]
y = truth[seen] + NOISE * torch.randn(32, generator=torch.Generator().manual_seed(0))

decoder = flow.decoder(K)
left_out = math.sqrt(decoder.reconstruction_error * float(train.var(0).mean()))
print(f"noise {NOISE}, standard deviation of a pixel left out by {K} latents {left_out:.3f}")


def in_all_latents(y):
    """The upper half of an image, seen with noise."""
    image = pyro.sample("image", flow.prior())
    pyro.sample("y", dist.Normal(image.flatten(-2)[..., pixels], NOISE).to_event(1), obs=y)


def in_k_latents(y):
    """The same, on the surface of K latents."""
    z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    image = pyro.deterministic("image", decoder(z), event_dim=2)
    noise = math.hypot(NOISE, left_out)
    pyro.sample("y", dist.Normal(image.flatten(-2)[..., pixels], noise).to_event(1), obs=y)


draws = {}
for name, model in (("all 64 latents", in_all_latents), (f"{K} latents", in_k_latents)):
    start = time.process_time()
    smc = ifpyro.SMC(model, num_particles=64 if SMOKE else 512, seed=0, progress=False).run(y)
    draws[name] = smc.get_samples()["image"].reshape(-1, 8, 8)
    print(f"{name}: {time.process_time() - start:.0f} processor seconds, log-evidence {smc.log_evidence:.1f}")
    error = (draws[name].mean(0) - truth)[~seen].square().mean().sqrt()
    print(f"  hidden pixels: error of the mean {error:.3f}, posterior sd {draws[name].std(0)[~seen].mean():.3f}")

# %%
observation = torch.full((8, 8), torch.nan)
observation[seen] = y
show_rows(
    [("observed, truth", [observation, truth])]
    + [(name, torch.cat([x.mean(0)[None], x[torch.linspace(0, len(x) - 1, 9).long()]])) for name, x in draws.items()]
)
