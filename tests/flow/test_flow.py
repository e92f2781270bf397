import copy
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, TransformedDistribution, biject_to, constraints

import ifpyro
from flows_zoo import (
    FLOWS,
    SCHEDULES,
    STACK,
    Counting,
    latents,
    mixture,
    mixture_density,
    mixture_flow,
    mlp_flow,
    random_mlp,
    samples,
    smoothed_density,
)
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.grid import Grid

FINE = Grid(48)
DTYPES = {"float32": torch.float32, "float64": torch.double}


def rmse(a, b):
    return float((a - b).square().mean().sqrt())


# -- densities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_density_of_a_mixture_is_exact(name, dim):
    # in the paper's own time the angles turn in the middle of it, and a grid must be finer there
    grid = Grid(128, 1.0) if name == "exponential" else FINE
    flow = mixture_flow(dim, torch.double, SCHEDULES[name](dim), grid=grid)
    generator = torch.Generator().manual_seed(3)
    weights, means, covariances = mixture(dim)
    k = torch.multinomial(weights, 60, True, generator=generator)
    white = torch.randn(60, dim, 1, generator=generator, dtype=torch.double)
    x = means[k] + (torch.linalg.cholesky(covariances)[k] @ white)[..., 0]
    exact = smoothed_density(flow).log_prob(flow.basis.to_standard(x)) - flow.basis.log_det()
    assert (flow.log_prob(x) - exact).abs().max() < 1e-3
    gaussian = MultivariateNormal(flow.basis.mean, torch.cov(x.T).reshape(dim, dim))
    assert (gaussian.log_prob(x) - exact).abs().max() > 0.1


def test_density_of_a_mixture_in_single_precision():
    flow = mixture_flow(2, torch.float32, grid=FINE)
    x = flow.sample(60, seed=0)
    exact = smoothed_density(flow).log_prob(flow.basis.to_standard(x).double()) - flow.basis.log_det()
    assert (flow.log_prob(x) - exact).abs().max() < 1e-3


@pytest.mark.parametrize("support", [None, constraints.positive, constraints.interval(-1.0, 3.0)])
def test_densities_integrate_to_one(support):
    flow = mixture_flow(1, torch.double, support=support)
    nodes = torch.linspace(-12, 14, 2001, dtype=torch.double)[:, None]
    if support is not None:
        nodes = biject_to(support)(nodes)
    total = torch.trapezoid(flow.log_prob(nodes).exp(), nodes[:, 0])
    assert float(total) == pytest.approx(1.0, abs=1e-3)


SUPPORTS = {
    "positive": (constraints.positive, 2, (2,)),
    "unit interval": (constraints.unit_interval, 2, (2,)),
    "interval": (constraints.interval(-1.0, 3.0), 2, (2,)),
    "greater than": (constraints.greater_than(2.0), 2, (2,)),
    "less than": (constraints.less_than(-2.0), 2, (2,)),
    "simplex": (constraints.simplex, 3, (4,)),
    "rows of simplices": (constraints.simplex, 4, (2, 3)),
    "positive image": (constraints.positive, 4, (2, 2)),
    "stack": (STACK, 3, (3,)),
    "cat": (constraints.cat([constraints.positive, constraints.unit_interval], -1, [1, 2]), 3, (3,)),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_support_of_a_gaussian_flow_is_torchs_transformed_normal(name):
    support, dim, event = SUPPORTS[name]
    free = 0.3 * samples(dim, torch.double) - 0.5
    flow = InflationaryFlow(
        Basis.from_samples(free),
        Schedule.details_first(),
        MLP(dim, width=8).double(),
        event_shape=event,
        support=support,
    )
    x = flow.sample((4, 5), seed=0)
    assert x.shape == (4, 5, *event)
    assert support.check(x).all()
    bijection = biject_to(support)
    unconstrained = bijection.inv(x)
    expected = MultivariateNormal(free.mean(0), torch.cov(free.T)).log_prob(unconstrained.flatten(2))
    log_det = bijection.log_abs_det_jacobian(unconstrained, x)
    expected = expected - log_det.reshape(4, 5, -1).sum(-1)
    found = flow.log_prob(x)
    assert found.shape == (4, 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert log_det.abs().max() > 0.1
    if support.event_dim <= 1 and len(event) == 1 and name not in ("stack", "cat"):
        base = MultivariateNormal(free.mean(0), torch.cov(free.T))
        oracle = TransformedDistribution(base, [bijection]).log_prob(x)
        torch.testing.assert_close(found, oracle, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_untrained_flow_is_the_gaussian_of_the_samples(name):
    x = samples(4, torch.double, rows=100)
    flow = InflationaryFlow(Basis.from_samples(x), SCHEDULES[name](4), MLP(4, width=8).double())
    gaussian = MultivariateNormal(x.mean(0), torch.cov(x.T))
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(x), rtol=0, atol=1e-9)
    draws = flow.sample(1_000, seed=1)
    error = x.std(0) / math.sqrt(1_000)
    assert ((draws.mean(0) - x.mean(0)).abs() < 4.5 * error).all()


# -- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLOWS)
def test_round_trips(name, dtype):
    flow = FLOWS[name](DTYPES[dtype])
    tolerance = {"float32": 1e-4, "float64": 1e-9}[dtype]
    z = latents(flow, 100)
    x = flow.decode(z)
    assert rmse(flow.encode(x), z) < tolerance
    assert rmse(flow.decode(flow.encode(x)), x) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLOWS)
def test_log_det_is_autograds_of_the_map(name, dtype):
    flow = FLOWS[name](DTYPES[dtype])
    tolerance = {"float32": 1e-3, "float64": 1e-8}[dtype]
    z = 0.8 * latents(flow, 2)
    x, log_det = flow.decode_and_log_det(z)
    torch.testing.assert_close(x, flow.decode(z), rtol=1e-5, atol=1e-5)

    def leading(v):  # a simplex has one more entry than it has degrees of freedom
        return flow.decode(v).flatten()[: flow.latent_dim]

    for row in range(2):
        jacobian = torch.autograd.functional.jacobian(leading, z[row])
        expected = float(torch.linalg.slogdet(jacobian)[1])
        assert float(log_det[row]) == pytest.approx(expected, abs=tolerance)
    back, inverse_log_det = flow.encode_and_log_det(x)
    torch.testing.assert_close(back, flow.encode(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("name", ["mixture 2", "network 8", "positive", "simplex"])
def test_inverse_has_the_inverse_jacobian(name):
    """Gradients flow through ``encode`` as well, and are those of the inverse function."""
    flow = FLOWS[name](torch.double)
    z = 0.5 * latents(flow, 1)[0]
    x = flow.decode(z)
    forward = torch.autograd.functional.jacobian(flow.decode, z)
    backward = torch.autograd.functional.jacobian(flow.encode, x)
    torch.testing.assert_close(backward @ forward, torch.eye(flow.latent_dim, dtype=torch.double), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mixture 5", "network 8", "image", "positive", "simplex"])
def test_a_row_does_not_depend_on_its_batch_mates(name):
    flow = FLOWS[name](torch.float32)
    flow.grid = Grid(6)
    z = latents(flow, 8)
    wild = z.clone()
    wild[1:5] *= 1e3
    wild[5:] = torch.nan
    x = flow.decode(z)
    spoilt = x.clone()
    spoilt[1:] = x[1:].flip(0)
    for function, calm, other in (
        (flow.decode, z, wild),
        (flow.encode, x, spoilt),
        (flow.log_prob, x, spoilt),
        (lambda v: flow.decode_and_log_det(v)[1], z, torch.cat([z[:1], z[1:].flip(0)])),
    ):
        assert torch.equal(function(calm)[0], function(other)[0])  # bitwise at equal batch size
        torch.testing.assert_close(function(calm)[0], function(calm[:1])[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_any_batch_shape(name):
    flow = FLOWS[name](torch.double)
    flow.grid = Grid(3)
    event = flow.event_shape
    flat = latents(flow, 6)
    expected = flow.decode(flat)
    density = flow.log_prob(expected)
    for batch in ((), (1,), (1, 3, 2), (2, 0)):
        number = math.prod(batch)
        z = flat[:number].reshape(*batch, flow.latent_dim)
        x = flow.decode(z)
        assert x.shape == (*batch, *event)
        torch.testing.assert_close(x, expected[:number].reshape(x.shape))
        assert flow.encode(x).shape == z.shape
        assert flow.log_prob(x).shape == batch
        torch.testing.assert_close(flow.log_prob(x), density[:number].reshape(batch))


# -- sampling, decoder, trajectory, participation ratio -----------------------------------------------------------


def test_samples_have_the_law_of_the_mixture():
    flow = mixture_flow(2, torch.double)
    x = flow.sample(20_000, seed=3)
    means = mixture(2)[1]
    exact = mixture_density(*mixture(2))
    for found, expected in ((x, exact.mean), (x.square(), exact.variance + exact.mean**2)):
        error = found.std(0) / math.sqrt(20_000)
        smoothing = 2e-3  # the noise floor moves second moments by a few squared hundredths
        assert ((found.mean(0) - expected).abs() < 4 * error + smoothing).all()
    nearest = torch.cdist(x, means).argmin(1)
    reference = exact.sample((200_000,))
    share = torch.bincount(torch.cdist(reference, means).argmin(1), minlength=3) / 200_000
    assert (torch.bincount(nearest, minlength=3) / 20_000 - share).abs().max() < 4 * math.sqrt(0.25 / 20_000)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    flow = FLOWS["image"](torch.float32)
    state = torch.get_rng_state()
    once = flow.sample((2, 3), seed=5)
    assert once.shape == (2, 3, 2, 3)
    assert torch.equal(once, flow.sample((2, 3), seed=5))
    assert not torch.equal(once, flow.sample((2, 3), seed=6))
    assert not torch.equal(flow.sample(4), flow.sample(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert flow.sample().shape == (2, 3)


def test_decoder_of_leading_latents():
    flow = FLOWS["network 8"](torch.float32)
    z = latents(flow, 3, 4)
    rest = torch.cat([z[..., :2], torch.zeros(3, 4, 6)], -1)
    assert torch.equal(flow.decoder(2)(z[..., :2]), flow.decode(rest))
    assert torch.equal(flow.decoder(8)(z), flow.decode(z))


@pytest.mark.parametrize("name", ["preserving", "mixture 2", "positive image"])
def test_trajectory_runs_from_data_to_latent(name):
    flow = FLOWS[name](torch.double)
    x = flow.sample((2, 5), seed=0)
    times, path = flow.trajectory(x, steps=64)
    assert times.shape == (65,)
    assert path.shape == (65, 2, 5, flow.latent_dim)
    free = x if flow.bijection() is None else flow.bijection().inv(x)
    start = flow.basis.to_standard(free.reshape(2, 5, -1)) * flow.basis.scale
    torch.testing.assert_close(path[0] / path[0].std(), start / start.std(), rtol=1e-3, atol=1e-4)
    last = flow.angles(torch.ones(1))
    unit = path[-1] / (flow.basis.scale * last[..., :1].cos() / last.cos())
    assert rmse(unit, flow.encode(x)) < 1e-3


def test_participation_ratio_is_constant_when_preserving():
    flow = FLOWS["preserving"](torch.double)
    variance = flow.basis.scale**2
    expected = float(variance.sum() ** 2 / variance.square().sum())
    found = flow.participation_ratio(torch.linspace(0, 1, 11))
    torch.testing.assert_close(found, torch.full((11,), expected, dtype=torch.double), rtol=1e-9, atol=0)


def test_participation_ratio_in_closed_form_when_reducing():
    gamma0, rho, g, T = 1e-4, 1.0, (1.0, 1.0, 0.2, 0.1), 14.0
    flow = mlp_flow(4, torch.double, Schedule.exponential(gamma0, rho, g, T))
    t = torch.linspace(0, 1, 9, dtype=torch.double)
    noise = gamma0 * torch.exp(rho * (1 + torch.tensor(g, dtype=torch.double)) * T * t[:, None])
    variance = flow.basis.scale**2 + noise  # a rescaling common to all axes cancels
    expected = variance.sum(-1) ** 2 / variance.square().sum(-1)
    torch.testing.assert_close(flow.participation_ratio(t), expected, rtol=1e-9, atol=0)
    assert float(flow.participation_ratio()) == pytest.approx(2, rel=1e-3)  # K kept axes


# -- dtypes, fidelity, networks that change ---------------------------------------------------------------------------


def test_double_and_back():
    flow = FLOWS["network 2"](torch.float32)
    z = latents(flow, 5)
    single = flow.decode(z)
    flow.double()
    assert flow.dtype == torch.double
    double = flow.decode(z.double())
    assert double.dtype == torch.double
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)
    assert rmse(flow.encode(double), z.double()) < 1e-9
    flow.float()
    torch.testing.assert_close(flow.decode(z), single, rtol=1e-5, atol=1e-5)


def test_fidelity_changes_the_map_and_nothing_else():
    flow = FLOWS["mixture 2"](torch.double)
    z = latents(flow, 5)
    fine = flow.decode(z)
    with ifpyro.fidelity("coarse"):
        coarse = flow.decode(z)
        assert rmse(flow.encode(coarse), z) < 1e-3
        with ifpyro.fidelity("fine"):
            assert torch.equal(flow.decode(z), fine)
        with ifpyro.fidelity(steps=flow.coarse_steps):
            assert torch.equal(flow.decode(z), coarse)
    assert rmse(coarse, fine) > 1e-6
    assert torch.equal(flow.decode(z), fine)
    with pytest.raises(RuntimeError, match="stop"), ifpyro.fidelity("coarse"):
        raise RuntimeError("stop")
    assert torch.equal(flow.decode(z), fine)


def test_evaluations_are_those_of_the_grid():
    flow = FLOWS["network 2"](torch.float32)
    flow.velocity = counter = Counting(flow.velocity)
    flow.decode(latents(flow, 5))
    assert counter.calls == flow.grid.evaluations
    with ifpyro.fidelity("coarse"):
        flow.decode(latents(flow, 5))
    assert counter.calls == flow.grid.evaluations + 4 * flow.coarse_steps
    for evaluations in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
        counter.calls = 0
        with ifpyro.fidelity(evaluations=evaluations):
            flow.decode(latents(flow, 5))
        assert counter.calls == evaluations


def test_a_cheap_grid_beats_the_steps_of_rk4_that_it_replaces():
    flow = FLOWS["mixture 2"](torch.double)
    z = latents(flow, 50)
    fine = flow.decode(z)
    for steps in (1, 2):
        with ifpyro.fidelity(steps=steps):
            high = rmse(flow.decode(z), fine)
        with ifpyro.fidelity(evaluations=4 * steps):
            low = rmse(flow.decode(z), fine)
        assert low < 0.7 * high


def gradient_step(flow):
    flow.requires_grad_(True)
    optimiser = torch.optim.AdamW(flow.velocity.parameters(), lr=0.05)
    (-flow.log_prob(samples(2)).mean()).backward()
    optimiser.step()
    flow.requires_grad_(False)


def assign_vector(flow):
    parameters = list(flow.velocity.parameters())
    torch.nn.utils.vector_to_parameters(1.5 * torch.nn.utils.parameters_to_vector(parameters), parameters)


def load_other(flow):
    other = random_mlp(2, size=0.3)
    with torch.no_grad():
        other.modulation.weight.mul_(2)
    flow.velocity.load_state_dict(other.state_dict())


def replace_network(flow):
    flow.velocity = random_mlp(2, size=0.3)
    flow.velocity.modulation.weight.requires_grad_(False).mul_(2)
    flow.velocity.requires_grad_(False)


@pytest.mark.parametrize("change", [gradient_step, assign_vector, load_other, replace_network])
def test_a_changed_network_never_meets_old_embeddings(change):
    flow = mlp_flow(2, torch.float32)
    z = latents(flow, 5)
    before = flow.decode(z)
    change(flow)
    fresh = InflationaryFlow(flow.basis, flow.schedule, copy.deepcopy(flow.velocity))
    assert torch.equal(flow.decode(z), fresh.decode(z))
    assert rmse(flow.decode(z), before) > 1e-4


def test_functional_call_meets_its_own_embeddings():
    """Two sets of weights of equal history, as in an ensemble."""
    flow = mlp_flow(2, torch.float32)
    z = latents(flow, 5)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(value.shape, generator=generator) * 0.2
            for name, value in flow.velocity.named_parameters(prefix="velocity")
        }
        module = Decoding(flow)
        found = torch.func.functional_call(module, {f"flow.{k}": v for k, v in weights.items()}, (z,))
        fresh = mlp_flow(2, torch.float32)
        fresh.load_state_dict({**fresh.state_dict(), **weights})
        assert torch.equal(found, fresh.decode(z))


class Decoding(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, z):
        return self.flow.decode(z)


def test_training_through_the_flow_reaches_every_weight():
    flow = mlp_flow(2, torch.float32).requires_grad_(True)
    for _ in range(2):  # and twice: no graph is kept between calls
        flow.zero_grad()
        (-flow.log_prob(samples(2)).mean()).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in flow.velocity.parameters())


def test_solver_cache_stays_small():
    flow = mlp_flow(2, torch.float32)
    for _ in range(5):
        load_other(flow)
        flow.decode(latents(flow, 2))
    assert len(flow.map._solvers._solvers) <= 2


def test_state_of_another_flow_brings_its_angles():
    flow, other = mlp_flow(2, torch.float32), mlp_flow(2, torch.float32)
    other.basis.scale.mul_(torch.tensor([2.0, 0.5]))
    other = InflationaryFlow(other.basis, other.schedule, other.velocity)
    flow.load_state_dict(other.state_dict())
    z = latents(flow, 4)
    assert torch.equal(flow.decode(z), other.decode(z))
