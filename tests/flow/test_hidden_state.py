"""What a flow must not depend on: how it was made, what surrounds it, how few rows it was measured on."""

import pytest
import torch
from torch import nn

import ifpyro
from flows_zoo import FLOWS, mixture_flow, mlp_flow, random_mlp
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.tuning import choose_grid, round_trip
from ifpyro.training import Recipe


def usable(flow):
    """Gradients in data and latents, as a sampler wants them."""
    x = flow.sample(3, seed=0).clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    z = torch.zeros(3, flow.latent_dim, dtype=flow.dtype, requires_grad=True)
    (other,) = torch.autograd.grad(flow.decode(z).sum(), z)
    return bool(gradient.isfinite().all() and other.isfinite().all())


@pytest.mark.parametrize("name", ["network 2", "image"])
def test_a_flow_loaded_in_inference_mode_is_usable_outside(name, tmp_path):
    FLOWS[name](torch.float32).save(tmp_path / "flow")
    with torch.inference_mode():
        flow = ifpyro.load(tmp_path / "flow")
        assert flow.sample(2, seed=0).isfinite().all()
    assert usable(flow)


def test_flows_made_in_inference_mode_are_usable_outside():
    rows = mixture_flow(2, torch.float32).sample(100, seed=0)
    options = {"recipe": Recipe(4, 32, 1, check_every=2), "network": {"width": 8, "blocks": 1}, "progress": False}
    with torch.inference_mode():
        trained = ifpyro.fit(rows.clone(), seed=1, **options)
        exact = InflationaryFlow.from_gaussian_mixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    assert trained.report["training"]["steps"] == 4
    assert usable(trained)
    assert usable(exact)


def test_a_parent_in_training_mode_does_not_make_a_flow_random():
    network = MLP(2, width=16, blocks=1, dropout=0.5)
    basis = Basis(torch.zeros(2), torch.eye(2), torch.tensor([2.0, 1.0]))
    with torch.no_grad():
        network.outlet.weight.normal_(generator=torch.Generator().manual_seed(0))
    flow = InflationaryFlow(basis, Schedule.details_first(), network)
    z = torch.ones(4, 2)
    before = flow.decode(z)
    nn.Sequential(nn.Linear(2, 2), flow).train()
    assert not flow.training
    assert torch.equal(flow.decode(z), before)
    assert torch.equal(flow.train().decode(z), before)


def test_the_path_of_a_single_event():
    flow = mlp_flow(3, torch.float32)
    x = flow.sample(4, seed=0)
    times, path = flow.trajectory(x, steps=5)
    alone = flow.trajectory(x[1], steps=5)
    assert alone[1].shape == (6, 3)
    assert torch.equal(alone[0], times)
    torch.testing.assert_close(alone[1], path[:, 1])
    assert flow.trajectory(x.reshape(2, 2, 3), steps=5)[1].shape == (6, 2, 2, 3)


def test_columns_that_stand_still_in_a_few_rows_do_not_spoil_the_round_trip():
    """As the background of images: rows, and columns of them, whose spread is zero."""
    flow = mlp_flow(3, torch.float32)
    x = flow.sample(200, seed=0)
    for rows in (x[:1].expand(4, 3), x[:4].clone().index_fill_(1, torch.tensor([2]), 0.5)):
        error, _ = round_trip(flow, rows)
        assert 0 <= error < 1e-3
    fresh = mlp_flow(3, torch.float32)
    choose_grid(fresh, x[:1].expand(4, 3).clone(), 1e-3)
    assert fresh.refinements <= 2
    assert fresh.report["numerics"]["round_trip_rmse"] < 2e-5


def test_refinements_that_change_nothing_are_not_kept(monkeypatch):
    flow = mlp_flow(2, torch.float32)
    errors = {1: 4e-3, 2: 1e-4, 3: 0.9e-4, 4: 0.9e-4, 5: 0.9e-4}
    monkeypatch.setattr("ifpyro.flow.tuning.round_trip", lambda flow, x: (errors[flow.refinements], 0.0))
    choose_grid(flow, flow.sample(64, seed=0), 1e-3)
    assert flow.refinements == 2


def test_log_densities_that_are_estimates_are_said_to_be_once(recwarn):
    flow = mlp_flow(3, torch.float32)
    x = flow.sample(2, seed=0)
    flow.log_prob(x)
    assert not recwarn
    flow.exact_up_to = 2
    flow.log_prob(x)
    flow.log_prob(x)
    assert [str(warning.message) for warning in recwarn] == [
        "ifpyro: log_prob of a flow of 3 axes is an estimate: log_prob_estimate tells its standard error, and "
        "flow.exact_up_to = 3 makes it exact"
    ]
    assert "estimate" in InflationaryFlow.log_prob.__doc__


def test_measuring_a_flow_of_many_axes_warns_of_nothing(recwarn):
    flow = mlp_flow(3, torch.float32)
    flow.exact_up_to = 2
    choose_grid(flow, flow.sample(64, seed=0), 1e-2)
    assert not recwarn


def low_rank_rows(rows, dim, rank, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, rank, generator=generator))[0]
    scale = torch.linspace(6.0, 3.0, rank)
    return (torch.randn(rows, rank, generator=generator) * scale) @ axes.T + noise * torch.randn(
        rows, dim, generator=generator
    )


@pytest.mark.parametrize(("rows", "dim", "rank"), [(500, 2000, 5), (200, 1100, 1), (2000, 1100, 12)])
def test_low_rank_takes_the_axes_that_predict(rows, dim, rank):
    """With 112 axes for five, 170 nats a row were lost."""
    x = low_rank_rows(rows + 200, dim, rank)
    basis = Basis.low_rank(x[:rows])
    assert rank <= basis.principal <= rank + 2

    def log_density(basis):
        v = basis.to_standard(x[rows:])
        return float((-0.5 * v.square()).sum(1).mean() + basis.log_det() * -1)

    best = max(log_density(Basis.low_rank(x[:rows], k)) for k in (rank, rank + 1))
    assert log_density(basis) > best - 2.0
    if (rows, dim, rank) == (500, 2000, 5):
        assert log_density(Basis.low_rank(x[:rows], 112)) < best - 50


def test_random_networks_are_not_zero():
    """Guards the tests above."""
    assert random_mlp(2).outlet.weight.abs().max() > 0.1
