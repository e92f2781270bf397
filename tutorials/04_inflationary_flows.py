# %% [markdown]
# # Inflationary flows: the paper's story, retold
#
# An inflationary flow (de Albuquerque & Pearson, NeurIPS 2024, [arXiv 2407.08843](https://arxiv.org/abs/2407.08843))
# adds noise to data until nothing else is left, and follows the *deterministic* flow that has the same densities at
# every moment. Data go to a Gaussian latent and back, each point along one path. How fast noise grows on each
# principal axis is a choice: grow it in proportion everywhere, and the dimension of the data is *preserved*; let it
# outgrow the rest on `K` axes, and everything but a line or a plane is *reduced* away.
#
# This page runs both flows on the paper's five toy sets, whose densities are known exactly here. The flows below are
# trained for seconds; figures of flows that were trained for a minute, beside those of the paper's reference code,
# are in [benchmarks/paper.md](../benchmarks/paper.md).

# %%
import logging
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from sklearn.manifold import trustworthiness

import ifpyro
from ifpyro import Schedule
from ifpyro.checks.residuals import accumulated, mixture_velocity, network_residuals, path_errors
from ifpyro.data import datasets
from ifpyro.flow.tuning import measure

logging.getLogger("matplotlib").setLevel(logging.ERROR)
SMOKE = os.environ.get("IFPYRO_SMOKE") == "1"
STEPS, ROWS = (30, 1_000) if SMOKE else (2_500, 50_000)
torch.set_num_threads(1)
plt.rcParams["figure.dpi"] = 72

# %% [markdown]
# ## Five sets
#
# Noisy circles, a sine with hard edges, moons, and in space the S-curve and the swirl, all at unit variance. Colour
# marks the place along the curve and follows every point through the pages of this notebook.

# %%
NAMES = ("circles", "sine", "moons", "S-curve", "swirl")
sets = datasets.paper()
held_out = {name: sets[name].sample(300 if SMOKE else 1_500, seed=2) for name in NAMES}


def colours(name):
    """A number for every held-out point that varies along its curve."""
    x = held_out[name]
    first, second = x[:, 0], x[:, -1]
    return first if name == "sine" else torch.atan2(second, first) if name != "swirl" else (first**2 + second**2).sqrt()


def scatter(axis, points, **style):
    """Points of the plane as they are, points of space in an oblique view."""
    if points.shape[1] == 3:
        points = points @ torch.tensor([[1.0, 0.0], [0.3, 0.12], [0.0, 1.0]])
    axis.scatter(*points.T, **{"s": 2, "linewidths": 0, "cmap": "viridis" if "c" in style else None, **style})
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_aspect("equal")


figure, axes = plt.subplots(1, 5, figsize=(11, 2.4), layout="constrained")
for axis, name in zip(axes, NAMES, strict=True):
    scatter(axis, held_out[name], c=colours(name))
    axis.set_title(f"{name}\nexact log-density {float(sets[name].log_prob(held_out[name]).mean()):.3f}", fontsize=9)
plt.show()

# %% [markdown]
# ## Two schedules
#
# On principal axis `j`, with standard deviation `s_j`, noise of variance `C_jj(t)` is added. The paper's two choices:
#
# * preserving: `C_jj` proportional to `s_j^2`, so that every axis has lost the same share of its signal at every
#   moment;
# * reducing: `C_jj = gamma_0 exp(rho (1 + g_j) t)` with a larger `g` on the `K` axes that are kept.
#
# Here both are angles, `theta_j = arctan(sqrt(C_jj)/s_j)`, from 0 (data) to a right angle (noise), and the network
# regresses one bounded target at every angle. The paper lets the noise of the other axes stand still (`g = -1` in the
# plane) or shrink (`g = -2` in space), so that they are never Gaussian; here they grow too, only later (`gap` < 2),
# and *all* latents end as standard normal variables.

# %%
flows = {}
for name in NAMES:
    x = sets[name].sample(ROWS, seed=1)
    options = {"max_steps": STEPS, "seed": 0, "progress": False}
    flows[name, "preserving"] = ifpyro.fit(x, schedule=Schedule.preserving(), **options)
    flows[name, "reducing"] = ifpyro.fit(x, schedule=Schedule.reducing(sets[name].dim - 1), **options)
print(flows["moons", "reducing"].schedule)

# %% [markdown]
# ## Inflation
#
# `flow.trajectory` follows points through the paper's rescaled coordinates on the principal axes (hence the tilt),
# which undo the growth of the *leading* axis. A preserving flow keeps the variance of every axis, and turns the shape
# into a Gaussian ball or ellipse. In a reducing flow the other axis lags behind, and is squeezed flat: a line in the
# plane, a plane in space (seen obliquely).

# %%
MOMENTS = (0.0, 0.1, 0.25, 0.5, 1.0)


def inflate(name, kind, steps=32):
    """Times and rescaled positions of the held-out points."""
    with torch.no_grad():
        return flows[name, kind].trajectory(held_out[name], steps=8 if SMOKE else steps)


for kind in ("preserving", "reducing"):
    figure, axes = plt.subplots(5, 5, figsize=(9, 9), layout="constrained", sharex="row", sharey="row")
    for row, name in zip(axes, NAMES, strict=True):
        times, path = inflate(name, kind)
        for axis, moment in zip(row, MOMENTS, strict=True):
            scatter(axis, path[int((times - moment).abs().argmin())], c=colours(name))
        row[0].set_ylabel(name)
    for axis, moment in zip(axes[0], MOMENTS, strict=True):
        axis.set_title(f"t = {moment:g}", fontsize=9)
    figure.suptitle(kind)
    plt.show()

# %% [markdown]
# ## The dimension, measured
#
# The paper measures dimension by the participation ratio `PR = (sum of variances)^2 / (sum of squared variances)`.
# For any schedule it has a closed form, since the covariance of the noised data is known:
# `flow.participation_ratio(t)` (lines). The points along their paths follow it (dots): constant in preserving flows,
# down to `K` in reducing ones.


# %%
def participation_ratio(points):
    """``(tr C)^2 / tr C^2`` of the covariance of points."""
    covariance = torch.cov(points.T)
    return float(covariance.trace() ** 2 / covariance.square().sum())


figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
fine = torch.linspace(0, 1, 200, dtype=torch.double)
for axis, kind in zip(axes, ("preserving", "reducing"), strict=True):
    for k, name in enumerate(NAMES):
        times, path = inflate(name, kind)
        axis.plot(fine, flows[name, kind].participation_ratio(fine), color=f"C{k}", label=name)
        axis.plot(times, [participation_ratio(points) for points in path], ".", color=f"C{k}")
    axis.set_title(kind)
    axis.set_xlabel("t")
axes[0].set_ylabel("participation ratio")
axes[1].legend(fontsize=8)
plt.show()
for name in NAMES:
    print(f"{name:8s} sd of the axes at the end, reducing:", inflate(name, "reducing")[1][-1].std(0).numpy().round(5))

# %% [markdown]
# ## Generation, and what it costs
#
# The same flow run backwards turns normal draws into data. Below, each flow's evaluations of the network for one
# solve, its round trip `decode(encode(x)) - x` in standard deviations, and the mean held-out log-likelihood below the
# exact value. The reference code takes 701 to 1501 Euler steps on these sets. The round trip closes to rounding
# because `encode` inverts the discrete map that `decode` computes, not only the equation, and solves the few points
# between separated pieces, where the flow tears open a gap, by Newton's method.

# %%
figure, axes = plt.subplots(2, 5, figsize=(11, 4.4), layout="constrained")
print(f"{'set':9s}{'flow':12s}{'evaluations':>12s}{'round trip':>12s}{'nats below exact':>18s}")
for row, kind in zip(axes, ("preserving", "reducing"), strict=True):
    row[0].set_ylabel(kind)
    for axis, name in zip(row, NAMES, strict=True):
        flow, x = flows[name, kind], held_out[name]
        with torch.no_grad():
            gap = float((sets[name].log_prob(x) - flow.log_prob(x)).mean())
        found = measure(flow, x)
        print(f"{name:9s}{kind:12s}{found['evaluations']:12d}{found['round_trip_rmse']:12.0e}{gap:18.3f}")
        scatter(axis, flow.sample(len(x), seed=3), color="C1")
        axis.set_title(name, fontsize=9)
figure.suptitle("drawn from the flows")
plt.show()

# %% [markdown]
# ## Moving pictures
#
# A preserving flow on the moons and a reducing one on the S-curve, there and back.
#
# ![The moons become a Gaussian ellipse, and moons again](pictures/preserving.gif)
# ![The S-curve is squeezed into a plane, and comes back](pictures/reducing.gif)

# %%
FOLDER = Path(tempfile.mkdtemp()) if SMOKE else Path("pictures")


def animate(name, kind, file, frames=18):
    """A GIF of inflation and generation in the paper's rescaled coordinates."""
    _, path = inflate(name, kind, steps=64)
    last = len(path) - 1
    forth = np.unique((np.linspace(0, 1, 4 if SMOKE else frames) ** 1.3 * last).astype(int))
    order = [0] * 4 + list(forth) + [last] * 4 + list(forth[::-1])
    points = path[:, :800].numpy()
    space = points.shape[-1] == 3
    figure = plt.figure(figsize=(3.4, 3.4), dpi=80)
    axis = figure.add_subplot(projection="3d" if space else None)
    if space:
        axis.view_init(elev=12, azim=-75)
    dots = axis.scatter(*points[0].T, c=colours(name)[:800], s=4, cmap="viridis", linewidths=0)
    for setter in (axis.set_xlim, axis.set_ylim, *((axis.set_zlim,) if space else ())):
        setter(-2.6, 2.6)
    axis.set_title(f"{name}, {kind}", fontsize=9)

    def draw(k):
        if space:
            dots._offsets3d = points[k].T
        else:
            dots.set_offsets(points[k])
        return (dots,)

    FOLDER.mkdir(exist_ok=True)
    FuncAnimation(figure, draw, frames=order).save(FOLDER / file, PillowWriter(fps=12))
    plt.close(figure)


animate("moons", "preserving", "preserving.gif")
animate("S-curve", "reducing", "reducing.gif")

# %% [markdown]
# ## What a latent means
#
# After a reducing flow the data lie on a line, so is the first latent all one needs? The sine, in its own units and
# with little noise, is nearly a curve: one number holds almost everything. Below, the first latent is decoded alone,
# the other at its mean, zero. Each red curve is what one latent can say.
#
# In the reducing order the kept axis turns to noise *first*. What it ends as was Gaussianised while the other axis
# was still fully visible, that is, conditionally on it: the kept latent is only the rank of a point among its peers
# at the same height, and alone says little. *Details first* (ours: axes of small variance inflate earlier) does the
# opposite. The small axis is Gaussianised given the large one, and the large one keeps its own shape until the end.
#
# `ifpyro.fit` uses `Schedule.details_first()` unless told otherwise, with the same noise on every axis (`power=1`): in
# [benchmarks/paper.md](../benchmarks/paper.md) it reconstructs tables and pixels from few latents better than the
# paper's two schedules (but in logits the reducing order is ahead for up to eight latents, and on wine for eight).
# [What a latent means](06_what_a_latent_means.ipynb) goes on from here.

# %%
wave = datasets.sine(noise=0.05)
x = wave.sample(300 if SMOKE else 1_500, seed=2)
figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained", sharex=True, sharey=True)
schedules = (Schedule.reducing(1), Schedule.preserving(), Schedule.details_first(power=3.0))
for axis, name, schedule in zip(axes, ("reducing", "preserving", "details first, p = 3"), schedules, strict=True):
    flow = ifpyro.fit(wave.sample(ROWS, seed=1), schedule=schedule, **options)
    with torch.no_grad():
        along = flow.decoder(1)(torch.linspace(-2.5, 2.5, 400).unsqueeze(1))
        back = flow.decoder(1)(flow.encode(x)[:, :1])
    error = float((back - x).square().sum() / (x - x.mean(0)).square().sum())
    axis.plot(*x.T, ".", ms=1.5, color="0.8")
    axis.plot(*along.T, color="C3")
    axis.set_title(f"{name}: {100 * error:.1f}% of the variance lost", fontsize=9)
plt.show()
spread = torch.linalg.eigvalsh(torch.cov(x.T))
print(f"lost by the first principal component: {100 * float(spread[0] / spread.sum()):.1f}%")

# %% [markdown]
# ## Do errors add up?
#
# A network is never exact. The paper's appendix C.3 noises data afresh at every time, correlates the network's
# residuals of two times, finds no strong correlation, and takes errors to be noise that cancels along the flow. For
# moons the exact velocity is known, so the argument can be tested. Left: the paper's correlations. Middle: those of
# the *exact* velocity, whose error is zero. They look the same, because a residual is mostly what no network could
# know. Right: the correlation of the true error along the flow's own paths. It lasts: neighbouring moments err alike,
# distant ones less.

# %%
flow, x = flows["moons", "preserving"], held_out["moons"][:500]
exact = mixture_velocity(flow, *sets["moons"].mixture())
truth = ifpyro.InflationaryFlow(flow.basis, flow.schedule, exact.float(), grid=flow.grid)
errors = path_errors(flow, exact, x, steps=8 if SMOKE else 48)
panels = {
    "residuals, network": network_residuals(flow, x, errors.times, seed=0),
    "residuals, exact velocity": network_residuals(truth, x, errors.times, seed=0),
    "errors along paths": errors,
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), layout="constrained")
for axis, (title, found) in zip(axes, panels.items(), strict=True):
    shown = axis.pcolormesh(found.times, found.times, found.autocorrelation(), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.set_aspect("equal")
figure.colorbar(shown, ax=axes, shrink=0.8)
plt.show()
print(accumulated(flow, errors))
with torch.no_grad():
    print("the latent is off by", float((flow.encode(x) - truth.encode(x)).square().mean().sqrt()))

# %% [markdown]
# What errors come to is thus best asked of the flow as a whole: its latents on held-out data should be normal, and
# its log-density near the truth. `accumulated` says how much of the error cancelled; with data of unknown density,
# the network of a second training serves as the reference.
#
# ## Who stays near whom
#
# Trustworthiness asks whether neighbours in the latent were neighbours in the data, continuity the reverse (10
# neighbours; 1 is best). A flow in full dimension is smooth both ways. With the last latent left out, what was
# squeezed away is lost.

# %%
print(f"{'set':9s}{'flow':13s}{'latents':>8s}{'trustworthiness':>17s}{'continuity':>12s}")
for name in ("moons", "S-curve", "swirl"):
    for kind in ("preserving", "reducing"):
        x = held_out[name][:500]
        with torch.no_grad():
            z = flows[name, kind].encode(x)
        for k in (z.shape[1], z.shape[1] - 1):
            near = [trustworthiness(a, b, n_neighbors=10) for a, b in ((x, z[:, :k]), (z[:, :k], x))]
            print(f"{name:9s}{kind:13s}{k:8d}{near[0]:17.3f}{near[1]:12.3f}")
