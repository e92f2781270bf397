"""Amortised posteriors: exact where the flow is, made exact where it is not."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ifpyro
from ifpyro.amortised import AmortisedPosterior, Refined

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz

COUNT, SD = 3, 0.8


def linear(y=None):
    """``theta ~ N(0, I)`` in two dimensions, of which three noisy combinations are seen: regression is exact."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    seen = torch.stack([theta[..., 0], theta[..., 1], theta[..., 0] + theta[..., 1]], -1)
    pyro.sample("y", dist.Normal(seen, SD).to_event(1), obs=y)


def exact_linear(y):
    """Evidence, mean and covariance of the posterior."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.double)
    covariance = torch.linalg.inv(torch.eye(2, dtype=torch.double) + a.T @ a / SD**2)
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(3, dtype=torch.double), a @ a.T + SD**2 * torch.eye(3, dtype=torch.double)
    )
    return evidence.log_prob(y.double()), y.double() @ a @ covariance / SD**2, covariance


def two_sided(y=None):
    """The sign is not seen, so that regression is far from the posterior."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("y", dist.Normal(theta.abs(), 0.1), obs=y)


def exact_two_sided(y):
    theta = torch.linspace(-6, 6, 6001, dtype=torch.double)
    log_joint = dist.Normal(0.0, 1.0).log_prob(theta) + dist.Normal(theta.abs(), 0.1).log_prob(y.double()[..., None])
    return log_joint.logsumexp(-1) + math.log(12 / 6000)


def train(model, **options):
    return ifpyro.amortise(model, **{"seed": 0, "progress": False, "max_steps": 0, "num_simulations": 2_000, **options})


@pytest.fixture(scope="module")
def posterior():
    return train(linear, args=(torch.zeros(COUNT),))


@pytest.fixture(scope="module")
def observations():
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(6, 2, generator=generator)
    seen = torch.stack([theta[:, 0], theta[:, 1], theta.sum(1)], 1)
    return seen + SD * torch.randn(6, 3, generator=generator)


def test_given_data_it_is_the_posterior(posterior, observations):
    assert isinstance(posterior, AmortisedPosterior)
    _, mean, covariance = exact_linear(observations[0])
    theta = posterior.given(observations[0]).sample(4_000, seed=0)["theta"].double()
    assert theta.shape == (4_000, 2)
    torch.testing.assert_close(theta.mean(0), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(torch.cov(theta.T), covariance, atol=0.03, rtol=0)


def test_many_data_sets_at_once(posterior, observations):
    draws = posterior.given(observations).sample(2_000, seed=0)["theta"].double()
    assert draws.shape == (2_000, 6, 2)
    torch.testing.assert_close(draws.mean(0), exact_linear(observations)[1], atol=0.08, rtol=0)


def test_refined_by_weights_alone_where_the_flow_is_right(posterior, observations):
    smc = posterior.refine({"y": observations[0]}, 512, seed=0)
    assert smc.pareto_k < 0.5
    assert [stage.moves for stage in smc.stages] == [0]
    assert abs(smc.log_evidence - float(exact_linear(observations[0])[0])) < 3 * smc.log_evidence_se + 0.003
    assert smc.log_evidence_se < 0.02
    many = posterior.refine(observations, 256, seed=0)
    assert isinstance(many, Refined)
    assert not bool(many.moved.any())
    assert many.evaluations == 6 * 256
    exact, mean, _ = exact_linear(observations)
    assert bool(((many.log_evidence - exact).abs() < 4 * many.log_evidence_se + 0.003).all())
    torch.testing.assert_close(many.get_samples()["theta"].double().mean(1), mean, atol=0.15, rtol=0)


def test_refined_by_tempering_where_the_flow_is_wrong():
    posterior = train(two_sided, observed=("y",))
    y = torch.tensor([0.4, 1.3])
    one = posterior.refine(y[1], 512, seed=0)
    assert abs(one.log_evidence - float(exact_two_sided(y[1]))) < 3 * one.log_evidence_se + 0.005
    many = posterior.refine(y, 256, seed=0, max_moves=4)
    assert bool(many.moved.any())
    assert bool(((many.log_evidence - exact_two_sided(y)).abs() < 4 * many.log_evidence_se + 0.02).all())
    theta = many.get_samples()["theta"]
    assert bool(((theta > 0).double().mean(1) - 0.5).abs().max() < 0.15)
    assert bool(((theta.abs().mean(1) - y).abs() < 0.1).all())


def test_calibration_of_new_simulations(posterior):
    result = posterior.sbc(300, 49)
    assert result.names == ("theta[0]", "theta[1]")
    assert result.passed
    biased = train(linear, args=(torch.zeros(COUNT),))
    biased.flow.basis.mean += 0.3
    assert not biased.sbc(300, 49).passed
    assert posterior.check(400).passed
    assert not biased.check(400).passed


def test_draws_are_read_by_arviz(posterior, observations):
    data = ifpyro.to_arviz(posterior.given(observations[0]).draws(80, seed=1), progress=False)
    assert data["posterior"]["theta"].shape == (4, 20, 2)
    np.testing.assert_allclose(data["observed_data"]["y"], observations[0])
    refined = ifpyro.to_arviz(posterior.refine(observations[0], 64, seed=0), progress=False)
    np.testing.assert_allclose(refined["observed_data"]["y"], observations[0])
    assert refined["posterior"]["theta"].shape[-1] == 2
    assert len(arviz.summary(refined)) == 2
    with pytest.raises(ValueError, match="one data set"):
        posterior.given(observations).draws()


def test_sites_of_every_kind():
    def model(a=None, b=None):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        share = pyro.sample("share", dist.Beta(torch.tensor(2.0), 2.0))
        pyro.deterministic("product", rate * share)
        pyro.sample("a", dist.Poisson(rate * 5), obs=a)
        with pyro.plate("trials", 4):
            pyro.sample("b", dist.Bernoulli(share), obs=b)

    posterior = train(model, observed=("a", "b"), num_simulations=400)
    y = {"a": torch.tensor(9.0), "b": torch.tensor([1.0, 1.0, 0.0, 1.0])}
    draws = posterior.given(y).sample(300, seed=0)
    assert set(draws) == {"rate", "share", "product"}
    assert bool((draws["rate"] > 0).all())
    assert bool(((draws["share"] > 0) & (draws["share"] < 1)).all())
    smc = posterior.refine(y, 512, seed=0)
    # Conjugate: Gamma(2 + 9, 1 + 5) and Beta(2 + 3, 2 + 1).
    samples = smc.get_samples()
    assert float(samples["rate"].mean()) == pytest.approx(11 / 6, abs=0.1)
    assert float(samples["share"].mean()) == pytest.approx(5 / 8, abs=0.04)
    with pytest.raises(ValueError, match="several observed sites"):
        posterior.given(torch.zeros(5))
    with pytest.raises(ValueError, match="expected data of the sites"):
        posterior.given({"a": torch.tensor(9.0)})
    with pytest.raises(ValueError, match="same number of data sets"):
        posterior.given({"a": torch.zeros(2), "b": torch.zeros(3, 4)})


def test_what_cannot_be_amortised_is_refused(posterior):
    with pytest.raises(ValueError, match="no observed site"):
        train(linear)
    with pytest.raises(ValueError, match=r"observed names \['z'\]"):
        train(linear, observed=("z",))
    with pytest.raises(TypeError, match="callable"):
        train(3)
    with pytest.raises(ValueError, match=r"data of site 'y' of shape \(3,\)"):
        posterior.given(torch.zeros(4))
    with pytest.raises(ValueError, match=r"data of site 'y' of shape \(3,\)"):
        posterior.refine(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="makes the condition itself"):
        train(linear, args=(torch.zeros(COUNT),), labels=True)

    def breaks(y=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0).mask(theta < 100), obs=y)
        pyro.factor("more", theta)

    with pytest.raises(ValueError, match="factor"):
        train(breaks, observed=("y",))


def test_simulations_that_fail_are_counted():
    def model(y=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample(
            "y",
            dist.TransformedDistribution(
                dist.Normal(theta, 0.1), [torch.distributions.transforms.PowerTransform(torch.tensor(0.5))]
            ),
            obs=y,
        )

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="simulations hold NaN"):
            train(model, args=(torch.tensor(1.0),), num_simulations=200)
        with pytest.warns(UserWarning, match="are left out"):
            posterior = train(model, args=(torch.tensor(1.0),), num_simulations=200, drop_invalid=True)
    assert posterior.flow.report["simulations"]["invalid"] > 50
