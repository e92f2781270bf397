"""Networks that see image space inside a flow, whatever its axes."""

import copy

import pytest
import torch
from torch import nn

import ifpyro
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.images import ImageVelocity, build_velocity, unet
from ifpyro.flow.solver.grid import Grid

SHAPE = (2, 4, 4)


class Convolution(nn.Module):
    """Two layers and a time: the smallest network of the contract."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, image, time):
        assert image.shape[1:] == SHAPE
        assert time.shape == image.shape[:1]
        return self.last(torch.tanh(self.first(image) + (time / 1000).view(-1, 1, 1, 1)))


def images(rows=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(rows, 2, 4, 1, generator=generator) + 0.5 * torch.randn(rows, 2, 4, 4, generator=generator)
    return smooth.to(dtype)


def velocity(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageVelocity(Convolution(), SHAPE).to(dtype)


KINDS = {"pca": {}, "separable": {"event_shape": SHAPE}, "low_rank": {"rank": 5}, "identity": {}}


def flow_of(kind, dtype=torch.double, **options):
    basis = Basis.choose(images(dtype=dtype).flatten(1), kind, **KINDS[kind])
    return InflationaryFlow(basis, Schedule.details_first(), velocity(dtype), event_shape=SHAPE, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_map_log_det_and_inverse(kind):
    flow, x = flow_of(kind, grid=Grid(24)), images(5, torch.double)
    z, log_det = flow.encode_and_log_det(x)
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-7)
    jacobian = torch.func.jacrev(lambda v: flow.decode(v).flatten())(z[0])
    assert float(log_det[0]) == pytest.approx(-float(torch.linalg.slogdet(jacobian)[1]), abs=1e-8)
    straight = flow.basis.to_standard(x.flatten(1))
    assert (z - straight).abs().max() > 0.05, "the network does nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_network_sees_the_noised_image_and_its_zero_is_the_linear_denoiser(kind):
    """With equal noise the image is ``x_0 + eta n`` over its standard deviation, in any basis."""
    flow, x0 = flow_of(kind), images(6, torch.double)
    seen = []
    handle = flow.velocity.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.tensor([0.4], dtype=torch.double)
    theta, scale = flow.angles(t)[0], flow.basis.scale
    noise = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    start = flow.basis.to_standard(x0.flatten(1))
    flow.velocity(theta.cos() * start + theta.sin() * noise, flow.velocity.embed(t)[0])
    handle.remove()
    eta = scale * theta.tan()
    torch.testing.assert_close(eta, eta[:1].expand(32))  # equal noise
    image = (x0.flatten(1) - flow.basis.mean) + eta[0] * flow.basis.rotate_back(noise)
    total = (scale.square() + eta.square()).mean().sqrt()
    torch.testing.assert_close(seen[0].flatten(1), image / total)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_a_time_and_rows_of_their_own(kind):
    flow = flow_of(kind)
    t = torch.tensor([0.2, 0.7], dtype=torch.double)
    y = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    embedding = flow.velocity.embed(t)
    together = flow.velocity(y, embedding)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(flow.velocity(y[i, j][None], embedding[j])[0], together[i, j])
    assert (together[0, 0] - together[0, 1]).abs().max() > 1e-3


def test_trains_copies_and_comes_back_from_a_file(tmp_path):
    net = velocity()
    flow = ifpyro.fit(images(), network=net, max_steps=12, seed=0, progress=False, basis="low_rank")
    assert flow.basis.principal == 8
    assert flow.report["training"]["validation_loss"] < flow.report["training"]["validation_loss_gaussian"] + 0.5
    z = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    x = flow.decode(z)
    assert torch.equal(copy.deepcopy(flow).decode(z), x)
    flow.save(tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match=r"network=\.\.\."):
        ifpyro.load(tmp_path / "flow.safetensors")
    assert torch.equal(ifpyro.load(tmp_path / "flow.safetensors", network=velocity()).decode(z), x)
    moved = copy.deepcopy(flow).double()
    torch.testing.assert_close(moved.decode(z.double()).float(), x, rtol=0, atol=1e-4)


def test_gradients_reach_the_latent_and_the_network():
    flow = flow_of("low_rank", grid=Grid(3))
    z = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(flow.decode, (z[:1],), fast_mode=True)
    flow.velocity.requires_grad_(True)
    flow.decode(z).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in flow.velocity.parameters())


def test_bad_input():
    with pytest.raises(RuntimeError, match="works inside a flow"):
        velocity().embed(torch.zeros(1).double())
    basis = Basis(torch.zeros(5), torch.eye(5), torch.ones(5))
    with pytest.raises(ValueError, match="flow of 32 axes for images"):
        InflationaryFlow(basis, Schedule.preserving(), velocity())
    with pytest.raises(ValueError, match="divisible by patch"):
        unet((3, 6, 6), (8, 8, 8))
    with pytest.raises(ValueError, match="divisible by groups=8"):
        unet((3, 8, 8), (12, 8))


def test_unet_starts_as_the_gaussian_and_is_rebuilt_from_its_file(tmp_path):
    pytest.importorskip("diffusers")
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    basis = Basis.choose(x.flatten(1), "identity")
    net = unet((3, 8, 8), (8, 16), patch=2)
    flow = InflationaryFlow(basis, Schedule.preserving(), net, event_shape=(3, 8, 8), grid=Grid(1, method="midpoint"))
    exact = torch.distributions.Normal(basis.mean.view(3, 8, 8), basis.scale[0]).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(flow.log_prob(x[:2]), exact[:2], rtol=1e-5, atol=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(net.network.net.conv_out.weight, std=0.1)
    z, log_det = flow.encode_and_log_det(x[:2])  # forward-mode products through the whole network
    assert log_det.isfinite().all()
    assert (z - basis.to_standard(x[:2].flatten(1))).abs().max() > 0.01
    flow.save(tmp_path / "flow.safetensors")
    again = ifpyro.load(tmp_path / "flow.safetensors")
    assert torch.equal(again.decode(z), flow.decode(z))
    assert build_velocity(again.velocity.spec()).spec() == flow.velocity.spec()


def test_unet_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"ifpyro\[images\]"):
        unet((3, 8, 8), (8, 16))
