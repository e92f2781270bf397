import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import TransformReparam

import ifpyro
from flows_zoo import FLOWS, Counting, latents, mixture, mixture_density, mixture_flow, mlp_flow
from ifpyro import FlowTransform
from ifpyro.flow.distribution import InverseFlowTransform
from ifpyro.flow.solver.grid import Grid

KINDS = ["mixture 2", "image", "simplex", "stack"]


@pytest.fixture(params=KINDS)
def flow(request):
    flow = FLOWS[request.param](torch.double)
    flow.grid, flow.refinements = Grid(6), 5  # a coarse map is as good a map
    return flow


def counted(dtype=torch.float32):
    flow = mlp_flow(2, dtype)
    flow.velocity = Counting(flow.velocity)
    return flow, flow.velocity


# -- the distribution -----------------------------------------------------------------------------------------------


def test_prior_is_the_flow(flow):
    prior = flow.prior()
    assert prior.event_shape == flow.event_shape
    assert prior.batch_shape == ()
    assert prior.has_rsample
    x = flow.sample(6, seed=0)
    torch.testing.assert_close(prior.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-8)
    assert prior.support.check(x).all()


def test_prior_samples_from_the_global_stream_like_any_distribution():
    prior = FLOWS["mixture 2"](torch.double).prior()
    pyro.set_rng_seed(0)
    x = prior.sample((3000,))
    pyro.set_rng_seed(0)
    assert torch.equal(x, prior.sample((3000,)))
    exact = mixture_density(*mixture(2))
    assert ((x.mean(0) - exact.mean).abs() < 4 * x.std(0) / 3000**0.5 + 1e-3).all()


def test_expand_and_to_event(flow):
    x = flow.sample((4, 3), seed=0)
    log_prob = flow.log_prob(x)
    expanded = flow.prior().expand([4, 3])
    assert expanded.batch_shape == (4, 3)
    assert expanded.sample().shape == x.shape
    torch.testing.assert_close(expanded.log_prob(x), log_prob, rtol=0, atol=1e-8)
    event = expanded.to_event(1)
    assert event.event_shape == (3, *flow.event_shape)
    torch.testing.assert_close(event.log_prob(x), log_prob.sum(-1), rtol=0, atol=1e-8)


def test_plates(flow):
    def model():
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            return pyro.sample("x", flow.prior())

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["value"].shape == (2, 3, *flow.event_shape)
    assert site["log_prob"].shape == (2, 3)
    torch.testing.assert_close(site["log_prob"], flow.log_prob(site["value"]), rtol=0, atol=1e-8)


def test_transform_reparam_leaves_the_latent_and_the_same_model(flow):
    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("x", flow.prior())

    trace = poutine.trace(poutine.reparam(model, {"x": TransformReparam()})).get_trace()
    z = trace.nodes["x_base"]["value"]
    assert z.shape == (3, flow.latent_dim)
    assert torch.equal(trace.nodes["x"]["value"], flow.decode(z))
    trace.compute_log_prob()
    standard = dist.Normal(0.0, 1.0).expand(z.shape).to_event(1)
    torch.testing.assert_close(trace.nodes["x_base"]["log_prob"], standard.log_prob(z))
    assert float(trace.log_prob_sum()) == pytest.approx(float(standard.log_prob(z).sum()), abs=1e-9)


def test_reparam_of_a_latent_costs_one_solve_without_jacobians():
    flow, counter = counted()
    model = poutine.reparam(lambda: pyro.sample("x", flow.prior()), {"x": TransformReparam()})
    flow.decode(torch.zeros(2))
    counter.calls = 0
    poutine.trace(model).get_trace().log_prob_sum()
    assert counter.calls == flow.grid.evaluations


def test_prior_among_other_transforms(flow):
    shifted = dist.TransformedDistribution(flow.prior(), [dist.transforms.AffineTransform(1.0, 2.0)])
    x = flow.sample(4, seed=0)
    expected = flow.log_prob(x) - flow.event_shape.numel() * torch.log(torch.tensor(2.0).double())
    torch.testing.assert_close(shifted.log_prob(1 + 2 * x), expected, rtol=0, atol=1e-7)


# -- the transform --------------------------------------------------------------------------------------------------


def test_transform_contract(flow):
    transform = flow.transform()
    z = latents(flow, 2, 3)
    x = transform(z)
    assert transform.bijective
    assert transform.forward_shape(z.shape) == x.shape
    assert transform.inverse_shape(x.shape) == z.shape
    assert transform.domain.event_dim == 1
    assert transform.codomain.event_dim == len(flow.event_shape)
    assert transform.codomain.check(x).all()
    torch.testing.assert_close(transform.inv(x), z, rtol=0, atol=1e-7)
    log_det = transform.log_abs_det_jacobian(z, x)
    assert log_det.shape == (2, 3)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, z), -log_det)
    torch.testing.assert_close(log_det, flow.decode_and_log_det(z)[1])


@pytest.mark.parametrize("cache_size", [0, 1])
def test_inverse_of_the_inverse(cache_size):
    transform = FLOWS["mixture 2"](torch.double).transform(cache_size)
    assert transform.inv.inv is transform
    assert transform.inv is transform.inv
    assert transform.with_cache(cache_size) is transform
    other = transform.with_cache(1 - cache_size)
    assert isinstance(other, FlowTransform)
    assert other.flow is transform.flow
    assert isinstance(transform.inv.with_cache(1 - cache_size), InverseFlowTransform)
    with pytest.raises(ValueError, match="cache_size"):
        transform.with_cache(2)


def test_no_second_solve_after_a_cached_call():
    flow, counter = counted()
    transform = flow.transform(cache_size=1)
    z = latents(flow, 5)
    x = transform(z)
    spent = counter.calls
    assert spent <= 2 * flow.grid.evaluations
    log_det = transform.log_abs_det_jacobian(z, x)
    assert transform.inv(x) is z
    assert transform(z) is x
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, z), -log_det)
    assert counter.calls == spent
    fresh = x.clone()
    back = transform.inv(fresh)
    spent = counter.calls
    assert transform(back) is fresh
    torch.testing.assert_close(transform.log_abs_det_jacobian(back, fresh), log_det, rtol=1e-4, atol=1e-4)
    assert counter.calls == spent


def test_log_det_without_a_cache_inverts_nothing():
    flow, counter = counted()
    transform = flow.transform()
    z = latents(flow, 5)
    x = transform(z)
    counter.calls = 0
    transform.log_abs_det_jacobian(z, x)
    assert counter.calls == flow.grid.evaluations


def test_cached_density_inverts_once():
    flow, counter = counted()
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [flow.transform(cache_size=1)])
    x = density.sample((4,))
    spent = counter.calls
    found = density.log_prob(x)
    assert counter.calls == spent
    torch.testing.assert_close(found, flow.log_prob(x), rtol=0, atol=1e-4)


def changed_in_place(flow, transform, z):
    z.mul_(2)


def coarse_to_fine(flow, transform, z):
    pass


def new_weights(flow, transform, z):
    with torch.no_grad():
        flow.velocity.outlet.weight.mul_(2)


def other_steps(flow, transform, z):
    flow.grid = Grid(5)


@pytest.mark.parametrize("change", [changed_in_place, coarse_to_fine, new_weights, other_steps])
def test_cache_never_answers_for_another_map(change):
    flow = mlp_flow(2, torch.float32)
    transform = flow.transform(cache_size=1)
    z = latents(flow, 5)
    if change is coarse_to_fine:
        with ifpyro.fidelity("coarse"):
            stale = transform(z)
    else:
        stale = transform(z)
    change(flow, transform, z)
    found = transform(z)
    torch.testing.assert_close(found, flow.decode(z), rtol=0, atol=1e-6)
    assert not torch.equal(found, stale)
    log_det = transform.log_abs_det_jacobian(z, found)
    torch.testing.assert_close(log_det, flow.decode_and_log_det(z)[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_never_backward_a_second_time(cache_size):
    flow = mlp_flow(2, torch.double)
    transform = flow.transform(cache_size)
    z = latents(flow, 4).requires_grad_(True)
    gradients = []
    for _ in range(2):
        z.grad = None
        x = transform(z)
        (x.square().sum() + transform.log_abs_det_jacobian(z, x).sum()).backward()
        gradients.append(z.grad.clone())
    x = transform(z)
    z.grad = None
    x.square().sum().backward()
    transform.log_abs_det_jacobian(z, x).sum().backward()
    gradients.append(z.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])
    density = dist.TransformedDistribution(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), [transform])
    y = flow.sample(4, seed=0).requires_grad_(True)
    first = torch.autograd.grad(density.log_prob(y).sum(), y)[0]
    second = torch.autograd.grad(density.log_prob(y).sum(), y)[0]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_cached_without_gradients_then_asked_with_them(cache_size):
    flow = mlp_flow(2, torch.double)
    transform = flow.transform(cache_size)
    z = latents(flow, 4).requires_grad_(True)
    with torch.no_grad():
        transform(z)
    x = transform(z)
    assert x.requires_grad
    with torch.no_grad():
        x = transform(z)
    log_det = transform.log_abs_det_jacobian(z, x)
    assert log_det.requires_grad


@pytest.mark.parametrize("name", ["mixture 2", "image", "positive"])
def test_gradient_of_the_density_against_finite_differences(name):
    flow = FLOWS[name](torch.double)
    prior = flow.prior()
    x = flow.sample(1, seed=2)[0]
    gradient = torch.func.grad(prior.log_prob)(x).flatten()
    h = 1e-5
    for k in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=torch.double)
        shift[k] = h
        shift = shift.reshape(x.shape)
        slope = (prior.log_prob(x + shift) - prior.log_prob(x - shift)) / (2 * h)
        assert float(gradient[k]) == pytest.approx(float(slope), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_vmap_and_grad(flow, cache_size):
    transform = flow.transform(cache_size)
    base = dist.Normal(torch.zeros(flow.latent_dim).double(), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [transform], validate_args=False)
    z = latents(flow, 5)
    x = flow.decode(z)
    torch.testing.assert_close(torch.func.vmap(transform)(z), x)
    torch.testing.assert_close(torch.func.vmap(density.log_prob)(x), flow.log_prob(x), rtol=1e-7, atol=1e-7)
    pulled = torch.func.vmap(torch.func.grad(lambda v: transform(v).sum()))(z)
    leaf = z.clone().requires_grad_(True)
    expected = torch.autograd.grad(flow.decode(leaf).sum(), leaf)[0]
    torch.testing.assert_close(pulled, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform(z), x)  # and no wrapper stayed behind
    assert transform.log_abs_det_jacobian(z, x).isfinite().all()


def through_pickle(obj):
    return pickle.loads(pickle.dumps(obj))


def through_torch(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_training_a_cached_transform():
    flow = mlp_flow(2, torch.float32).requires_grad_(True)
    transform = flow.transform(cache_size=1)
    z = latents(flow, 3)
    with torch.no_grad():
        transform(z)
    for _ in range(2):
        assert transform(z).requires_grad
        transform(z).sum().backward()


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, through_pickle, through_torch])
def test_copies_and_pickles(flow, again, cache_size):
    transform = flow.transform(cache_size)
    z = latents(flow, 3).requires_grad_(True)
    x = transform(z)
    transform.inv(x.detach())
    other = again(transform)
    assert torch.equal(other(z), x)
    assert other.inv.inv is other
    inverse = again(transform.inv)
    assert isinstance(inverse, InverseFlowTransform)
    assert inverse.inv.inv is inverse
    torch.testing.assert_close(inverse(x), z, rtol=0, atol=1e-7)
    if again is not copy.copy:
        assert other.flow is not flow
        assert inverse.inv.flow is not flow
    prior = again(flow.prior())
    torch.testing.assert_close(prior.log_prob(x.detach()), flow.log_prob(x.detach()), rtol=0, atol=1e-8)


def test_moves_of_dtype_reach_the_cache():
    flow = mlp_flow(2, torch.float32)
    transform = flow.transform(cache_size=1)
    z = latents(flow, 3)
    x = transform(z)
    transform.double()
    assert flow.dtype == torch.double
    assert transform(z.double()).dtype == torch.double
    torch.testing.assert_close(transform(z.double()).float(), x, rtol=1e-5, atol=1e-5)
    assert flow.prior().sample().dtype == torch.double
    with pytest.raises(TypeError, match="float64"):
        transform(z)


def test_moves_of_device():
    flow = mlp_flow(2, torch.float32).to("meta")
    assert flow.log_prob(torch.empty(3, 2, device="meta")).shape == (3,)
    with pytest.raises(TypeError, match="on meta"):
        flow.transform()(torch.zeros(3, 2))


def test_weights_of_the_flow_are_parameters_of_the_transform():
    flow = mlp_flow(2, torch.float32).requires_grad_(True)
    transform = flow.transform()
    assert set(transform.parameters()) == set(flow.parameters())
    (-flow.prior().log_prob(flow.sample(5, seed=0)).mean()).backward()
    assert all(p.grad is not None for p in transform.parameters())


def test_wrong_shapes_are_refused():
    transform = mixture_flow(2, torch.double).transform()
    with pytest.raises(ValueError, match="ending in"):
        transform.forward_shape(torch.Size([3]))
    with pytest.raises(ValueError, match="ending in"):
        transform.inverse_shape(torch.Size([]))
