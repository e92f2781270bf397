"""Toy sets: densities against integration, Monte Carlo and scikit-learn's generators."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import make_circles, make_moons, make_s_curve, make_swiss_roll

from ifpyro.data import datasets

PLANE = {"circles": datasets.circles, "moons": datasets.moons, "sine": datasets.sine}
SPACE = {"s_curve": datasets.s_curve, "swirl": datasets.swirl}
SETS = {**PLANE, **SPACE}
ALL = {**{name: make() for name, make in SETS.items()}, **{f"paper {k}": v for k, v in datasets.paper().items()}}


def test_the_papers_seven_sets():
    sets = datasets.paper()
    assert list(sets) == ["circles", "sine", "moons", "S-curve", "swirl", "S-curve, flat", "swirl, flat"]
    for name, toy in sets.items():
        wanted = torch.ones(toy.dim, dtype=torch.double)
        if name.endswith("flat"):
            wanted[1] = 0.5
        torch.testing.assert_close(toy.covariance.diagonal().sqrt(), wanted)
        torch.testing.assert_close(toy.mean, torch.zeros(toy.dim, dtype=torch.double))


@pytest.mark.parametrize("name", list(PLANE))
def test_plane_density_integrates_to_one_and_has_the_stated_moments(name):
    toy = PLANE[name]()
    # Midpoints of a fine lattice; the sine's edges at x = +-1 are cell boundaries.
    steps = 600 if name == "sine" else 120
    middles = (torch.arange(steps, dtype=torch.double) + 0.5) / steps * 6 - 3
    points = torch.cartesian_prod(middles, middles)
    mass = toy.log_prob(points).exp() * (6 / steps) ** 2
    tolerance = 1e-4 if name == "sine" else 1e-9  # the lattice resolves the edges of the sine to second order
    assert float(mass.sum()) == pytest.approx(1, abs=tolerance)
    mean = mass @ points
    torch.testing.assert_close(mean, toy.mean, atol=tolerance, rtol=0)
    covariance = (points - mean).T @ (mass.unsqueeze(1) * (points - mean))
    torch.testing.assert_close(covariance, toy.covariance, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", list(ALL))
def test_moments_agree_with_draws(name):
    toy, n = ALL[name], 100_000
    x = toy.sample(n, seed=3, dtype=torch.double)
    assert x.shape == (n, toy.dim)
    centred = x - toy.mean
    assert bool((centred.mean(0).abs() < 4.5 * centred.std(0) / math.sqrt(n)).all())
    products = centred.unsqueeze(1) * centred.unsqueeze(2)
    error = products.std(0) / math.sqrt(n)
    assert bool(((products.mean(0) - toy.covariance).abs() < 4.5 * error).all())


@pytest.mark.parametrize("name", list(ALL))
def test_density_against_importance_sampling_of_its_own_draws(name):
    """``E_p[q/p] = 1`` for any density ``q`` inside the support; it fails where ``p`` is wrong and ``q`` looks."""
    toy = ALL[name]
    x = toy.sample(8_000, seed=5, dtype=torch.double)
    log_p = toy.log_prob(x)
    # q is p's own kernel estimate from other draws, with narrow kernels: bounded weights, everywhere p is.
    centres, width = toy.sample(200, seed=6, dtype=torch.double), toy.covariance.diagonal().sqrt() * 0.15
    if isinstance(toy, datasets.Sine) or name == "paper sine":
        edge = toy.covariance[0, 0].sqrt() * math.sqrt(3) - 6 * width[0]
        centres = centres[centres[:, 0].abs() < edge]  # kernels that leave the support would carry mass outside
    scaled = (x.unsqueeze(1) - centres) / width
    log_q = torch.logsumexp(-0.5 * scaled.square().sum(-1), 1) - math.log(len(centres)) - width.log().sum()
    log_q -= toy.dim / 2 * math.log(2 * math.pi)
    ratio = (log_q - log_p).exp()
    assert float(ratio.max()) < 0.05 * len(ratio), "the weights are too uneven for this test to mean anything"
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / math.sqrt(len(ratio))


@pytest.mark.parametrize("name", list(PLANE))
def test_density_agrees_with_a_histogram(name):
    toy, n = PLANE[name](), 200_000
    x = toy.sample(n, seed=7, dtype=torch.double).numpy()
    edges = np.linspace(-2.5, 2.5, 26)
    found = np.histogram2d(x[:, 0], x[:, 1], bins=[edges, edges])[0]
    fine = 8
    inner = torch.as_tensor((np.arange(25 * fine) + 0.5) / (5 * fine) - 2.5)
    mass = toy.log_prob(torch.cartesian_prod(inner, inner)).exp().reshape(25, fine, 25, fine).sum((1, 3))
    expected = (mass / (5 * fine) ** 2).numpy() * n
    dense = expected > 10
    chi_square = ((found - expected)[dense] ** 2 / expected[dense]).sum()
    assert stats.chi2.sf(chi_square, dense.sum()) > 1e-3
    assert found[~dense].sum() == pytest.approx(expected[~dense].sum(), abs=5 * math.sqrt(expected[~dense].sum() + 1))


SKLEARN = {
    "circles": lambda n: make_circles(n, noise=0.08, factor=0.5, random_state=1)[0],
    "moons": lambda n: make_moons(n, noise=0.08, random_state=1)[0],
    "s_curve": lambda n: make_s_curve(n, noise=0.2, random_state=1)[0],
    "swirl": lambda n: make_swiss_roll(n, noise=1.25, random_state=1)[0],
}


@pytest.mark.parametrize("name", list(SKLEARN))
def test_agrees_in_distribution_with_scikit_learn(name):
    n = 50_000
    theirs = torch.as_tensor(SKLEARN[name](n))
    toy = SETS[name]()
    ours = toy.sample(n, seed=2, dtype=torch.double)
    # Projections in fixed directions, radii, and the log-density itself.
    directions = torch.randn(5, toy.dim, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    directions = torch.cat([torch.eye(toy.dim, dtype=torch.double), directions])
    views = [(ours @ d, theirs @ d) for d in directions]
    views += [(ours.norm(dim=1), theirs.norm(dim=1)), (toy.log_prob(ours[:5_000]), toy.log_prob(theirs[::10]))]
    smallest = min(stats.ks_2samp(a.numpy(), b.numpy()).pvalue for a, b in views)
    assert smallest > 1e-3 / len(views)


@pytest.mark.parametrize("name", ["circles", "moons", "s_curve", "swirl"])
def test_quadrature_is_converged_up_to_eight_noises_from_the_curve(name, monkeypatch):
    for factor in (0.25, 1.0):  # of the noise by default
        toy = SETS[name]()
        sigma = factor * getattr(toy, "curve", toy).noise
        toy = SETS[name](sigma)
        x = toy.sample(100, seed=1, dtype=torch.double)
        step = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
        x = torch.cat([x, x + 5 * sigma * step / step.norm(dim=1, keepdim=True)])
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "_NODES_PER_NOISE", 12)
            fine = SETS[name](sigma)
        torch.testing.assert_close(toy.log_prob(x), fine.log_prob(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["circles", "moons", "paper moons"])
def test_mixture_is_the_set(name):
    toy = ALL[name]
    weights, means, covariances = toy.mixture()
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.MultivariateNormal(means, covariances)
    )
    x = toy.sample(500, seed=4, dtype=torch.double)
    torch.testing.assert_close(mixture.log_prob(x), toy.log_prob(x), atol=1e-6, rtol=0)


def test_sine_has_hard_edges():
    toy = datasets.sine()
    outside, inside = torch.tensor([[1.001, 0.0], [-1.2, 0.1]]), torch.tensor([[0.999, 0.0]])
    assert bool((toy.log_prob(outside) == -math.inf).all())
    assert bool(toy.log_prob(inside).isfinite().all())


def test_strip_density_far_outside_has_no_cancellation():
    toy = datasets.s_curve()
    x = torch.tensor([[0.0, 2.0 + 40 * 0.2, 0.0], [0.0, -40 * 0.2, 0.0]], dtype=torch.double)
    found = toy.log_prob(x)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[0], found[1])  # symmetric about the middle
    # log_ndtr(-40), from its asymptotic series to 1e-9
    tail = -0.5 * 40**2 - math.log(40) - 0.5 * math.log(2 * math.pi) + math.log1p(-1 / 40**2 + 3 / 40**4 - 15 / 40**6)
    across = float(found[0] - toy.curve.log_prob(torch.zeros(1, 2))[0])
    assert across == pytest.approx(tail - math.log(2.0), abs=1e-8)


def test_unit_variance_keeps_the_density_consistent():
    toy = datasets.swirl()
    scaled = toy.unit_variance((1.0, 0.5, 2.0))
    x = toy.sample(100, seed=0, dtype=torch.double)
    unit = toy.covariance.diagonal().sqrt() / torch.tensor([1.0, 0.5, 2.0])
    torch.testing.assert_close(scaled.sample(100, seed=0, dtype=torch.double), (x - toy.mean) / unit)
    torch.testing.assert_close(scaled.log_prob((x - toy.mean) / unit), toy.log_prob(x) + unit.log().sum())


def test_shapes_dtypes_and_seeds():
    toy = datasets.moons()
    assert toy.sample(10, seed=0).dtype == torch.float32
    assert torch.equal(toy.sample(10, seed=0), toy.sample(10, seed=0))
    assert not torch.equal(toy.sample(10, seed=0), toy.sample(10, seed=1))
    state = torch.get_rng_state()
    toy.sample(10, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    x = toy.sample(12, seed=0).reshape(3, 4, 2)
    assert toy.log_prob(x).shape == (3, 4)
    torch.testing.assert_close(toy.log_prob(x)[1, 2], toy.log_prob(x[1, 2]))


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"noise expects a positive number, got 0"):
        datasets.moons(0)
    with pytest.raises(ValueError, match=r"factor expects a positive number"):
        datasets.circles(factor=-0.5)
    with pytest.raises(ValueError, match=r"points of shape \(\*batch, 2\), got \(5, 3\)"):
        datasets.moons().log_prob(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"scale of 3 positive numbers"):
        datasets.s_curve().unit_variance((1.0, 1.0))
    with pytest.raises(ValueError, match=r"circles or moons"):
        datasets.paper()["sine"].mixture()
