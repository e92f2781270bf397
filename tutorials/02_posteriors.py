# %% [markdown]
# # Posteriors through a flow
#
# Half of a scanned digit is hidden and the other half is noisy. What was the digit? The prior is a flow trained on
# 1,437 scanned digits, 8 by 8 pixels; the posterior has several modes, since the visible half fits more than one
# digit. This page samples it in three ways, and uses the evidence to choose between two models of the noise.

# %%
import logging
import os
import time
import warnings

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.distributions import constraints

import ifpyro
from ifpyro.cli import demo

logging.getLogger("arviz").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)
SMOKE = os.environ.get("IFPYRO_SMOKE") == "1"
torch.set_num_threads(1)

# %% [markdown]
# ## The prior
#
# Pixels are in (0, 1), so the flow is trained with `support=unit_interval`. The upper row shows digits it has not
# seen, the lower row its own.

# %%
train, held_out = demo.digits(seed=0)
flow = ifpyro.fit(train, support=constraints.unit_interval, seed=0, max_steps=300 if SMOKE else None, progress=False)


def show_rows(rows):
    """Rows of images under captions."""
    columns = max(len(images) for _, images in rows)
    _, axes = plt.subplots(len(rows), columns, figsize=(0.85 * columns + 1.6, 0.95 * len(rows)), squeeze=False)
    for line, (caption, images) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            masked = np.ma.masked_invalid(np.asarray(image))
            axis.imshow(masked, cmap=plt.get_cmap("gray_r").with_extremes(bad="#e8a0a0"), vmin=0, vmax=1)
        line[0].text(-0.15, 0.5, caption, transform=line[0].transAxes, ha="right", va="center")
    plt.show()


show_rows([("held out", held_out[:10]), ("drawn from the flow", flow.sample(10, seed=1))])

# %% [markdown]
# ## The model and the data
#
# Plain Pyro: the image has the flow as its prior, and the upper half is seen with noise.

# %%
NOISE = 0.1
seen = torch.zeros(8, 8, dtype=torch.bool)
seen[:4] = True
pixels = seen.flatten().nonzero().flatten()


def model(y):
    """Noisy upper half of an image."""
    image = pyro.sample("image", flow.prior())
    pyro.sample("y", dist.Normal(image.flatten(-2)[..., pixels], NOISE).to_event(1), obs=y)


truth = held_out[0]
y = truth[seen] + NOISE * torch.randn(int(seen.sum()), generator=torch.Generator().manual_seed(0))
observation = torch.full((8, 8), torch.nan)
observation[seen] = y

# %% [markdown]
# ## Tempered SMC
#
# The prior can be drawn from exactly, so particles start there, and the likelihood is switched on step by step.
# Particles live in four islands that never exchange particles: they serve as chains for R-hat, and the spread of
# their evidences gives its standard error.

# %%
start = time.perf_counter()
smc = ifpyro.SMC(model, num_particles=256 if SMOKE else 1024, seed=0, progress=False)
smc.run(y)
print(f"{time.perf_counter() - start:.0f} s")
summary = smc.summary(var_names=["image"])
print("worst R-hat of a pixel:", float(summary["r_hat"].astype(float).max()))
print(f"log-evidence: {smc.log_evidence:.2f} ± {smc.log_evidence_se:.2f}")
print("of the islands:", [round(float(v), 2) for v in smc.island_log_evidence])

# %%
draws = smc.get_samples()["image"]
show_rows(
    [
        ("observed, truth", torch.stack([observation, truth])),
        ("posterior mean, sd × 3", torch.stack([draws.mean(0), 3 * draws.std(0)])),
        ("ten draws", draws[torch.linspace(0, len(draws) - 1, 10).long()]),
    ]
)

# %% [markdown]
# Each draw is a whole digit that agrees with the visible half; the mean is none of them. To count the modes, let a
# classifier name every draw.

# %%
scans = load_digits()
classifier = LogisticRegression(max_iter=1000).fit(scans.data / 17, scans.target)


def shares(images):
    """Percent of images in each class of digits."""
    labels = classifier.predict(images.reshape(len(images), 64).numpy())
    return np.round(100 * np.bincount(labels, minlength=10) / len(labels)).astype(int)


print("the truth is a", classifier.predict(truth.reshape(1, 64).numpy())[0])
print("percent of draws per class 0 to 9:", shares(draws))

# %% [markdown]
# ## HMC, started from the particles
#
# Chains that start apart can take long to find each other's modes in 64 dimensions. `MCMC` therefore starts them from
# a short SMC pass, in which each mode holds its share of the particles. All 64 chains run in one batch.

# %%
start = time.perf_counter()
mcmc = ifpyro.MCMC(
    ifpyro.HMC(model), num_samples=20 if SMOKE else 200, warmup_steps=20 if SMOKE else 100, seed=0, progress=False
)
mcmc.run(y)
print(f"{time.perf_counter() - start:.0f} s")
chains = mcmc.get_samples(group_by_chain=True)["image"]
print("percent per class, SMC:      ", shares(draws))
print("percent per class, first HMC draw:", shares(chains[:, 0]))
print("percent per class, HMC:      ", shares(chains.flatten(0, 1)))

# %%
hmc_draws = chains.flatten(0, 1)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for axis, name, of in zip(axes, ("mean", "sd"), (lambda x: x.mean(0), lambda x: x.std(0)), strict=True):
    axis.plot(of(draws).flatten(), of(hmc_draws).flatten(), ".")
    low, high = float(of(draws).min()), float(of(draws).max())
    axis.plot([low, high], [low, high], color="0.6", lw=1)
    axis.set_xlabel(f"{name} of a pixel, SMC")
    axis.set_ylabel("the same, HMC")
plt.show()

# %% [markdown]
# Both go to ArviZ. Below are the pixels with the largest R-hat: it compares single chains, each of which must visit
# the modes in their right proportions.

# %%
posterior = ifpyro.to_arviz(mcmc, progress=False)
az.summary(posterior, var_names=["image"]).sort_values("r_hat").tail(4)

# %% [markdown]
# ## SVI against HMC
#
# `ifpyro.reparam(model)` hands the Gaussian latent to Pyro's guides. A mean-field Gaussian on 64 latents is quick,
# but it is one Gaussian: it concentrates on the largest mode, and its hidden pixels vary less. The ELBO is a lower
# bound on the log-evidence, and the gap between the two is the divergence of the guide from the posterior, in nats.

# %%
pyro.clear_param_store()
pyro.set_rng_seed(0)
start = time.perf_counter()
latent_model = ifpyro.reparam(model)
guide = AutoNormal(latent_model, init_scale=0.3)
svi = SVI(
    latent_model, guide, pyro.optim.ClippedAdam({"lr": 0.02}), Trace_ELBO(num_particles=8, vectorize_particles=True)
)
losses = [svi.step(y) for _ in range(30 if SMOKE else 600)]
print(
    f"{time.perf_counter() - start:.0f} s, ELBO {-np.mean(losses[-50:]):.2f}, SMC's log-evidence {smc.log_evidence:.2f}"
)
with torch.no_grad():
    svi_draws = flow.decode(torch.stack([guide(y)["image_base"] for _ in range(500)]))
print("percent per class, SVI:", shares(svi_draws))
print("percent per class, HMC:", shares(hmc_draws))

# %%
pick = torch.linspace(0, len(hmc_draws) - 1, 10).long()
show_rows([("HMC", hmc_draws[pick]), ("SVI", svi_draws[:10])])
for name, images in (("HMC", hmc_draws), ("SVI", svi_draws)):
    print(f"{name}: mean sd of the hidden pixels {float(images.std(0)[~seen].mean()):.3f}")

# %% [markdown]
# ## Evidence: which noise was it?
#
# The evidence comes with every SMC run, so models of the observation can be compared. Put ink on two pixels of the
# left margin, where digits have none, and ask whether the noise is normal, or Student's with heavy tails. Both have
# the same scale.


# %%
def heavy(y):
    """The same image, with noise whose tails are heavy."""
    image = pyro.sample("image", flow.prior())
    pyro.sample("y", dist.StudentT(2.0, image.flatten(-2)[..., pixels], NOISE).to_event(1), obs=y)


spoilt = y.clone()
spoilt[torch.tensor([0, 16])] = 0.6
runs = {}
for data_name, data in (("clean", y), ("two wrong pixels", spoilt)):
    for model_name, candidate in (("normal", model), ("Student's t", heavy)):
        run = ifpyro.SMC(candidate, num_particles=128 if SMOKE else 512, seed=1, progress=False)
        runs[data_name, model_name] = run.run(data)
        print(f"{data_name:16} {model_name:12} log-evidence {run.log_evidence:7.2f} ± {run.log_evidence_se:.2f}")

# %%
bad = torch.full((8, 8), torch.nan)
bad[seen] = spoilt
show_rows(
    [("observed, truth", torch.stack([bad, truth]))]
    + [
        (f"{name}: mean, draws", torch.cat([x.mean(0)[None], x[torch.linspace(0, len(x) - 1, 7).long()]]))
        for name in ("normal", "Student's t")
        for x in [runs["two wrong pixels", name].get_samples()["image"]]
    ]
)
