"""Flows on constrained data: densities outside the support, exact bounds, and what the Pyro distribution says."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import TransformedDistribution, constraints

import ifpyro
from flows_zoo import latents, mixture_flow, mlp_flow
from ifpyro.core.files import read_tensors, write_tensors
from ifpyro.flow.solver.grid import Grid

FLOWS = {
    "real": (lambda: mlp_flow(2, torch.float32), [[math.inf, 0.0], [0.0, -math.inf]]),
    "positive": (
        lambda: mlp_flow(2, torch.float32, support=constraints.positive),
        [[-1.0, 1.0], [0.0, 1.0], [-1e30, 1.0], [math.inf, 1.0]],
    ),
    "interval": (
        lambda: mlp_flow(2, torch.float32, support=constraints.interval(10.0, 20.0)),
        [[21.0, 15.0], [1e6, 15.0], [20.0, 15.0], [10.0, 15.0], [9.0, 21.0]],
    ),
    "simplex": (
        lambda: mlp_flow(2, torch.float32, support="simplex", event_shape=(3,)),
        [[0.2, 0.3, 0.9], [0.2, 0.8, 0.0], [-0.2, 0.9, 0.3]],
    ),
    "by column": (
        lambda: mlp_flow(3, torch.float32, support=["positive", "real", "circular"]),
        [[-1.0, 0.0, 0.0], [1.0, math.inf, 0.0], [1.0, 0.0, -math.inf]],
    ),
    "image": (
        lambda: mlp_flow(4, torch.float32, event_shape=(2, 2), support="unit"),
        [[[0.5, 0.5], [0.5, 1.5]], [[0.0, 0.5], [0.5, 0.5]]],
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_nothing_lies_outside_the_support(name):
    make, outside = FLOWS[name]
    flow = make()
    flow.grid = Grid(6)
    outside = torch.tensor(outside)
    inside = flow.sample(3, seed=0)
    alone = inside.clone().requires_grad_()
    wanted = torch.autograd.grad(flow.log_prob(alone).sum(), alone)[0]
    rows = torch.cat([outside, inside, torch.full_like(inside[:1], math.nan)]).requires_grad_()
    log_prob = flow.log_prob(rows)
    count = len(outside)
    assert (log_prob[:count] == -math.inf).all()
    assert log_prob[-1].isnan()
    assert log_prob[count:-1].isfinite().all()
    gradient = torch.autograd.grad(log_prob[:-1].sum(), rows)[0]
    assert (gradient[:count] == 0).all()
    torch.testing.assert_close(gradient[count:-1], wanted)  # not spoilt by rows outside
    prior = TransformedDistribution.expand(flow.prior(), ())
    prior._validate_args = False
    torch.testing.assert_close(prior.log_prob(rows), log_prob, equal_nan=True)
    with pytest.raises(ValueError, match="support"):
        flow.prior().log_prob(rows)
    if name != "real":  # of which torch's constraint holds infinity too
        assert flow.prior().support.check(rows).tolist() == log_prob.isfinite().tolist()
        assert flow.encode(outside).isnan().all()
    assert (flow.log_prob_estimate(outside).value == -math.inf).all()


def test_estimated_densities_too():
    flow = mlp_flow(3, torch.float32, support=constraints.positive)
    flow.exact_up_to = 2
    x = torch.cat([flow.sample(2, seed=0), -torch.ones(1, 3)])
    found = flow.log_prob_estimate(x)
    assert found.value.isfinite().tolist() == [True, True, False]
    assert found.standard_error[2] == 0
    assert (flow.log_prob(x).isfinite() == found.value.isfinite()).all()


def test_far_away_the_density_vanishes():
    for dtype in (torch.float32, torch.float64):
        flow = mlp_flow(2, dtype)
        far = flow.log_prob(torch.tensor([[1e30, 0.0], [-1e19, 1e19]], dtype=dtype))
        assert (far < -1e20).all()


def test_the_prior_has_the_batch_shape_of_pyro():
    flow = mixture_flow(2, torch.double, support="positive")
    prior = flow.prior().expand((4,))
    x = prior.sample()
    assert x.shape == (4, 2)
    torch.testing.assert_close(prior.log_prob(x), flow.log_prob(x))
    assert prior.log_prob(x[0]).shape == (4,)
    assert flow.prior().expand((3, 4)).to_event(1).log_prob(x).shape == (3,)


SECONDS = (1126259462.3, 1126259462.5)  # of which single precision keeps ...456 alone


def test_bounds_come_back_from_a_file_in_double_precision(tmp_path):
    support = constraints.interval(np.array(SECONDS[:1]), np.array(SECONDS[1:]))
    flow = mlp_flow(1, torch.double, support=support, grid=Grid(4))
    flow.save(tmp_path / "flow.safetensors")
    again = ifpyro.load(tmp_path / "flow.safetensors")
    assert again.support.lower_bound.tolist() == list(SECONDS[:1])
    assert again.support.upper_bound.tolist() == list(SECONDS[1:])
    x = flow.sample(5, seed=0)
    assert flow.log_prob(x).isfinite().all()
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


def test_files_of_older_versions_still_load(tmp_path):
    """Their bounds are lists, and they know neither circles nor half-open intervals."""
    flow = mlp_flow(2, torch.float32, support=constraints.interval(torch.zeros(2), torch.tensor([1.0, 2.0])))
    path = tmp_path / "flow.safetensors"
    flow.save(path)
    tensors, header = read_tensors(path, "flow")
    assert not any(name.startswith("chart") for name in tensors)
    header["support"] = {"kind": "interval", "lower_bound": [0.0, 0.0], "upper_bound": [1.0, 2.0]}
    write_tensors(path, tensors, "flow", header)
    z = latents(flow, 4)
    assert torch.equal(ifpyro.load(path).decode(z), flow.decode(z))


def test_bounds_move_with_the_flow():
    flow = mixture_flow(2, torch.double, support=constraints.interval(np.array([0.1, 0.2]), np.array([1.1, 2.2])))
    assert flow.chart.lower.dtype == torch.double
    single = flow.to(torch.float32)
    assert single.chart.lower.dtype == torch.float32
    assert single.decode(latents(single, 3)).dtype == torch.float32
    meta = mixture_flow(2, torch.double, support=constraints.interval(torch.zeros(2), torch.ones(2))).to("meta")
    assert meta.chart.lower.device.type == meta.support.lower_bound.device.type == "meta"


def test_a_basis_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"a basis of 2 axes for events of shape \(3,\) in this support, got 3"):
        mixture_flow(3, torch.float32, support="simplex")


def test_arrays_tables_and_lists_are_data_as_in_training():
    flow = mlp_flow(2, torch.float32, grid=Grid(4))
    x = flow.sample(4, seed=0)
    z, log_prob = flow.encode(x), flow.log_prob(x)
    for form in (x.numpy(), x.numpy().astype(">f8"), x.double().numpy().astype(np.longdouble), x.tolist()):
        assert torch.equal(flow.encode(form), z)
        assert torch.equal(flow.log_prob(form), log_prob)
    assert torch.equal(flow.log_prob(pd.DataFrame(x.numpy(), columns=["a", "b"])), log_prob)
    assert torch.equal(flow.log_prob(x.numpy()[0]), flow.log_prob(x[0]))
    assert torch.equal(flow.decode(z.numpy()), flow.decode(z))
    assert torch.equal(flow.decoder(1)(z[:, :1].numpy()), flow.decoder(1)(z[:, :1]))
    assert torch.equal(flow.trajectory(x.tolist(), 4)[1], flow.trajectory(x, 4)[1])
    assert torch.equal(flow.log_prob_estimate(x.numpy()).value, log_prob)
    assert torch.equal(flow.encode_and_log_det(x.numpy())[1], flow.encode_and_log_det(x)[1])
