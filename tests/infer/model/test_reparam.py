"""Flow-prior sites through their latent: names, shapes, densities, real flows, and Pyro's own NUTS."""

from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz import ess
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import MCMC, NUTS
from pyro.poutine.runtime import _PYRO_STACK

from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.axes.schedule import Schedule
from ifpyro.flow.flow import InflationaryFlow
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.fidelity import fidelity
from ifpyro.flow.solver.grid import Grid
from ifpyro.infer.engines.smc import SMC
from ifpyro.infer.model.batched import BatchedModel
from ifpyro.infer.model.density import log_density_and_grad
from ifpyro.infer.model.reparam import has_flow, reparam
from models_zoo import CASES, flow_prior, one_flow


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trace(model, *args, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return poutine.trace(model).get_trace(*args)


def gaussian_flow(mean=(1.0, -2.0), covariance=((2.0, 0.6), (0.6, 0.5))):
    """A flow whose density is that Gaussian: its velocity is zero, so one step of any solver is exact."""
    return InflationaryFlow.from_gaussian_mixture(
        torch.ones(1), torch.tensor([mean]), torch.tensor([covariance]), grid=Grid(steps=1), refinements=1
    )


def mixture_flow():
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    return InflationaryFlow.from_gaussian_mixture(
        torch.tensor([0.3, 0.7]),
        means,
        torch.stack([0.3 * torch.eye(2), torch.diag(torch.tensor([0.2, 0.6]))]),
    )


def mixture_model(y, flow):
    x = pyro.sample("x", flow.prior())
    pyro.sample("y", dist.Normal(x[..., 1], 0.5), obs=y)


# -- what reparam does -------------------------------------------------------------------------------------


def test_names_shapes_and_plates():
    nodes = trace(reparam(CASES["flows in a plate"].model), torch.zeros(4)).nodes
    assert nodes["x_base"]["value"].shape == nodes["x"]["value"].shape == (4, 3)
    assert not nodes["x_base"]["is_observed"]
    assert nodes["x"]["is_observed"]
    assert float(nodes["x"]["fn"].log_prob(nodes["x"]["value"]).sum()) == 0.0
    assert [frame.name for frame in nodes["x_base"]["cond_indep_stack"]] == ["objects"]
    flow = nodes["x_base"]["value"]
    torch.testing.assert_close(nodes["x"]["value"], flow_prior().transforms[0](flow))


def test_other_transformed_distributions_are_left_alone():
    nodes = trace(reparam(CASES["ordered"].model), torch.tensor(0.0)).nodes
    assert "c_base" not in nodes
    assert not nodes["c"]["is_observed"]


def test_observed_flow_sites_are_left_alone():
    x = torch.tensor([0.1, 0.2, 0.3])

    def model():
        pyro.sample("x", flow_prior(), obs=x)

    nodes = trace(reparam(model)).nodes
    assert set(nodes) & {"x", "x_base"} == {"x"}
    conditioned = trace(reparam(pyro.condition(one_flow, data={"x": x})), torch.tensor(0.0))
    torch.testing.assert_close(conditioned.nodes["x"]["value"], x)
    torch.testing.assert_close(conditioned.nodes["x"]["fn"].log_prob(x), flow_prior().log_prob(x))


def test_masks_move_to_the_latent():
    mask = torch.tensor([True, False, True, False])

    def model():
        with pyro.plate("objects", 4):
            pyro.sample("x", flow_prior().expand([4]).mask(mask))

    tr = trace(reparam(model))
    tr.compute_log_prob()
    base = tr.nodes["x_base"]
    expected = dist.Normal(0.0, 1.0).log_prob(base["value"]).sum(-1) * mask
    torch.testing.assert_close(base["log_prob"], expected)
    batched = BatchedModel(model)
    assert batched.batching == "plate"
    assert batched.gaussian_prior
    assert "masked-out" in batched.describe()  # nothing depends on them


def test_a_chain_of_transforms_with_latent_parameters():
    """x = mu + T(z): the flow is one part of the transform, another part depends on a latent."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        shift = dist.transforms.AffineTransform(mu.unsqueeze(-1), 1.0, event_dim=1)
        prior = flow_prior()
        x = pyro.sample("x", dist.TransformedDistribution(prior.base_dist, [*prior.transforms, shift]))
        pyro.sample("y", dist.Normal(x[..., 0], 0.3), obs=y)

    batched = BatchedModel(model, (torch.tensor(0.4),))
    assert batched.batching == "plate"
    assert batched.gaussian_prior
    q = batched.sample_prior(5, generator())
    sites = batched.sites(q)
    torch.testing.assert_close(sites["x"], flow_prior().transforms[0](sites["x_base"]) + sites["mu"][:, None])
    torch.testing.assert_close(batched.unconstrain({"mu": sites["mu"], "x": sites["x"]}), q, rtol=1e-3, atol=1e-3)


def test_what_counts_as_a_flow():
    prior = flow_prior()
    composed = torch.distributions.ComposeTransform([*prior.transforms, dist.transforms.ExpTransform()])
    assert has_flow(prior)
    assert has_flow(prior.expand([2]).to_event(1))
    assert has_flow(prior.mask(torch.tensor(True)))
    assert has_flow(dist.TransformedDistribution(prior.base_dist, [composed]))
    assert not has_flow(prior.base_dist)
    assert not has_flow(dist.LogNormal(0.0, 1.0))


def test_only_models_are_accepted():
    with pytest.raises(TypeError, match="expects a Pyro model"):
        reparam(torch.zeros(3))


# -- scales, masks, and transforms around a flow -------------------------------------------------------------


@cache
def two_bumps():
    """About ``0.4 N(-2, 0.5) + 0.6 N(1, 0.7)``: a flow that is solved in few steps has a density of its own."""
    variances = torch.tensor([0.5**2, 0.7**2]).reshape(2, 1, 1)
    flow = InflationaryFlow.from_gaussian_mixture(
        torch.tensor([0.4, 0.6]), torch.tensor([[-2.0], [1.0]]), variances, grid=Grid(4, method="euler")
    )
    return flow.prior()


def bumps(prior, y, scale=1.0, mask=None):
    with poutine.scale(scale=scale), poutine.mask(mask=True if mask is None else mask):
        x = pyro.sample("x", prior)
    pyro.sample("y", dist.Normal(x[..., 0], 1.5), obs=y)


def by_quadrature(prior, y, power):
    """Mean and standard deviation of ``p(x)^power N(y; x, 1.5)``."""
    x = torch.linspace(-10.0, 10.0, 801)
    log_density = power * prior.log_prob(x[:, None]) + dist.Normal(x, 1.5).log_prob(y)
    weight = log_density.softmax(0)
    mean = float(weight @ x)
    return mean, float((weight @ (x - mean) ** 2).sqrt())


@pytest.mark.parametrize("power", [0.3, 3.0])
def test_a_scaled_prior_is_a_power_of_its_density(power):
    """And not a power of the latent's, which has sd 1.68 at 0.3 and 1.12 at 3."""
    prior, y = two_bumps(), torch.tensor(-0.5)
    mean, sd = by_quadrature(prior, y, power)
    assert sd == pytest.approx({0.3: 1.38, 3.0: 1.42}[power], abs=0.1)
    batched = BatchedModel(partial(bumps, prior, scale=power), (y,))
    z = torch.linspace(-5.0, 5.0, 801)[:, None]
    weight = sum(batched(z)).softmax(0)
    x = batched.sites(z)["x"][:, 0]
    found = float(weight @ x)
    assert found == pytest.approx(mean, abs=2e-3)
    assert float((weight @ (x - found) ** 2).sqrt()) == pytest.approx(sd, abs=2e-3)


def test_a_scaled_prior_in_smc():
    prior, y = two_bumps(), torch.tensor(-0.5)
    mean, sd = by_quadrature(prior, y, 0.3)
    model = partial(bumps, prior, scale=0.3)
    x = SMC(model, 256, max_moves=4, seed=2, progress=False).run(y).get_samples()["x"][:, 0]
    assert float(x.mean()) == pytest.approx(mean, abs=4 * sd / 150**0.5)
    assert float(x.std()) == pytest.approx(sd, abs=4 * sd / 300**0.5)  # the latent's power would have 1.68


SCALED = {
    "a number": lambda y: bumps(two_bumps(), y, scale=0.3),
    "a tensor": lambda y: bumps(two_bumps(), y, scale=torch.tensor(2.0)),
    "around the model": poutine.scale(lambda y: bumps(two_bumps(), y), scale=1.7),
    "masked": lambda y: bumps(two_bumps(), y, mask=torch.tensor(False)),
    "masked and scaled": lambda y: bumps(two_bumps().mask(torch.tensor(True)), y, scale=0.5),
    "in a plate": None,
}


def plated(y):
    with pyro.plate("rows", 3), poutine.scale(scale=torch.tensor([0.5, 1.0, 2.0])):
        x = pyro.sample("x", two_bumps().mask(torch.tensor([True, False, True])))
        pyro.sample("y", dist.Normal(x[..., 0], 1.5), obs=y)


@pytest.mark.parametrize("name", SCALED)
def test_the_density_is_pyros_at_the_same_data(name):
    """In the user's space: ``p(q) = p(x) |dx/dq|`` with the log-density that Pyro's own trace gives at ``x``."""
    model = SCALED[name] or plated
    y = torch.tensor(-0.5) if SCALED[name] else torch.tensor([-0.5, 0.2, 1.0])
    batched = BatchedModel(model, (y,))
    q = torch.randn(3, batched.dim, generator=generator(1))
    x = batched.sites(q)["x"]
    found = sum(batched(q))
    for k in range(3):
        conditioned = poutine.condition(model, data={"x": x[k]})
        with poutine.trace() as tracer:  # an observation and a latent have the same density
            conditioned(y)
        z = q[k].reshape(x[k].shape)
        log_det = two_bumps().transforms[0].log_abs_det_jacobian(z, x[k]).sum()
        torch.testing.assert_close(found[k], tracer.trace.log_prob_sum() + log_det, rtol=1e-4, atol=1e-4)


def test_pyros_own_algorithms_see_the_same_density():
    """The handlers of Pyro add up to it as well: for NUTS and SVI on ``reparam(model)``."""
    y = torch.tensor(-0.5)
    for model in (SCALED["a number"], SCALED["masked"]):
        batched = BatchedModel(model, (y,))
        q = batched.sample_prior(3, generator(2))
        for row, expected in zip(q, sum(batched(q)), strict=True):
            with poutine.trace() as tracer:
                poutine.condition(reparam(model), data={"x_base": row})(y)
            torch.testing.assert_close(tracer.trace.log_prob_sum(), expected, rtol=1e-4, atol=1e-4)


def test_a_subsample_repeats_latents_and_not_their_density():
    """Every row of a subsample stands for others, with latents of their own: nothing is to be completed."""

    def model():
        with pyro.plate("rows", 10, subsample_size=2, dim=-1):
            pyro.sample("x", two_bumps())

    nodes = trace(reparam(model)).nodes
    assert float(nodes["x_base"]["scale"]) == 5.0
    assert "x_scaled" not in nodes


def test_padding_costs_no_log_determinant(monkeypatch):
    """A mask over entries that matter to nothing: they keep their prior, and the completing factor is never asked."""
    monkeypatch.setattr("ifpyro.infer.model.reparam.Unit._terms", None)
    mask = torch.tensor([True, False])

    def model(y):
        with pyro.plate("rows", 2), poutine.mask(mask=mask):
            x = pyro.sample("x", two_bumps())
            pyro.sample("y", dist.Normal(x[..., 0], 1.5), obs=y)

    monkeypatch.undo()
    batched = BatchedModel(model, (torch.tensor([-0.5, 0.0]),))
    monkeypatch.setattr("ifpyro.infer.model.reparam.Unit._terms", None)
    q = torch.randn(4, 2, generator=generator(1))
    expected = dist.Normal(0.0, 1.0).log_prob(q).sum(-1)
    torch.testing.assert_close(batched(q)[0], expected)
    assert batched(q)[1].isfinite().all()


AROUND = {
    "affine": lambda prior: dist.TransformedDistribution(prior, [dist.transforms.AffineTransform(1.0, 2.0)]),
    "twice": lambda prior: dist.TransformedDistribution(
        dist.TransformedDistribution(prior, [dist.transforms.AffineTransform(1.0, 2.0)]),
        [dist.transforms.ExpTransform()],
    ),
    "of an event": lambda prior: dist.TransformedDistribution(
        prior.expand([3]).to_event(1), [dist.transforms.AffineTransform(torch.zeros(3, 1), 2.0, event_dim=2)]
    ),
    "an event of it": lambda prior: dist.TransformedDistribution(
        prior.expand([3]), [dist.transforms.AffineTransform(1.0, 2.0, event_dim=1)]
    ).to_event(1),
    "masked": lambda prior: dist.TransformedDistribution(prior, [dist.transforms.ExpTransform()]).mask(True),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_flow_under_other_transforms_is_moved_in_its_latent(name):
    """Wherever the flow stands, what moves is ``N(0, I)``; the density of what is read is that of the model."""
    around = AROUND[name](two_bumps())

    def model():
        pyro.sample("x", around)

    assert has_flow(around)
    batched = BatchedModel(model)
    assert batched.gaussian_prior
    assert batched.latents == ("x_base",)
    q = batched.sample_prior(4, generator(1))
    x = batched.sites(q)["x"]
    assert x.shape == (4, *around.event_shape)
    torch.testing.assert_close(batched.unconstrain({"x": x}), q, rtol=1e-3, atol=1e-3)
    flow, z = two_bumps().transforms[0], q.reshape(4, -1, 1)
    expected = flow(z).reshape(4, *around.event_shape)
    for transform in around_flow(name):
        expected = transform(expected)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def around_flow(name):
    affine, exponential = dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.ExpTransform()
    no_shift = dist.transforms.AffineTransform(0.0, 2.0)
    found = {"twice": [affine, exponential], "masked": [exponential], "of an event": [no_shift]}
    return found.get(name, [affine])


def test_names_under_a_scope_are_prefixed_once():
    @scope(prefix="part")
    def model(y):
        x = pyro.sample("x", two_bumps())
        pyro.sample("y", dist.Normal(x[..., 0], 1.5), obs=y)

    assert BatchedModel(model, (torch.tensor(0.1),)).latents == ("part/x_base",)
    assert {"part/x", "part/x_base", "part/y"} <= set(trace(reparam(model), torch.tensor(0.1)).nodes)


def test_a_mask_within_an_event_is_refused():
    inner = two_bumps().expand([2]).mask(torch.tensor([True, False])).to_event(1)

    def model():
        pyro.sample("x", inner)

    with pytest.raises(ValueError, match=r"site 'x' has a mask inside its event: apply .mask\(...\) after"):
        BatchedModel(model)


# -- real flows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["plate", "vmap", "loop"])
@pytest.mark.parametrize("level", ["fine", "coarse"])
def test_a_real_flow_under_every_batching(batching, level):
    flow, y = mixture_flow(), torch.tensor(0.5)
    batched = BatchedModel(mixture_model, (y,), {"flow": flow}, batching=batching)
    assert batched.gaussian_prior
    q = batched.sample_prior(5, generator())
    with fidelity(level):
        log_prior, log_likelihood, gradient = log_density_and_grad(batched, q)
        z = q.clone().requires_grad_(True)
        x = flow.decode(z)
        expected = dist.Normal(x[:, 1], 0.5).log_prob(y)
        (slope,) = torch.autograd.grad((expected - 0.5 * z.square().sum(-1)).sum(), z)
        torch.testing.assert_close(batched.sites(q)["x"], x.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_prior, dist.Normal(0.0, 1.0).log_prob(q).sum(-1))
    torch.testing.assert_close(log_likelihood, expected.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-3)


def test_a_real_flow_indexed_from_the_left_and_in_a_plate():
    flow = mixture_flow()

    def left(y):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[1], 0.5), obs=y)

    def plated(y):
        with pyro.plate("objects", len(y)):
            x = pyro.sample("x", flow.prior())
            pyro.sample("y", dist.Normal(x[..., 1], 0.5), obs=y)

    y = torch.tensor(0.5)
    by_vmap = BatchedModel(left, (y,))
    assert by_vmap.batching == "vmap"
    assert "cannot batch the log-density by plate" in by_vmap.describe()
    q = by_vmap.sample_prior(6, generator())
    straight = BatchedModel(mixture_model, (y, flow))
    for ours, expected in zip(log_density_and_grad(by_vmap, q), log_density_and_grad(straight, q), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)

    data = torch.tensor([0.5, -1.0, 2.0])
    batched = BatchedModel(plated, (data,))
    assert batched.batching == "plate"
    q = batched.sample_prior(6, generator())
    expected = sum(BatchedModel(mixture_model, (data[i], flow))(q[:, 2 * i : 2 * i + 2])[1] for i in range(3))
    torch.testing.assert_close(batched(q)[1], expected, rtol=1e-3, atol=1e-3)
    assert batched.sites(q)["x"].shape == (6, 3, 2)


def test_data_become_latents_of_a_real_flow():
    flow = mixture_flow()
    batched = BatchedModel(mixture_model, (torch.tensor(0.5), flow))
    q = batched.sample_prior(6, generator())
    x = batched.sites(q)["x"]
    torch.testing.assert_close(batched.unconstrain({"x": x}), q, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batched.unconstrain({"x_base": q}), q)


# -- Pyro's own MCMC ---------------------------------------------------------------------------------------


def linear_gaussian(y, flow):
    """x ~ N(m, S), y ~ N(x_0, 0.5^2)."""
    x = pyro.sample("x", flow.prior())
    pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)


def exact_posterior(y, mean, covariance):
    """Of `linear_gaussian`: mean and covariance."""
    gain = covariance[:, 0] / (covariance[0, 0] + 0.25)
    return mean + gain * (y - mean[0]), covariance - torch.outer(gain, covariance[0])


@pytest.mark.slow
@pytest.mark.parametrize("reparameterised", [True, False])
def test_pyros_nuts_finds_the_exact_posterior(reparameterised):
    """With reparam on the latent, and without it through the flow's inverse and log-determinant."""
    mean, covariance = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.6], [0.6, 0.5]])
    model = partial(linear_gaussian, flow=gaussian_flow())
    y = torch.tensor(2.5)
    draws = 200 if reparameterised else 60
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        mcmc = MCMC(
            NUTS(reparam(model) if reparameterised else model, max_tree_depth=3),
            num_samples=draws,
            warmup_steps=40,
            disable_progbar=True,
        )
        mcmc.run(y)
    samples = mcmc.get_samples()
    assert set(samples) == ({"x_base"} if reparameterised else {"x"})
    x = gaussian_flow().decode(samples["x_base"]) if reparameterised else samples["x"]
    expected_mean, expected_covariance = exact_posterior(y, mean, covariance)
    for j in range(2):
        size = min(float(ess(x[None, :, j].detach().numpy())), draws)
        sd = expected_covariance[j, j].sqrt()
        assert abs(x[:, j].mean() - expected_mean[j]) < 4 * sd / size**0.5
        assert abs(x[:, j].std() / sd - 1) < 4 / (2 * size) ** 0.5
    assert _PYRO_STACK == []


@pytest.mark.slow
def test_pyros_chains_in_several_processes(monkeypatch):
    """The model, its flow and reparam travel to other processes."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 3)  # or Pyro runs one chain after another
    mcmc = MCMC(
        NUTS(reparam(partial(linear_gaussian, flow=gaussian_flow())), max_tree_depth=3),
        num_samples=8,
        warmup_steps=4,
        num_chains=2,
        mp_context="spawn",
        disable_progbar=True,
    )
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        mcmc.run(torch.tensor(2.5))
    samples = mcmc.get_samples(group_by_chain=True)["x_base"]
    assert samples.shape == (2, 8, 2)
    assert bool(torch.isfinite(samples).all())
    assert not torch.equal(samples[0], samples[1])


def test_a_flow_retrained_in_place_is_seen():
    """New weights, new density: nothing computed from old ones may survive in a batched model or a flow."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        basis = Basis.from_moments(torch.zeros(2).double(), torch.eye(2).double(), torch.zeros(2))
        flow = InflationaryFlow(basis, Schedule.details_first(), MLP(2, width=16, blocks=1), grid=Grid(steps=4))
        flow.requires_grad_(True)
        steps = [0.05 * torch.randn_like(p) for p in flow.parameters()]

    batched = BatchedModel(mixture_model, (torch.tensor(0.5), flow))
    q = batched.sample_prior(4, generator())
    before = log_density_and_grad(batched, q)[1]
    with torch.no_grad():
        for p, step in zip(flow.parameters(), steps, strict=True):
            p.add_(step)
    after = log_density_and_grad(batched, q)[1]
    assert not torch.allclose(before, after)
    with torch.no_grad():
        expected = dist.Normal(flow.decode(q)[:, 1], 0.5).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
    assert all(p.requires_grad and p.grad is None for p in flow.parameters())
