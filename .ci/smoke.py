"""The README's example on small data: what an installation must be able to do with the core dependencies alone."""

import arviz as az
import pyro
import pyro.distributions as dist

import ifpyro

samples = ifpyro.datasets.moons().sample(600, seed=0)
flow = ifpyro.fit(samples, max_steps=100, seed=0, progress=False)


def model(y):
    """The second coordinate is seen, with noise."""
    x = pyro.sample("x", flow.prior())
    pyro.sample("y", dist.Normal(x[..., 1], 0.2), obs=y)


smc = ifpyro.SMC(model, num_particles=256, seed=0)
smc.run(samples[0, 1])
table = az.summary(ifpyro.to_arviz(smc))
print(table)
assert len(table) > 0
