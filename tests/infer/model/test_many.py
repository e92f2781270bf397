"""Many data sets in one batch: every row is the single-data-set density of its own data."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ifpyro import HMC, MCMC, SMC, EllipticalSlice
from ifpyro.core.errors import ModelError
from ifpyro.infer.model.batched import BatchedModel
from ifpyro.infer.model.many import ManyDataSets
from ifpyro.infer.model.reparam import reparam
from ifpyro.infer.model.simulate import Simulate, with_data
from models_zoo import CASES, Case, flow_prior


def uses_what_was_observed(y):
    """The value of an observed site goes on through the model: from the left, which is wrong for rows."""
    x = pyro.sample("x", flow_prior())
    seen = pyro.sample("y", dist.Normal(x[..., :2], 0.5).to_event(1), obs=y)
    pyro.sample("w", dist.Normal(seen[0] + x[..., 0], 1.0), obs=torch.tensor(0.1))


def from_the_right(y):
    x = pyro.sample("x", flow_prior())
    seen = pyro.sample("y", dist.Normal(x[..., :2], 0.5).to_event(1), obs=y)
    pyro.sample("w", dist.Normal(seen[..., 0] + x[..., 0], 1.0), obs=torch.tensor(0.1))


def branches_on_data(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    seen = pyro.sample("y", dist.Normal(x, 0.5), obs=y)
    pyro.sample("w", dist.Normal(-x if seen.sum() > 0 else x, 0.5), obs=torch.tensor(0.1))


NAMES = ("flows in a plate", "schools", "nested plates", "shape changing", "latents in float64", "loop plate")
MANY = {name: CASES[name] for name in (*NAMES, "from the left", "missing entries", "branching", "constant likelihood")}
MANY["observed value, left"] = Case(uses_what_was_observed, (torch.zeros(2),), batching="vmap")
MANY["observed value, right"] = Case(from_the_right, (torch.zeros(2),))
MANY["branches on data"] = Case(branches_on_data, (torch.zeros(()),), batching="loop")


def simulated(case, count=4):
    torch.manual_seed(0)
    sets = []
    for _ in range(count):
        with Simulate() as simulation:
            reparam(case.model)(*case.args, **case.kwargs)
        sets.append(simulation.data)
    return sets, {name: torch.stack([data[name] for data in sets]) for name in sets[0]}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_row_is_the_density_of_its_own_data(name):
    case = MANY[name]
    sets, data = simulated(case)
    many = ManyDataSets(case.model, case.args, case.kwargs, data)
    assert many.batching == case.batching
    q = many.sample_prior(12, torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.linspace(0.5, 2.0, 12, dtype=q.dtype)

    def evaluate(density, q, weights):
        terms = density(q)
        return *terms, torch.autograd.grad((weights * sum(terms)).sum(), q)[0]

    together = evaluate(many, q, weights)
    for k, own in enumerate(sets):
        rows = slice(3 * k, 3 * k + 3)
        one = BatchedModel(with_data(case.model, own), case.args, case.kwargs)
        alone = evaluate(one, q[rows].detach().requires_grad_(), weights[rows])
        for ours, exact in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[rows], exact, rtol=1e-4, atol=1e-4)

    in_chunks = ManyDataSets(case.model, case.args, case.kwargs, data, batch_size=5)
    for ours, exact in zip(evaluate(in_chunks, q.detach().requires_grad_(), weights), together, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    assert many.sites(q.detach()).keys() <= set(many.base.sites(q.detach()))


def test_simulated_data_have_the_shape_of_the_observed():
    for name in ("nested plates", "constant likelihood", "missing entries", "undeclared likelihood"):
        case = CASES[name]
        _, data = simulated(case, 2)
        trace = pyro.poutine.trace(reparam(case.model)).get_trace(*case.args, **case.kwargs)
        for site, values in data.items():
            assert values.shape[1:] == trace.nodes[site]["value"].shape
            assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize(("name", "message"), [("factors", "has a factor, 'f'"), ("masks and scales", "'x' is scaled")])
def test_what_cannot_be_simulated_is_refused(name, message):
    with pytest.raises(ModelError, match=message):
        simulated(CASES[name])


def conjugate(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x[..., 0] + 0.5 * x[..., 1], 0.3), obs=y)


DATA = {"y": torch.tensor([-2.0, -0.5, 0.0, 0.7, 3.0])}


def exact_moments():
    a = torch.tensor([1.0, 0.5])
    gain = a / (a @ a + 0.3**2)
    return gain * DATA["y"][:, None], torch.eye(2) - torch.outer(gain, a)


@pytest.mark.parametrize("engine", ["smc", "hmc", "hmc without jumps", "hmc from the prior"])
def test_engines_sample_every_posterior(engine):
    density = ManyDataSets(conjugate, (torch.zeros(()),), {}, DATA)
    if engine == "smc":
        run = SMC(density, 5 * 512, num_islands=10, seed=0, progress=False).run_density(density)
        draws = run.pooled(5 * 512).reshape(5, 512, 2)
        log_z = run.island_log_evidence.reshape(5, 2).exp().mean(1).log()
        exact = dist.Normal(0.0, (1.25 + 0.3**2) ** 0.5).log_prob(DATA["y"])
        assert (log_z - exact).abs().max() < 0.25  # particles: 512 a data set
    else:
        init = "prior" if engine == "hmc from the prior" else "smc"
        kernel = HMC(density, jumps=engine != "hmc without jumps")
        mcmc = MCMC(kernel, 100, 80, 5 * 8, init=init, smc_particles=5 * 64, seed=0, progress=False)
        draws = mcmc.run().positions().reshape(5, 8 * 100, 2)
    mean, covariance = exact_moments()
    for values, exact_mean in zip(draws, mean, strict=True):
        # effective draws are at least a third of 512, and of 800
        assert ((values.mean(0) - exact_mean).abs() < 4 * (covariance.diagonal() / 170).sqrt()).all()
        assert (values.T.cov() - covariance).abs().max() < 4 * (2 / 170) ** 0.5


def test_rows_must_say_which_data_they_belong_to():
    density = ManyDataSets(conjugate, (torch.zeros(()),), {}, DATA)
    with pytest.raises(ValueError, match="same number of rows for each of 5 data sets, got 7"):
        density(torch.zeros(7, 2))
    with pytest.raises(ValueError, match="multiple of the 5 data sets, got 4"):
        SMC(density, 400, num_islands=4, progress=False).run_density(density)
    with pytest.raises(ValueError, match="one data set at a time"):
        MCMC(EllipticalSlice(density), 5, 5, 10, init="prior", progress=False).run()
    with pytest.raises(ValueError, match="same number of data sets for every site"):
        ManyDataSets(conjugate, (torch.zeros(()),), {}, {"y": torch.zeros(2), "z": torch.zeros(3)})
