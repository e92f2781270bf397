"""Which plates fall apart into rows, and what the terms of a row are."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from flows_zoo import mixture_flow
from ifpyro.infer.model.batched import BatchedModel
from ifpyro.infer.model.rows import LEAST_ROWS

N = LEAST_ROWS
Y = torch.linspace(-1.0, 1.0, N, dtype=torch.double)


def scale():
    return pyro.sample("s", dist.HalfNormal(torch.ones((), dtype=torch.double)))


def plain(y, flow):
    s = scale()
    with pyro.plate("objects", len(y)):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 0], s), obs=y)


def nested(y, flow):
    """Several sightings of each object, and a local latent that is no flow."""
    s = scale()
    with pyro.plate("objects", len(y), dim=-1):
        x = pyro.sample("x", flow.prior())
        shift = pyro.sample("shift", dist.Normal(x[..., 1], 1.0))
        with pyro.plate("sightings", 3, dim=-2):
            pyro.sample("y", dist.Normal(x[..., 0] + shift, s), obs=y.expand(3, -1))


def left(y, flow):
    """The plate of objects is not the rightmost one."""
    s = scale()
    with pyro.plate("objects", len(y), dim=-2), pyro.plate("kinds", 2, dim=-1):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 0], s), obs=y[:, None].expand(-1, 2))


def total_seen(y, flow):
    s = scale()
    with pyro.plate("objects", len(y)):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 0], s), obs=y)
    pyro.sample("total", dist.Normal(x[..., 0].sum(-1), 1.0), obs=y.sum())


def neighbours(y, flow):
    s = scale()
    with pyro.plate("objects", len(y)):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 0] - x[..., 0].roll(1, -1), s), obs=y)


def few(y, flow):
    plain(y[: N - 1], flow)


@pytest.fixture(scope="module")
def flow():
    return mixture_flow(2, torch.double)


@pytest.mark.parametrize("model", [plain, nested, left])
def test_rows_of_a_plate_add_up(model, flow):
    batched = BatchedModel(model, (Y, flow))
    rows = batched.rows
    assert (rows.plate, rows.size) == ("objects", N)
    q = batched.sample_prior(4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([rows.entries.flatten(), rows.rest]).sort().values, torch.arange(batched.dim))
    decoded = rows.decode(q)
    prior, likelihood = batched(q)
    torch.testing.assert_close(sum(rows.totals(q, decoded)), prior + likelihood)
    normal = dist.Normal(0.0, 1.0).log_prob(rows.latents(q)).sum((1, 2))
    scale_only = batched.sites(q)["s"]
    outside = dist.HalfNormal(1.0).log_prob(scale_only) + scale_only.log()
    torch.testing.assert_close(rows.terms(q, decoded).sum(1) + normal + outside, prior + likelihood)


def test_a_rows_terms_are_its_own(flow):
    rows = BatchedModel(plain, (Y, flow)).rows
    q = torch.randn(2, len(rows.rest) + 2 * N, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    x = rows.decode(q)["x_base"]
    s = q[:, rows.rest].exp()
    torch.testing.assert_close(rows.terms(q, rows.decode(q)), dist.Normal(x[..., 0], s).log_prob(Y))
    some = torch.zeros(2, N, dtype=torch.bool)
    some[0, 3] = some[1, 5] = True
    moved = rows.with_latents(q, rows.latents(q) + 1.0)
    part = rows.decode_rows(moved, some, rows.decode(q))["x_base"]
    torch.testing.assert_close(part[some], rows.decode(moved)["x_base"][some])
    torch.testing.assert_close(part[~some], x[~some])
    torch.testing.assert_close(rows.choose(some, rows.decode(moved), rows.decode(q))["x_base"], part)


@pytest.mark.parametrize("model", [total_seen, neighbours, few])
def test_rows_that_meet_or_are_few_are_left_together(model, flow):
    assert BatchedModel(model, (Y, flow)).rows is None
