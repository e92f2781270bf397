# %% [markdown]
# # From samples to a posterior in fifteen lines
#
# Two thousand points on two moons are all that we know about a quantity `x`. We want them as the prior of a Bayesian
# model in which the second coordinate of `x` is measured with noise.

# %%
import logging
import os

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import make_moons

import ifpyro

logging.getLogger("arviz").setLevel(logging.ERROR)
SMOKE = os.environ.get("IFPYRO_SMOKE") == "1"
torch.set_num_threads(1)

# %% [markdown]
# ## The fifteen lines

# %%
samples = torch.as_tensor(make_moons(5000, noise=0.05, random_state=0)[0], dtype=torch.float32)

flow = ifpyro.fit(samples, seed=0, max_seconds=3 if SMOKE else 30, progress=False)


def model(y):
    """A prior of two moons, of which the second coordinate is measured."""
    x = pyro.sample("x", flow.prior())
    pyro.sample("y", dist.Normal(x[..., 1], 0.1), obs=y)


smc = ifpyro.SMC(model, num_particles=2048, seed=0, progress=False)
smc.run(torch.tensor(0.3))
posterior = ifpyro.to_arviz(smc, progress=False)
az.summary(posterior, var_names=["x"])

# %% [markdown]
# `x` is the quantity itself; its Gaussian latent is in the same object under the name `x_base`. The chains of the
# summary are independent islands of particles, so R-hat compares answers that were found separately.
#
# ## What happened
#
# The flow carries data to a Gaussian latent and back. On the left the prior, drawn from the flow, over the samples it
# was trained on; on the right the posterior, which has one mode in each arm of the moons that crosses the
# measured height.

# %%
draws = smc.get_samples()["x"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True, layout="constrained")
axes[0].plot(*samples[:2000].T, ".", ms=2, color="0.8", label="samples")
axes[0].plot(*flow.sample(1000, seed=1).T, ".", ms=2, label="drawn from the flow")
axes[0].set_title("prior")
axes[1].plot(*samples[:2000].T, ".", ms=2, color="0.8")
axes[1].plot(*draws[:1000].T, ".", ms=2, color="C1", label="posterior draws")
axes[1].axhspan(0.2, 0.4, alpha=0.15, color="C2", label="measurement ± 1 sd")
axes[1].set_title("posterior")
for axis in axes:
    axis.legend(loc="lower left", fontsize=8)
plt.show()

# %% [markdown]
# ## May the flow be trusted?
#
# Its report holds what was measured on held-out rows: the validation loss beside that of a Gaussian, and the numerical
# errors of the map in units of the data's standard deviations.

# %%
training = flow.report["training"]
print({key: training[key] for key in ("steps", "seconds", "validation_loss", "validation_loss_gaussian")})
print(flow.report["numerics"])

# %% [markdown]
# ## The density, and a file
#
# `log_prob` is exact for the map that is evaluated, and the whole flow goes into one safetensors file.

# %%
flow.save("moons.safetensors")
again = ifpyro.load("moons.safetensors")
print("mean log-density of the samples:", float(again.log_prob(samples[:1000]).mean()))
os.remove("moons.safetensors")
