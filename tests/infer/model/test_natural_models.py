"""Models as people write them: many draws are right, flows are decoded once for all of them, and fallbacks say why."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from flows_zoo import mlp_flow
from ifpyro import Velocity
from ifpyro.core.messages import users_line, warn
from ifpyro.infer.model.batched import BatchedModel
from ifpyro.infer.model.density import log_density_and_grad

Y = torch.tensor([0.3, -0.2, 1.1])


class Counting(Velocity):
    """A flow's network that keeps count of the rows it sees."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.rows = inner, []

    def embed(self, t):
        return self.inner.embed(t)

    def forward(self, y, embedding):
        self.rows.append(len(y))
        return self.inner(y, embedding)


def elementwise(y, flow):
    x = pyro.sample("x", flow.prior())
    pyro.sample("y", dist.Normal(x[..., 1], 0.5), obs=y[0])


def natural(y, flow):
    x = pyro.sample("x", flow.prior())
    pyro.sample("y", dist.Normal(x[1], 0.5), obs=y[0])


def branching(y, flow):
    x = pyro.sample("x", flow.prior())
    scale = 0.5 if x[0] < 100 else 1.0
    pyro.sample("y", dist.Normal(x[1], scale), obs=y[0])


def objects(y, flow):
    """Three objects with a flow each, taken apart from the left."""
    with pyro.plate("objects", len(y)):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(torch.stack([row[1] for row in x]), 0.5), obs=y)


@pytest.fixture(scope="module")
def flow():
    return mlp_flow(2, torch.double)


def rows_decoded(batched, q, flow):
    """The sizes of the batches in which a run decodes."""
    inner = flow.velocity
    flow.velocity = Counting(inner)
    try:
        batched(q)
        return set(flow.velocity.rows)
    finally:
        flow.velocity = inner


@pytest.mark.filterwarnings("ignore:ifpyro:UserWarning")
@pytest.mark.parametrize(
    ("model", "way", "rows"), [(natural, "vmap", 5), (branching, "loop", 5), (objects, "vmap", 15)]
)
def test_flows_are_decoded_in_one_batch(model, way, rows, flow):
    batched = BatchedModel(model, (Y.double(), flow))
    assert batched.batching == way
    q = batched.sample_prior(5, torch.Generator().manual_seed(0))
    assert rows_decoded(batched, q, flow) == {rows}
    together = log_density_and_grad(batched, q)
    alone = [log_density_and_grad(batched, row[None]) for row in q]
    for ours, expected in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(expected))
    for name, value in batched.sites(q).items():
        torch.testing.assert_close(value, torch.cat([batched.sites(row[None])[name] for row in q]))


def test_the_natural_model_is_the_elementwise_one(flow):
    ours, expected = (BatchedModel(m, (Y.double(), flow)) for m in (natural, elementwise))
    q = ours.sample_prior(4, torch.Generator().manual_seed(1))
    for found, right in zip(log_density_and_grad(ours, q), log_density_and_grad(expected, q), strict=True):
        torch.testing.assert_close(found, right)


def test_a_flow_that_a_run_makes_is_decoded_where_it_stands(flow):
    """A new flow in every run: what one run decodes is no other run's business."""

    def shifted(y):
        shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
        x = pyro.sample("x", copy.copy(flow).prior())
        pyro.sample("y", dist.Normal(x[1] + shift, 0.5), obs=y[0])

    batched = BatchedModel(shifted, (Y.double(),))
    q = batched.sample_prior(3, torch.Generator().manual_seed(2))
    alone = torch.cat([batched(row[None])[1] for row in q])
    torch.testing.assert_close(batched(q)[1], alone)


@config_enumerate
def mixture(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3, dtype=torch.double)))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3, dtype=torch.double), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


@config_enumerate
def chain(y):
    """A hidden Markov chain, whose states are eliminated one after the other."""
    stay = pyro.sample("stay", dist.Beta(torch.tensor(2.0, dtype=torch.double), 1.0))
    table = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    mu = torch.tensor([-1.0, 1.0], dtype=torch.double)
    state = 0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"z{t}", dist.Categorical(table[state]))
        pyro.sample(f"y{t}", dist.Normal(mu[state], 1.0), obs=y[t])


def test_discrete_latents_are_summed_out_of_natural_models_at_once():
    y = Y.double()
    batched = BatchedModel(mixture, (y,))
    assert batched.batching == "vmap"
    q = batched.sample_prior(6, torch.Generator().manual_seed(3))
    sites = batched.sites(q)
    terms = sites["w"].log()[:, None] + dist.Normal(sites["mu"][:, None], 1.0).log_prob(y[:, None])
    torch.testing.assert_close(batched(q)[1], terms.logsumexp(-1).sum(-1))
    gradients = [log_density_and_grad(batched, row[None])[2] for row in q]
    torch.testing.assert_close(log_density_and_grad(batched, q)[2], torch.cat(gradients))


def test_a_chain_of_states_is_summed_out_by_hand():
    y = Y.double()
    batched = BatchedModel(chain, (y,))
    q = batched.sample_prior(4, torch.Generator().manual_seed(4))
    stay = batched.sites(q)["stay"]
    table = torch.stack([torch.stack([stay, 1 - stay], -1), torch.stack([1 - stay, stay], -1)], -2)
    emit = dist.Normal(torch.tensor([-1.0, 1.0], dtype=torch.double), 1.0).log_prob(y[:, None])
    alpha = table[:, 0].log() + emit[0]
    for t in range(1, len(y)):
        alpha = (alpha[:, :, None] + table.log()).logsumexp(1) + emit[t]
    torch.testing.assert_close(batched(q)[1], alpha.logsumexp(-1))


def test_a_fallback_names_the_users_line_and_the_mend(flow):
    with pytest.warns(UserWarning, match="draw by draw") as caught:
        BatchedModel(branching, (Y.double(), flow))
    (said,) = caught
    assert "test_natural_models.py" in str(said.message)
    assert "scale = 0.5 if x[0] < 100 else 1.0" in str(said.message)
    assert "torch.where" in str(said.message)
    assert said.filename == __file__


def test_models_that_pass_in_a_batch_are_silent(flow):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BatchedModel(natural, (Y.double(), flow))


def test_messages_point_at_the_user():
    with pytest.warns(UserWarning, match="ifpyro: look here") as caught:
        warn("look here")
    assert caught[0].filename == __file__
    with pytest.raises(RuntimeError) as failed:
        torch.zeros(2) @ torch.zeros(3)  # the user's line
    assert "the user's line" in users_line(failed.value.__traceback__)
    assert users_line(None) is None
