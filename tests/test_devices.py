"""Parts of a batch, reduced precision, memory layouts."""

import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from torch import nn

import ifpyro
from flows_zoo import latents, mlp_flow
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.images import ImageVelocity
from ifpyro.flow.solver.grid import Grid


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, image, time):
        return self.last(torch.tanh(self.first(image) + (time / 1000).view(-1, 1, 1, 1)))


def image_flow(kind="low_rank"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, 4, 1, generator=generator) + 0.5 * torch.randn(300, 3, 4, 4, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ImageVelocity(Convolutions(), (3, 4, 4))
    basis = Basis.choose(x.flatten(1), kind, event_shape=x.shape[1:])
    return InflationaryFlow(basis, Schedule.details_first(), network, event_shape=(3, 4, 4), grid=Grid(6))


def test_batches_in_parts():
    flow = mlp_flow(6, torch.double, event_shape=(2, 3), grid=Grid(5))
    z = latents(flow, 3, 5)
    x, log_det = flow.decode_and_log_det(z)
    seen = []
    handle = flow.velocity.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    torch.testing.assert_close(flow.decode(z, batch_size=4), x, rtol=0, atol=1e-12)
    assert set(seen) == {4, 3}
    handle.remove()
    for found, expected in zip(flow.decode_and_log_det(z, batch_size=4), (x, log_det), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.encode(x, batch_size=4), flow.encode(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.log_prob(x, batch_size=4), flow.log_prob(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.sample((7,), seed=3, batch_size=2), flow.sample((7,), seed=3))
    leaf = z.clone().requires_grad_()
    flow.decode(leaf, batch_size=4).sum().backward()
    assert leaf.grad.abs().min() > 0
    assert flow.decode(z[:0], batch_size=4).shape == (0, 5, 2, 3)
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size expects a positive integer"):
            flow.encode(x, batch_size=bad)


@pytest.mark.parametrize("kind", ["pca", "separable", "low_rank", "identity"])
def test_reduced_precision_keeps_states_in_full(kind):
    flow = image_flow(kind)
    z = latents(flow, 8)
    full, (_, log_det) = flow.decode(z), flow.decode_and_log_det(z)
    effect = float((full.flatten(1) - flow.basis.from_standard(z)).abs().max())
    flow.autocast = torch.bfloat16
    x, reduced_log_det = flow.decode_and_log_det(z)
    assert x.dtype == reduced_log_det.dtype == torch.float32
    error = float((x - full).abs().max())
    assert 1e-6 < error < 0.02 * effect, (error, effect)  # eight bits of the network's part, not of the whole
    assert float((reduced_log_det - log_det).abs().max()) < 0.05
    torch.testing.assert_close(flow.decode(z), x)
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=0.02)
    flow.autocast = None
    assert torch.equal(flow.decode(z), full)


def test_reduced_precision_of_a_denoiser_and_of_a_multilayer_perceptron():
    denoiser = ifpyro.from_denoiser(nn_denoiser(), (0.01, 50.0), event_shape=(3,), grid=Grid(6))
    for flow in (denoiser, mlp_flow(5, torch.float32, grid=Grid(6))):
        z = latents(flow, 20)
        full = flow.decode(z)
        flow.autocast = torch.bfloat16
        error = (flow.decode(z) - full).square().mean().sqrt() / full.std()
        assert 1e-6 < float(error) < 0.05


def nn_denoiser():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 3)

        def forward(self, x, sigma):
            sigma = sigma.unsqueeze(-1)
            inner = self.last(torch.tanh(self.first(x / (1 + sigma**2).sqrt())))
            return x / (1 + sigma**2) + sigma / (1 + sigma**2).sqrt() * inner

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def test_no_rows_at_all():
    flow = image_flow()
    assert flow.decode(torch.zeros(0, flow.latent_dim)).shape == (0, 3, 4, 4)
    assert flow.encode(torch.zeros(0, 3, 4, 4)).shape == (0, flow.latent_dim)


def test_there_is_nothing_to_record_without_a_gpu():
    flow = image_flow()
    z = latents(flow, 3)
    x, flow.cuda_graphs = flow.decode(z), True
    for _ in range(4):
        assert torch.equal(flow.decode(z), x)


def test_channels_last():
    flow = image_flow()
    z = latents(flow, 6)
    x, log_prob = flow.decode(z), flow.log_prob(flow.decode(z))
    seen = []
    flow.to(memory_format=torch.channels_last)
    flow.velocity.network.last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=0, atol=1e-3)


def cut_short():
    """Whether convolutions may be, on NVIDIA GPUs, by the settings before and since torch 2.9."""
    if hasattr(torch.backends.cudnn, "conv"):
        return torch.backends.cudnn.conv.fp32_precision != "ieee"
    return torch.backends.cudnn.allow_tf32


class Watching(Convolutions):
    """Remembers how it is evaluated."""

    def forward(self, image, time):
        self.seen.append(cut_short())
        return super().forward(image, time)


def full_and_back(setting):
    """Network and likelihood see full precision in whatever a flow and an engine do, gradients too; the setting is what
    it was."""
    flow, watching = image_flow(), Watching()
    flow.velocity.network, watching.seen = watching, []
    x = flow.sample(3, seed=0)
    flow.encode(x), flow.log_prob(x), flow.log_prob_estimate(x)
    ifpyro.linear_posterior(flow, torch.eye(48)[:2], x[0].flatten()[:2], 0.3, draws=2, sweeps=1, progress=False)

    def model():
        x = pyro.sample("x", flow.prior())
        if x.requires_grad:
            x.register_hook(lambda _: watching.seen.append(cut_short()))
        watching.seen.append(cut_short())
        pyro.factor("seen", -x.square().sum((-1, -2, -3)))

    ifpyro.SMC(model, 8, max_moves=1, max_steps=2, prior_draws=1, seed=0, progress=False).run()
    assert watching.seen
    assert not any(watching.seen)
    return setting()


def test_convolutions_are_not_cut_short():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        for wanted in (True, False):
            cudnn.allow_tf32 = wanted
            assert full_and_back(lambda: cudnn.allow_tf32) is wanted
    finally:
        cudnn.allow_tf32 = before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has the older setting alone")
@pytest.mark.parametrize(
    "setting",
    ["cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = 'tf32', 'ieee'", "torch.backends.fp32_precision = 'tf32'"],
)
def test_the_newer_setting_too(setting):
    """In a process of its own: torch does not let its two kinds of settings mix."""
    code = (
        "import sys, torch; sys.path.insert(0, 'zoos'); import test_devices as t\n"
        "cudnn = torch.backends.cudnn\n"
        "exec(sys.argv[1])\n"
        "assert t.full_and_back(lambda: cudnn.conv.fp32_precision) == 'tf32'"
    )
    subprocess.run([sys.executable, "-c", code, setting], check=True, cwd=Path(__file__).parent)
