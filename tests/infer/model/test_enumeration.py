"""Discrete latents summed out: densities by hand, batchings, a posterior with known mode weights, what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate

from ifpyro.infer import HMC, MCMC, SMC
from ifpyro.infer.model.batched import BatchedModel
from ifpyro.infer.model.density import log_density_and_grad
from ifpyro.infer.model.many import ManyDataSets
from models_zoo import flow_prior

Y = torch.tensor([-1.2, 0.4, 2.5, 3.1])


@config_enumerate
def mixture(y, mask=None):
    """Each datum from one of three components whose middle is known."""
    x = pyro.sample("x", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    pyro.sample("seen", dist.Normal(x[..., 0], 3.0), obs=torch.tensor(0.3))  # does not depend on k
    with pyro.plate("data", len(y)), poutine.mask(mask=True if mask is None else mask):
        k = pyro.sample("k", dist.Categorical(weights))
        loc = torch.where(k == 0, x[..., 0], torch.where(k == 1, 0.0, x[..., 1]))
        pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


def mixture_by_hand(x, weights, y, mask):
    loc = torch.stack([x[:, 0], torch.zeros(len(x)), x[:, 1]], -1)
    terms = dist.Normal(loc[:, None], 0.5).log_prob(y[:, None]) + weights.log()[:, None]
    own = dist.Normal(x[:, 0], 3.0).log_prob(torch.tensor(0.3))
    return own + (terms.logsumexp(-1) * mask).sum(-1)


@config_enumerate
def chain(y):
    """A hidden Markov chain of two states whose level is continuous."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    stay = pyro.sample("stay", dist.Beta(3.0, 1.0))
    state = torch.zeros((), dtype=torch.long)
    for t in pyro.markov(range(len(y))):
        up = torch.where(state == 1, stay, 1 - stay)
        state = pyro.sample(f"state_{t}", dist.Bernoulli(up)).long()
        pyro.sample(f"y_{t}", dist.Normal(level * state, 0.7), obs=y[t])


def chain_by_hand(level, stay, y):
    alpha = torch.stack([torch.zeros(len(level)), torch.full((len(level),), -math.inf)], -1)
    move = torch.stack([torch.stack([stay, 1 - stay], -1), torch.stack([1 - stay, stay], -1)], -2).log()
    loc = torch.stack([torch.zeros(len(level)), level], -1)
    for value in y:
        alpha = (alpha[:, :, None] + move).logsumexp(1) + dist.Normal(loc, 0.7).log_prob(value)
    return alpha.logsumexp(-1)


@config_enumerate
def nested(y):
    """A group label shared by a row, a label of each entry, a flow prior for every row."""
    with pyro.plate("rows", y.shape[0], dim=-2):
        x = pyro.sample("x", flow_prior())
        group = pyro.sample("group", dist.Bernoulli(0.3))
        with pyro.plate("columns", y.shape[1], dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.2 + 0.5 * group))
            pyro.sample("y", dist.Normal(x[..., 0] + 2 * k, 0.5), obs=y)


def nested_by_hand(x, y):
    log_sums = []
    for group, log_weight in ((0.0, math.log(0.7)), (1.0, math.log(0.3))):
        up = 0.2 + 0.5 * group
        on, off = (dist.Normal(x[..., 0] + shift, 0.5).log_prob(y) for shift in (2.0, 0.0))
        entry = torch.logaddexp(on + math.log(up), off + math.log(1 - up))
        log_sums.append(entry.sum(-1) + log_weight)
    return torch.logaddexp(*log_sums).sum(-1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


MASK = torch.tensor([True, False, True, True])
Y2 = torch.tensor([[0.2, 2.1, -0.3], [1.0, 0.4, 1.7]])
CASES = {
    "mixture": (mixture, (Y,), lambda s: mixture_by_hand(s["x"], s["weights"], Y, torch.ones(4))),
    "masked": (mixture, (Y, MASK), lambda s: mixture_by_hand(s["x"], s["weights"], Y, MASK)),
    "chain": (chain, (Y,), lambda s: chain_by_hand(s["level"], s["stay"], Y)),
    "nested": (nested, (Y2,), lambda s: nested_by_hand(s["x"], Y2)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batching", ["plate", "loop", None])
def test_the_density_is_the_sum(name, batching):
    model, args, by_hand = CASES[name]
    batched = BatchedModel(model, args, batching=batching)
    assert batched.batching == (batching or "plate")
    q = batched.sample_prior(7, generator(1))
    sites = batched.sites(q)
    assert not {"k", "group", "state_0", "y"} & set(sites)
    for rows in (q, q[:1]):
        log_likelihood = batched(rows)[1]
        torch.testing.assert_close(log_likelihood, by_hand(sites)[: len(rows)], rtol=1e-4, atol=1e-4)
    leaf = q.clone().requires_grad_(True)
    density = by_hand(batched.runner.values("loop", leaf)) + batched(leaf)[0]
    (expected,) = torch.autograd.grad(density.sum(), leaf)
    torch.testing.assert_close(log_density_and_grad(batched, q)[2], expected, rtol=1e-3, atol=1e-3)


def two_modes(y):
    """x ~ N(0, 1) seen as itself or with the other sign: modes of weights 0.8 and 0.2."""
    x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
    sign = pyro.sample("sign", dist.Bernoulli(torch.tensor(0.8).double()), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal((2 * sign - 1) * x, 0.1), obs=y)


@pytest.mark.parametrize("engine", ["hmc", "smc"])
def test_engines_sample_the_marginal_posterior(engine):
    y = torch.tensor(1.5).double()
    if engine == "smc":
        run = SMC(two_modes, 1024, num_islands=16, seed=1, progress=False).run(y)
        exact = float(dist.Normal(0.0, math.sqrt(1.01)).log_prob(y))
        assert abs(run.log_evidence - exact) < 3 * run.log_evidence_se < 0.3
    else:
        run = MCMC(HMC(two_modes), 100, 60, 48, smc_particles=256, seed=1, progress=False).run(y)
    x = run.get_samples(group_by_chain=True)["x"]
    assert set(run.get_samples()) == {"x"}
    right = (x > 0).double()
    error = float(right.mean(1).std()) / len(x) ** 0.5
    assert abs(float(right.mean()) - 0.8) < 4 * error < 0.2
    assert abs(float(x.abs().mean()) - 1.5 / 1.01) < 0.01
    assert abs(float(x.abs().std()) - math.sqrt(0.01 / 1.01)) < 0.01


def test_many_data_sets():
    data = {"y": torch.stack([Y, Y.flip(0), Y + 1])}
    many = ManyDataSets(mixture, (Y,), {}, data)
    assert many.batching == "plate"
    q = many.sample_prior(6, generator(2))
    for i, value in enumerate(data["y"]):
        expected = BatchedModel(mixture, (value,))(q[2 * i : 2 * i + 2])
        torch.testing.assert_close(many(q)[1][2 * i : 2 * i + 2], expected[1], rtol=1e-4, atol=1e-4)


def unmarked(y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + k, 1.0), obs=y)


def endless(y):
    k = pyro.sample("k", dist.Poisson(2.0))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + k, 1.0), obs=y)


@config_enumerate
def latent_below(y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    x = pyro.sample("x", dist.Normal(k, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@config_enumerate
def computed_below(y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    loc = pyro.deterministic("loc", x + k)
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@config_enumerate
def masked_below(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        seen = torch.tensor([True, False, True])
        pyro.sample("y", dist.Normal(x + k, 1.0), obs=y.expand(3), obs_mask=seen)


@config_enumerate
def undeclared(y):
    k = pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(4)))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + k, 1.0), obs=y)


@config_enumerate
def discrete_only(y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(k, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (unmarked, r"'k' is discrete \(Bernoulli\).*config_enumerate"),
        (config_enumerate(endless), r"'k' is discrete \(Poisson\)"),
        (latent_below, "latent site 'x' depends on discrete latents"),
        (masked_below, r"site 'y' has an obs_mask and depends on discrete latents.*y\[seen\].*poutine.mask"),
        (poutine.scale(config_enumerate(unmarked), scale=2.0), "'k' is scaled"),
        (undeclared, "every batch dimension must be that of a pyro.plate.*'k'"),
        (discrete_only, "no latent sites"),
    ],
)
def test_what_is_refused(model, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        BatchedModel(model, (Y[0],))


def test_what_is_computed_from_summed_latents_is_left_out_and_the_rest_stays():
    """It has no one value; that is no reason to refuse the model."""
    with pytest.warns(UserWarning, match=r"deterministic sites \['loc'\] depend on discrete latents"):
        batched = BatchedModel(computed_below, (Y[0],))
    x = torch.linspace(-2.0, 2.0, 5)[:, None]
    log_prior, log_likelihood = batched(x)
    torch.testing.assert_close(log_prior, dist.Normal(0.0, 1.0).log_prob(x[:, 0]))
    both = torch.stack([dist.Normal(x[:, 0] + k, 1.0).log_prob(Y[0]) for k in (0.0, 1.0)])
    torch.testing.assert_close(log_likelihood, both.logsumexp(0) - math.log(2))
    assert set(batched.sites(x)) == {"x"}
