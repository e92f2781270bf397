"""Conditional flows against the exact conditional density of a Gaussian mixture, and against themselves."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.conditional import ConditionalTransformModule

import ifpyro
from conditional_zoo import conditional_flow, log_conditional, narrow_mixture, pairs
from ifpyro import Grid, InflationaryFlow
from ifpyro.flow.networks.conditional import ConditionalVelocity, GivenVelocity
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.networks.shifts import FeatureShift


def random_flow(dtype=torch.double):
    """The mixture's frame with a random network that a condition shifts."""
    exact = conditional_flow(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = MLP(2, width=16, blocks=2)
        torch.nn.init.normal_(inner.outlet.weight, std=0.2)
        net = ConditionalVelocity(inner, FeatureShift(2, 16 * 5, width=8)).to(dtype)
    return ifpyro.ConditionalFlow(
        exact.conditions, exact.basis, exact.coefficient, exact.schedule, net, grid=Grid(4), refinements=3
    )


FLOWS = {"mixture": partial(conditional_flow, grid=Grid(4)), "network": random_flow}


@pytest.fixture(params=FLOWS)
def flow(request):
    return FLOWS[request.param]()


def test_density_is_the_exact_conditional_density():
    x, c = pairs(64, seed=1, dtype=torch.double)
    flow = conditional_flow(start=1e-3, end=math.pi / 2 - 1e-4, grid=Grid(24))
    error = flow.log_prob(x, c) - log_conditional(x, c)
    assert float(error.abs().max()) < 1e-3


def test_latents_are_standard_normal_whatever_the_condition():
    x, c = pairs(1000, seed=2, dtype=torch.double)
    z = conditional_flow(grid=Grid(8)).encode(x, c)
    # Also given the condition: no covariance with it, nor of the squares.
    for moment in (z, z.square() - 1):
        assert float(moment.mean(0).abs().max()) < 4 * 2**0.5 / 1000**0.5
        assert float((moment.T @ c / 1000).abs().max()) < 4 * 3.5 / 1000**0.5


def test_one_condition_is_an_ordinary_flow_and_equals_its_row(flow):
    x, c = pairs(4, seed=3, dtype=torch.double)
    z = torch.randn(4, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    decoded, log_det = flow.decode_and_log_det(z, c)
    log_prob = flow.log_prob(x, c)
    for i in range(4):
        one = flow.given(c[i])
        assert isinstance(one, InflationaryFlow)
        assert one.batch_shape == ()
        torch.testing.assert_close(one.decode(z[i]), decoded[i], rtol=0, atol=1e-10)
        torch.testing.assert_close(one.decode_and_log_det(z[i])[1], log_det[i], rtol=0, atol=1e-10)
        torch.testing.assert_close(one.log_prob(x[i]), log_prob[i], rtol=0, atol=1e-9)


def test_single_precision_rows_equal_given_to_1e_5():
    flow = conditional_flow(torch.float)
    x, c = pairs(6, seed=3)
    z = flow.encode(x, c)
    one = torch.stack([flow.given(c[i]).encode(x[i]) for i in range(6)])
    assert float((one - z).abs().max()) < 1e-5


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_draws_to_the_left_of_conditions(flow, lead):
    _, c = pairs(5, seed=4, dtype=torch.double)
    z = torch.randn(*lead, 5, 2, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    x = flow.decode(z, c)
    assert x.shape == z.shape
    torch.testing.assert_close(x[..., 2, :], flow.given(c[2]).decode(z[..., 2, :]), rtol=0, atol=1e-10)
    for size in (None, 4):
        assert float((flow.encode(x, c, batch_size=size) - z).abs().max()) < 1e-8


def test_conditions_broadcast_where_one_serves_several_rows(flow):
    _, c = pairs(3, seed=5, dtype=torch.double)
    given = flow.given(c[:, None])
    z = torch.randn(4, 3, 6, 2, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    x = given.decode(z)
    torch.testing.assert_close(x[:, 1], flow.given(c[1]).decode(z[:, 1]), rtol=0, atol=1e-10)
    assert float((given.encode(x) - z).abs().max()) < 1e-8
    assert given.log_prob(x).shape == (4, 3, 6)
    shared = flow.given(c).decode(z[0, 0, 0])
    assert shared.shape == (3, 2)
    with pytest.raises(ValueError, match="batch shape that fits"):
        flow.given(c).decode(z)


def test_rows_that_newton_solves_keep_their_conditions():
    flow = narrow_mixture()
    c = torch.linspace(-3, 3, 60, dtype=torch.double)[:, None]
    z = torch.linspace(-0.6, 0.6, 60, dtype=torch.double)[:, None]
    flow.refinements = 1
    x = flow.decode(z, c)
    back = flow.encode(x, c)
    assert float((back - z).abs().max()) < 1e-8
    # Newton was needed, and for some of the rows only.
    velocity, moved = flow.given(c).velocity, []

    class Spy(GivenVelocity):
        def of_rows(self, rows):
            moved.append(len(rows))
            return super().of_rows(rows)

    given = flow.given(c)
    given.velocity = Spy(velocity.inner, velocity.shift)
    given.encode(x)
    assert moved
    assert max(moved) < 60


def test_gradients_reach_the_condition_through_frame_and_shift(flow):
    c = torch.tensor([0.3, -0.5], dtype=torch.double, requires_grad=True)
    z = torch.tensor([0.4, 0.1], dtype=torch.double)
    assert torch.autograd.gradcheck(lambda c: flow.given(c).decode(z), (c,))
    flow.grid = Grid(2)
    many = torch.tensor([[0.3, -0.5], [1.0, 0.2]], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: flow.given(c).log_prob(z.expand(2, 2)), (many,))
    frame_only = flow.coefficient.sum(1)
    assert not torch.allclose(torch.autograd.grad(flow.given(c).decode(z).sum(), c)[0], frame_only)


def test_vmapped_conditions(flow):
    _, c = pairs(4, seed=6, dtype=torch.double)
    z = torch.randn(4, 2, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    vmapped = torch.func.vmap(lambda c, z: flow.given(c).decode(z))(c, z)
    torch.testing.assert_close(vmapped, flow.decode(z, c))


def test_checkpointed_gradients_refuse_to_lose_a_condition(flow):
    flow.gradient_checkpointing = True
    c = torch.tensor([0.3, -0.5], dtype=torch.double, requires_grad=True)
    z = torch.tensor([0.4, 0.1], dtype=torch.double, requires_grad=True)
    with pytest.raises(ValueError, match="checkpointing"):
        flow.given(c).decode(z)
    plain = flow.given(c.detach())
    gradient = torch.autograd.grad(plain.decode(z).sum(), z)[0]
    flow.gradient_checkpointing = False
    torch.testing.assert_close(gradient, torch.autograd.grad(flow.given(c.detach()).decode(z).sum(), z)[0])


def test_prior_in_a_plate():
    flow = conditional_flow(grid=Grid(4))
    x, c = pairs(50, seed=7, dtype=torch.double)
    prior = flow.prior(c)
    assert prior.batch_shape == (50,)
    assert prior.event_shape == (2,)
    torch.testing.assert_close(prior.log_prob(x), flow.log_prob(x, c))

    def model():
        with pyro.plate("objects", 50):
            return pyro.sample("x", flow.prior(c))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert model().shape == (50, 2)
    assert flow.sample(c, (3,), seed=0).shape == (3, 50, 2)


def test_transform_is_a_conditional_transform_module():
    flow = conditional_flow(grid=Grid(4))
    x, c = pairs(5, seed=7, dtype=torch.double)
    transform = flow.transform()
    assert isinstance(transform, ConditionalTransformModule)
    z = transform.condition(c).inv(x)
    torch.testing.assert_close(z, flow.encode(x, c))
    torch.testing.assert_close(transform.inv.condition(c)(x), z)
    base = dist.Normal(torch.zeros(2, dtype=torch.double), 1.0).expand([5, 2]).to_event(1)
    conditioned = dist.ConditionalTransformedDistribution(base, [transform]).condition(c)
    torch.testing.assert_close(conditioned.log_prob(x), flow.log_prob(x, c))


def test_caches_know_the_condition():
    flow = random_flow()
    _, c = pairs(2, seed=8, dtype=torch.double)
    z = torch.zeros(2, dtype=torch.double)
    first, second = (flow.given(c[i]).transform(cache_size=1) for i in (0, 1))
    assert not torch.allclose(first(z), second(z))
    torch.testing.assert_close(second(z), flow.given(c[1]).decode(z))


def test_given_flow_is_saved_and_loaded(tmp_path):
    flow = random_flow(torch.float)
    x, c = pairs(5, seed=9)
    flow.given(c[0]).save(tmp_path / "one.safetensors")
    one = ifpyro.load(tmp_path / "one.safetensors")
    assert type(one) is InflationaryFlow
    torch.testing.assert_close(one.log_prob(x), flow.given(c[0]).log_prob(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="flow of one condition"):
        flow.given(c).save(tmp_path / "many.safetensors")
    flow.save(tmp_path / "all.safetensors")
    loaded = ifpyro.load(tmp_path / "all.safetensors")
    torch.testing.assert_close(loaded.log_prob(x, c), flow.log_prob(x, c), rtol=0, atol=0)


def test_moving_a_given_flow_leaves_the_conditional_one(flow):
    _, c = pairs(2, seed=10, dtype=torch.double)
    z = torch.zeros(2, 2, dtype=torch.double)
    before = flow.decode(z, c)
    single = flow.given(c[0]).to(torch.float)
    assert single.dtype == torch.float
    assert float((single.decode(z.float()) - before[0]).abs().max()) < 1e-4
    torch.testing.assert_close(flow.decode(z, c), before, rtol=0, atol=0)
    double = copy.deepcopy(flow)
    assert float((double.to(torch.float).decode(z.float(), c) - before).abs().max()) < 1e-4


def test_wrong_conditions_are_refused(flow):
    with pytest.raises(ValueError, match=r"conditions of shape \(\*batch, 2\), got \(3,\)"):
        flow.given(torch.zeros(3))
    with pytest.raises(ValueError, match="missing entries"):
        flow.given(torch.tensor([torch.nan, 0.0]))
    with pytest.raises(TypeError, match="array of numbers"):
        flow.given(["a", "b"])


def test_wrong_columns_are_refused():
    parts = torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]
    for given in ([], [0, 1], [2], [0, 0]):
        with pytest.raises(ValueError, match="given expects"):
            ifpyro.ConditionalFlow.from_gaussian_mixture(*parts, given=given)
