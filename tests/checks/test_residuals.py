"""Residuals and errors of networks, against flows whose velocity is exact or wrong by a known amount."""

import math

import pytest
import torch
from torch import nn

from flows_zoo import mixture, mixture_flow, random_mlp
from ifpyro import InflationaryFlow, Schedule
from ifpyro.checks.residuals import Residuals, accumulated, mixture_velocity, network_residuals, path_errors
from ifpyro.data import datasets
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.networks.velocity import Velocity

TIMES = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.double)


class Perturbed(Velocity):
    """Another velocity plus ``shift(t) = a + b sin(2 pi t)``, the same on every axis."""

    def __init__(self, inner, a, b):
        super().__init__()
        self.inner, self.a, self.b = inner, a, b

    def embed(self, t):
        return torch.cat([self.inner.embed(t), (self.a + self.b * torch.sin(2 * math.pi * t)).unsqueeze(1)], 1)

    def forward(self, y, embedding):
        return self.inner(y, embedding[..., :-1]) + embedding[..., -1:].to(y)


def gaussian_flow(schedule, dim=2, velocity=None):
    """Standard normal data, for which the exact velocity is zero."""
    eye = torch.eye(dim, dtype=torch.double)
    basis = Basis(torch.zeros(dim).double(), eye, torch.linspace(1.5, 0.7, dim, dtype=torch.double))
    return InflationaryFlow(basis, schedule, velocity or MLP(dim, width=4, blocks=1).double())


def mixture_draws(num, seed, dim=2):
    weights, means, covariances = mixture(dim)
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(weights, num, True, generator=generator)
    white = torch.randn(num, dim, 1, generator=generator, dtype=torch.double)
    return means[k] + (torch.linalg.cholesky(covariances)[k] @ white)[..., 0]


def test_residuals_of_an_exact_velocity_are_unpredictable_from_the_state():
    flow, num = mixture_flow(2, torch.double), 40_000
    x = mixture_draws(num, 1)
    rows = flow.basis.to_standard(x)
    found = network_residuals(flow, x, TIMES, seed=0)
    generator = torch.Generator().manual_seed(0)  # the noise that was used
    for t, r in zip(TIMES, found.values, strict=True):
        theta = flow.angles(t)
        y = theta.cos() * rows + theta.sin() * torch.randn(rows.shape, generator=generator, dtype=torch.double)
        velocity = flow.velocity(y, flow.velocity.embed(t[None])[0])
        for h in (torch.ones_like(y), y, torch.tanh(2 * y), y.flip(1) ** 2, velocity):
            products = r * h
            assert bool((products.mean(0).abs() < 4.5 * products.std(0) / math.sqrt(num)).all())


def test_a_shift_of_the_velocity_is_the_mean_residual():
    flow, num = mixture_flow(2, torch.double), 40_000
    flow.velocity = Perturbed(flow.velocity, 0.2, 0.5)
    found = network_residuals(flow, mixture_draws(num, 2), TIMES, seed=1)
    for t, r in zip(TIMES, found.values, strict=True):
        shift = 0.2 + 0.5 * math.sin(2 * math.pi * float(t))
        assert bool(((r.mean(0) - shift).abs() < 4.5 * r.std(0) / math.sqrt(num)).all())


@pytest.mark.parametrize("schedule", [Schedule.preserving(), Schedule.details_first(2.0)], ids=["preserving", "p = 2"])
def test_a_perfect_network_has_correlated_residuals(schedule):
    """Gaussian data: ``R(t1, t2) = mean_j sin theta_j(t1) sin theta_j(t2)``, from the data that two times share."""
    flow, num = gaussian_flow(schedule), 20_000
    x = flow.sample(num, seed=3)
    found = network_residuals(flow, x, TIMES, seed=4).autocorrelation()
    sin = flow.angles(TIMES).sin()
    exact = sin @ sin.T / flow.latent_dim
    exact.fill_diagonal_(1.0)
    torch.testing.assert_close(found, exact, atol=4.5 / math.sqrt(2 * num), rtol=0)


def test_size_of_residuals_of_gaussian_data():
    flow, num = gaussian_flow(Schedule.preserving()), 20_000
    found = network_residuals(flow, flow.sample(num, seed=3), TIMES, seed=4).size()
    torch.testing.assert_close(found, torch.ones(4, dtype=torch.double), atol=4.5 / math.sqrt(4 * num), rtol=0)


def test_path_errors_of_an_exact_velocity_vanish():
    flow = mixture_flow(2, torch.double)
    weights, means, covariances = mixture(2)
    reference = mixture_velocity(flow, weights, means, covariances)
    found = path_errors(flow, reference, mixture_draws(50, 5), steps=8)
    assert found.values.shape == (9, 50, 2)
    assert float(found.values.abs().max()) < 1e-10
    assert accumulated(flow, found).error < 1e-10


def test_path_errors_are_the_perturbation():
    flow = mixture_flow(3, torch.double)
    exact, flow.velocity = flow.velocity, Perturbed(flow.velocity, 0.02, 0.05)
    found = path_errors(flow, exact, mixture_draws(20, 6, dim=3), steps=8)
    shift = 0.02 + 0.05 * torch.sin(2 * math.pi * found.times)
    torch.testing.assert_close(found.values, shift.view(-1, 1, 1).expand_as(found.values))


def test_a_constant_error_accumulates_in_full_and_is_what_the_latent_is_off_by():
    flow = gaussian_flow(Schedule.preserving())
    x = flow.sample(100, seed=7)
    exact, z = flow.velocity, flow.encode(x)
    flow = gaussian_flow(Schedule.preserving(), velocity=Perturbed(exact, 0.03, 0.0))
    errors = path_errors(flow, exact, x)
    torch.testing.assert_close(errors.autocorrelation(), torch.ones(65, 65, dtype=torch.double))
    found = accumulated(flow, errors)
    angle = flow.angles(torch.tensor([0.0, 1.0], dtype=torch.double))[:, 0].diff()
    assert found.error == pytest.approx(0.03 * float(angle), rel=1e-6)
    assert found.coherence == pytest.approx(1.0)
    # F* = 0 here, so J = 1 and the integral is the error of the latent
    assert float((flow.encode(x) - z).square().mean().sqrt()) == pytest.approx(found.error, rel=1e-6)


def test_errors_that_change_sign_cancel():
    flow = gaussian_flow(Schedule.preserving())  # theta' is constant
    exact, flow.velocity = flow.velocity, Perturbed(flow.velocity, 0.0, 0.1)
    errors = path_errors(flow, exact, flow.sample(50, seed=8), steps=256)
    found = accumulated(flow, errors)
    angle = float(flow.angles(torch.tensor([0.0, 1.0], dtype=torch.double))[:, 0].diff())
    assert found.without_cancelling == pytest.approx(0.1 * angle * 2 / math.pi, rel=1e-3)
    assert found.error < 1e-3 * found.without_cancelling
    quarter, three_quarters = (int((errors.times - t).abs().argmin()) for t in (0.25, 0.75))
    assert float(errors.autocorrelation()[quarter, three_quarters]) == pytest.approx(-1.0, abs=1e-6)


def test_mixture_velocity_of_a_toy_set_is_the_regression_of_the_target():
    """In the coordinates of a flow with its own basis: residuals against it have mean zero given the state."""
    toy = datasets.paper()["moons"]
    x = toy.sample(6_000, seed=1, dtype=torch.double)
    basis = Basis.from_samples(x[:500], own_units=True)
    flow = InflationaryFlow(basis, Schedule.details_first(), MLP(2, width=4).double())
    flow.velocity = mixture_velocity(flow, *toy.mixture())
    residuals = network_residuals(flow, x, TIMES[:3], seed=2)
    generator = torch.Generator().manual_seed(2)
    rows = basis.to_standard(x)
    for t, r in zip(residuals.times, residuals.values, strict=True):
        theta = flow.angles(t)
        y = theta.cos() * rows + theta.sin() * torch.randn(rows.shape, generator=generator, dtype=torch.double)
        for h in (torch.ones_like(y), y, torch.sin(3 * y)):
            products = r * h
            assert bool((products.mean(0).abs() < 4.5 * products.std(0) / math.sqrt(len(x))).all())


def test_float32_networks_and_images():
    flow = InflationaryFlow(
        Basis(torch.zeros(4), torch.eye(4), torch.ones(4)), Schedule.preserving(), random_mlp(4), event_shape=(2, 2)
    )
    x = flow.sample(10, seed=0)
    found = network_residuals(flow, x, seed=0)
    assert found.values.shape == (32, 10, 4)
    assert found.values.dtype == torch.float32
    other = random_mlp(4)
    nn.init.zeros_(other.outlet.weight)
    errors = path_errors(flow, other, x, steps=4)
    assert errors.values.shape == (5, 10, 4)
    assert accumulated(flow, errors).error > 0
    torch.testing.assert_close(found.values, network_residuals(flow, x, seed=0).values, rtol=0, atol=0)
    assert not torch.equal(found.values, network_residuals(flow, x, seed=1).values)


def test_no_errors_have_no_correlation_and_no_coherence():
    flow = gaussian_flow(Schedule.preserving())
    nothing = Residuals(torch.tensor([0.0, 1.0], dtype=torch.double), torch.zeros(2, 5, 2, dtype=torch.double))
    assert not bool(nothing.autocorrelation().any())
    assert accumulated(flow, nothing).coherence == 0.0


def test_times_outside_are_refused():
    flow = gaussian_flow(Schedule.preserving())
    with pytest.raises(ValueError, match=r"times of shape \(m,\) in \[0, 1\]"):
        network_residuals(flow, flow.sample(5, seed=0), torch.tensor([0.5, 1.5]), seed=0)
