"""Distributions of Pyro that need care: mixtures and angles as latents, NaN as "not seen", improper priors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ifpyro.infer import HMC, MCMC, SMC
from ifpyro.infer.model.batched import BatchedModel

NAN = math.nan


def mixture(event=False):
    components = dist.Normal(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 0.7]))
    if event:
        components = dist.Normal(torch.tensor([[-2.0, 0.0], [1.0, 1.0]]), 1.0).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), components)


@pytest.mark.parametrize("event", [False, True])
def test_a_mixture_is_a_latent(event):
    """As the message about latents that depend on discrete ones advises."""
    prior = mixture(event)

    def model(y):
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[..., 0] if event else x, 1.5), obs=y)

    batched = BatchedModel(model, (torch.tensor(-0.5),))
    q = batched.sample_prior(6, torch.Generator().manual_seed(0))
    x = batched.sites(q)["x"]
    torch.testing.assert_close(x, q.reshape(x.shape))
    torch.testing.assert_close(batched(q)[0], prior.log_prob(x))


def test_a_mixture_of_positive_components():
    prior = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.4, 0.6])), dist.Gamma(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 3.0]))
    )

    def model():
        pyro.sample("x", prior)

    batched = BatchedModel(model)
    q = batched.sample_prior(6, torch.Generator().manual_seed(0))
    x = batched.sites(q)["x"]
    assert (x > 0).all()
    torch.testing.assert_close(batched(q)[0], prior.log_prob(x) + q[:, 0])  # x = exp(q)


@pytest.mark.parametrize("vector", [False, True])
def test_an_angle_stays_on_its_circle(vector):
    """Pyro declares all real numbers as its support, on which a periodic density is improper."""
    prior = dist.VonMises(torch.tensor(0.5), 2.0)

    def model():
        pyro.sample("x", prior.expand([2]).to_event(1) if vector else prior)

    batched = BatchedModel(model)
    q = torch.tensor([[0.3], [2.0], [-4.0]]).expand(3, batched.dim)
    x = batched.sites(q)["x"].reshape(3, -1)
    torch.testing.assert_close(x, 2 * math.pi * (q.sigmoid() - 0.5))
    log_det = (2 * math.pi * q.sigmoid() * (-q).sigmoid()).log()
    torch.testing.assert_close(batched(q)[0], (prior.log_prob(x) + log_det).sum(-1))
    x = MCMC(HMC(model), 60, 40, 8, init="prior", seed=1, progress=False).run().get_samples()["x"]
    assert float(x.abs().max()) <= math.pi


def test_nan_says_that_nothing_was_seen():
    y = torch.tensor([0.3, NAN, -0.4, NAN])
    table = torch.tensor([[0.1, NAN], [NAN, NAN], [0.5, 0.2]])
    covariance = torch.tensor([[1.0, 0.5], [0.5, 2.0]])

    def model(y, table):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.NanMaskedNormal(x, 0.5), obs=y)
        with pyro.plate("events", 3):
            loc = x * torch.ones(3, 2)
            pyro.sample("table", dist.NanMaskedMultivariateNormal(loc, covariance.expand(3, 2, 2)), obs=table)

    batched = BatchedModel(model, (y, table))
    q = torch.tensor([[0.0], [0.7]], requires_grad=True)
    found = batched(q)[1]
    expected = []
    for x in (0.0, 0.7):
        seen = dist.Normal(x, 0.5).log_prob(torch.tensor([0.3, -0.4])).sum()
        one = dist.Normal(x, 1.0).log_prob(torch.tensor(0.1))
        both = dist.MultivariateNormal(torch.full((2,), x), covariance).log_prob(table[2])
        expected.append(seen + one + both)
    torch.testing.assert_close(found, torch.stack(expected))
    (gradient,) = torch.autograd.grad(found.sum(), q)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("init", ["prior", {"x": torch.zeros(4)}])
def test_an_improper_prior_is_refused_in_words(init):
    def model():
        pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))

    with pytest.raises(ValueError, match=r"'x' has an ImproperUniform prior, of which there are no draws.*Normal"):
        MCMC(HMC(model), 5, 5, 4, init=init, progress=False).run()
    with pytest.raises(ValueError, match="ImproperUniform"):
        SMC(model, progress=False).run()
