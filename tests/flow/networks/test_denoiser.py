"""Flows from pretrained denoisers, against exact mixtures under every parametrisation."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import ifpyro
from denoisers_zoo import Discrete, ExactMixture, exact_denoiser, linear_table
from exact_densities import GaussianMixture, assert_exact
from flows_zoo import mixture, mixture_density, mixture_flow
from ifpyro import Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.denoiser import PREDICTIONS, DenoiserVelocity
from ifpyro.flow.networks.noise import Continuous, Sigmas, Table
from ifpyro.flow.solver.grid import Grid
from ifpyro.flow.solver.steps import velocity_and_jacobian

GRID = Grid(14)
TABLE = linear_table()
TABLED = [p for p in PREDICTIONS if not p.startswith("edm")]  # of networks that know a table of noise
FLOOR = float(((1 - TABLE[0]) / TABLE[0]).sqrt())


def draws(dim, rows=2_000, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mixture_density(*mixture(dim)).sample((rows,))


def exact_log_prob(flow, x, sigma):
    """The law of ``(x_0 + sigma n)``, shrunk on every axis back to the variance of ``x_0``."""
    weights, means, covariances = mixture(flow.latent_dim)
    axes = flow.basis.rotation if flow.basis.principal else torch.eye(flow.latent_dim, dtype=torch.double)
    turn = axes / (flow.basis.scale.square() + sigma**2).sqrt()
    noisy = covariances + sigma**2 * torch.eye(flow.latent_dim)
    law = mixture_density(weights, (means - flow.basis.mean) @ turn, turn.T @ noisy @ turn)
    return law.log_prob(flow.basis.to_standard(x)) - flow.basis.log_det()


def wrapped(prediction, dim=2, **options):
    options = {"samples": draws(dim), "grid": GRID, **options}
    network = Discrete(exact_denoiser(dim), prediction, TABLE)
    return ifpyro.from_denoiser(network, TABLE, prediction=prediction, **options)


# -- exact answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "basis"), [*((p, "pca") for p in (*TABLED, "sigma")), ("epsilon", "identity")])
def test_density_encode_and_decode_are_exact(prediction, basis):
    x = draws(2, 30, seed=1)
    if prediction == "sigma":
        floor = 0.02
        flow = ifpyro.from_denoiser(exact_denoiser(2), (floor, 400.0), samples=draws(2), basis=basis, grid=GRID)
    else:
        floor, flow = FLOOR, wrapped(prediction, basis=basis)
    expected = exact_log_prob(flow, x, floor)
    z, log_det = flow.encode_and_log_det(x)
    found = log_det + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert (found - expected).abs().max() < 5e-3
    gaussian = MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(x)
    assert (gaussian - expected).abs().max() > 0.1
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-9)
    report = flow.report["denoiser"]
    assert sum(report["error"]) < 0.99 * sum(report["error_gaussian"])


def test_velocity_is_that_of_the_exact_flow():
    """The flow that knows the mixture and the flow that knows its denoiser only are the same map."""
    ours = mixture_flow(3, torch.double, grid=Grid(16))
    eta = ours.basis.scale * ours.angles(torch.tensor([0.0, 1.0]).double()).tan()
    flow = ifpyro.from_denoiser(
        exact_denoiser(3),
        (float(eta[0, 0]), float(eta[1, 0])),
        event_shape=(3,),
        basis=ours.basis,
        schedule=ours.schedule,
        grid=ours.grid,
    )
    assert flow.basis is not ours.basis
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    (x, log_det), (expected, expected_log_det) = flow.decode_and_log_det(z), ours.decode_and_log_det(z)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(log_det, expected_log_det, rtol=0, atol=1e-6)
    assert (x - ours.basis.from_standard(z)).abs().max() > 0.3, "the mixture is a Gaussian"


@pytest.mark.parametrize("prediction", TABLED)
def test_velocity_at_entries_of_the_table(prediction):
    flow = wrapped(prediction, dim=3, basis="pca")
    weights, means, covariances = mixture(3)
    unit = flow.basis.rotation / flow.basis.scale
    exact = type(mixture_flow(3, torch.double).velocity)(
        weights, flow.basis.to_standard(means), unit.T @ covariances @ unit, flow.angles
    )
    y = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for t in (0.0, 0.3, 0.9, 1.0):
        time = torch.tensor([t], dtype=torch.double)
        found = flow.velocity(y, flow.velocity.embed(time)[0])
        expected = exact(y, exact.embed(time)[0])
        # between its entries the network of the test is no better than straight lines through its table
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if t in (0.0, 1.0) else 2e-3)


def test_latents_of_the_data_are_standard():
    """Mean and scales are right at the last angle, also where it does not drown the data."""
    x = draws(2, 4_000)
    flow = ifpyro.from_denoiser(exact_denoiser(2), (0.02, 8.0), samples=x, basis="pca", grid=Grid(10))
    z = flow.encode(draws(2, 4_000, seed=1))
    assert (z.mean(0).abs() < 4 / math.sqrt(4_000)).all()
    assert ((z.square().mean(0) - 1).abs() < 4 * math.sqrt(2 / 4_000)).all()


def test_rescaled_data_and_images():
    """The network of scaled data in other units is the same flow with another unit."""
    x = draws(4)
    factor, shift = torch.tensor([[[4.0]], [[0.5]]]), torch.tensor([[[-1.0]], [[2.0]]])
    wide = factor.expand(2, 1, 2).reshape(-1).double()
    options = {"noise": (0.02, 200.0), "basis": "pca", "grid": Grid(12)}
    plain = ifpyro.from_denoiser(exact_denoiser(4), samples=x, **options)
    images = (x.view(-1, 2, 1, 2) - shift) / factor
    flow = ifpyro.from_denoiser(exact_denoiser(4), samples=images, rescale=(factor, shift), **options)
    assert flow.event_shape == (2, 1, 2)
    torch.testing.assert_close(flow.encode(images[:9]), plain.encode(x[:9]), rtol=0, atol=1e-8)
    torch.testing.assert_close(flow.log_prob(images[:9]), plain.log_prob(x[:9]) + wide.log().sum())


def test_without_samples():
    flow = ifpyro.from_denoiser(exact_denoiser(2), (0.02, 4e3), event_shape=(2,), mean=1.0, sigma_data=2.0, grid=GRID)
    x = draws(2, 30, seed=1)
    assert flow.basis.principal == 0
    assert (flow.log_prob(x) - exact_log_prob(flow, x, 0.02)).abs().max() < 5e-3
    tuned = ifpyro.from_denoiser(exact_denoiser(2), (0.02, 400.0), event_shape=(2,), sigma_data=2.0)
    assert tuned.report["numerics"]["doubling_rmse"] <= 1e-3
    assert tuned.report["numerics"]["round_trip_rmse"] <= 1e-4


def test_posteriors_are_exact():
    weights, means = torch.tensor([0.3, 0.7]).double(), torch.tensor([[-2.0, 0.3], [2.0, 0.0]]).double()
    covariances = torch.tensor([[[0.25, 0.1], [0.1, 0.3]], [[0.5, 0.0], [0.0, 0.4]]]).double()
    network = ExactMixture(weights, means, covariances)
    flow = ifpyro.from_denoiser(network, (0.02, 400.0), event_shape=(2,), sigma_data=1.5, grid=Grid(8))
    y = torch.tensor([0.6], dtype=torch.double)

    def model(y):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 1:], 0.4).to_event(1), obs=y)

    exact = GaussianMixture(weights, means, covariances, torch.tensor([[0.0, 1.0]]), y, 0.4)
    smc = ifpyro.SMC(model, 1024, num_islands=8, seed=1, progress=False).run(y)
    assert_exact(exact, smc.get_samples(group_by_chain=True)["x"])
    assert abs(smc.log_evidence - exact.log_evidence) < 3 * smc.log_evidence_se
    hmc = ifpyro.MCMC(ifpyro.HMC(model), 40, 20, 32, smc_particles=256, seed=1, progress=False).run(y)
    assert_exact(exact, hmc.get_samples(group_by_chain=True)["x"])


# -- what times mean ------------------------------------------------------------------------------------------------


def test_table_is_exact_at_its_entries_and_smooth_between():
    table = Table(TABLE)
    sigma = ((1 - TABLE) / TABLE).sqrt()
    time, alpha = table(sigma)
    torch.testing.assert_close(time, torch.arange(1000.0).double())
    torch.testing.assert_close(alpha.square(), TABLE)
    every_other = Table(TABLE[::2])  # the entries left out are known
    missed = every_other(sigma[21:-1:2])[0]
    torch.testing.assert_close(missed, torch.arange(10.5, 499).double(), rtol=0, atol=2e-3)
    assert Table(torch.cat([TABLE, torch.zeros(1)])).sigma_max == table.sigma_max


def test_continuous_schedule_is_inverted():
    def scales(t):
        return torch.cos(1.5 * t), torch.sin(1.5 * t) + 1e-3

    noise = Continuous(scales)
    t = torch.linspace(0, 1, 33).double()
    alpha, sigma = scales(t)
    time, found = noise(sigma / alpha)
    torch.testing.assert_close(time, t, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, alpha)


# -- the network is referred to -------------------------------------------------------------------------------------


def small(dim=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, dim))


class Timed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, time):
        return self.inner(x) + time.view(-1, *[1] * (x.ndim - 1)) / 1000


def test_the_network_is_not_changed():
    network = Timed(small()).train()
    flow = ifpyro.from_denoiser(network, TABLE, prediction="v", event_shape=(2,), grid=Grid(4))
    flow.double()
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    x = flow.decode(z)
    assert torch.equal(x, flow.decode(z)), "dropout is on"
    x.sum().backward()
    assert z.grad.abs().max() > 0
    assert all(p.grad is None for p in network.parameters())
    assert not any(name.startswith("velocity") for name in flow.state_dict())
    assert torch.equal(copy.deepcopy(flow).decode(z), x)
    shared = ifpyro.from_denoiser(network, TABLE, prediction="v", event_shape=(2,), grid=Grid(4))
    assert next(shared.velocity.network.parameters()).data_ptr() == next(network.parameters()).data_ptr()


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_file_keeps_a_reference(prediction, tmp_path):
    path, network = tmp_path / "flow.safetensors", Timed(small())
    noise = (0.01, 50.0) if prediction == "x0" else TABLE
    flow = ifpyro.from_denoiser(
        network, noise, prediction=prediction, event_shape=(2,), rescale=(2.0, -1.0), reference="a/net", grid=Grid(5)
    )
    flow.save(path)
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    again = ifpyro.load(path, network=network)
    assert torch.equal(again.decode(z), flow.decode(z))
    assert again.velocity.reference == "a/net"
    with pytest.raises(ValueError, match=r"'a/net'.*network=\.\.\."):
        ifpyro.load(path)
    with torch.no_grad():
        network.inner[0].weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="'a/net' with the weights it had"):
        ifpyro.load(path, network=network)
    flow = ifpyro.from_denoiser(network, noise, prediction=prediction, event_shape=(2,), grid=Grid(5)).double()
    flow.save(path)
    assert torch.equal(ifpyro.load(path, network=network).decode(z.double()), flow.decode(z.double()))


def test_functions_are_denoisers_too():
    """The Gaussian's own denoiser gives the identity of standardised coordinates."""
    flow = ifpyro.from_denoiser(
        lambda x, sigma: x * 4 / (4 + sigma[:, None] ** 2), (0.01, 100.0), event_shape=(3,), sigma_data=2.0
    )
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow.encode(x), x / 2, rtol=0, atol=1e-4)


# -- other libraries ------------------------------------------------------------------------------------------------


def pipeline(channels, size, prediction="v_prediction"):
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        )
    return diffusers.DDPMPipeline(network, diffusers.DDIMScheduler(prediction_type=prediction))


def test_diffusers_pipeline(tmp_path):
    """From a configuration: attention has no forward mode, and the Jacobian is that of the map all the same."""
    pipe = pipeline(1, 4)
    flow = ifpyro.from_denoiser(pipe, rescale=(2.0, -1.0), reference="here", grid=Grid(3)).double()
    assert flow.event_shape == (1, 4, 4)
    torch.testing.assert_close(flow.basis.mean, torch.full((16,), 0.5).double())
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x, log_det = flow.decode_and_log_det(z)
    assert flow.velocity._forward_mode is False
    assert (flow.basis.to_standard(x.flatten(1)) - z).abs().max() > 0.05, "the network does nothing"
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.decode(v[None]).flatten(), z[0])
    assert float(log_det[0]) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-8)
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-8)
    single = ifpyro.from_denoiser(pipe, rescale=(2.0, -1.0), reference="here", grid=Grid(3))
    single.save(tmp_path / "flow.safetensors")
    again = ifpyro.load(tmp_path / "flow.safetensors", network=pipe)
    assert torch.equal(again.decode(z.float()), single.decode(z.float()))
    torch.testing.assert_close(single.decode(z.float()).double(), x, rtol=0, atol=1e-4)


def test_diffusers_pipeline_of_many_pixels():
    flow = ifpyro.from_denoiser(pipeline(3, 8), grid=Grid(2))
    x = flow.sample(2, seed=0)
    assert x.shape == (2, 3, 8, 8)
    assert flow.log_prob(x).isfinite().all()
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-3)  # two steps are few
    with pytest.raises(ValueError, match="contradicts the scheduler"):
        ifpyro.from_denoiser(pipeline(3, 8), prediction="epsilon")


def test_azula(tmp_path):
    pytest.importorskip("azula")
    from azula.denoise import KarrasDenoiser
    from azula.noise import CosineSchedule, VPSchedule

    denoiser = KarrasDenoiser(Timed(small(3)), VPSchedule())
    flow = ifpyro.from_denoiser(denoiser, event_shape=(3,), sigma_data=1.0, grid=Grid(16)).double()
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    t = torch.tensor([0.5], dtype=torch.double)
    theta, y = flow.angles(t)[0], z
    alpha, sigma = denoiser.schedule(time := flow.velocity.embed(t)[0, 0])
    torch.testing.assert_close(sigma / alpha, theta[0].tan())
    x0 = copy.deepcopy(denoiser).double().eval()(alpha * y / theta.cos(), time.expand(4)).mean
    n = (y - theta.cos() * x0) / theta.sin()
    expected = theta.sin() * x0 - theta.cos() * n
    torch.testing.assert_close(flow.velocity(y, flow.velocity.embed(t)[0]), expected.detach(), rtol=0, atol=1e-6)
    flow.float().save(tmp_path / "flow.safetensors")
    assert torch.equal(
        ifpyro.load(tmp_path / "flow.safetensors", network=denoiser).decode(z.float()), flow.decode(z.float())
    )
    denoiser.schedule = CosineSchedule()
    with pytest.raises(ValueError, match="noise schedule it had"):
        ifpyro.load(tmp_path / "flow.safetensors", network=denoiser)


def test_reverse_mode_products_are_those_of_forward_mode():
    flow = wrapped("epsilon", dim=3, grid=Grid(3))
    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    embedding = flow.velocity.embed(torch.tensor([0.4]).double())[0]
    value, jacobian = velocity_and_jacobian(flow.velocity, y, embedding)
    assert flow.velocity._forward_mode is True
    flow.velocity._forward_mode = False
    for rows in (embedding, embedding.expand(4, -1)):
        again, other = velocity_and_jacobian(flow.velocity, y, rows)
        torch.testing.assert_close(again, value)
        torch.testing.assert_close(other, jacobian)
    leaf = y.clone().requires_grad_()
    flow.log_prob(leaf).sum().backward()  # a density that is itself differentiated
    found, leaf.grad, flow.velocity._forward_mode = leaf.grad, None, True
    flow.log_prob(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, found)


# -- what cannot work -----------------------------------------------------------------------------------------------


def test_a_wrong_prediction_is_noticed():
    network = Discrete(exact_denoiser(2), "epsilon", TABLE)
    with pytest.warns(UserWarning, match="worse than a Gaussian"):
        ifpyro.from_denoiser(network, TABLE, prediction="v", samples=draws(2), grid=GRID)


BAD = {
    "prediction": ({"noise": TABLE, "prediction": "score"}, "prediction expects one of"),
    "no prediction": ({"noise": TABLE}, "nothing tells what the network predicts"),
    "no noise": ({}, r"noise=\(sigma_min, sigma_max\)"),
    "sigmas": ({"noise": (2.0, 1.0)}, "0 < sigma_min < sigma_max"),
    "table": ({"noise": TABLE.flip(0), "prediction": "v"}, "decreasing table"),
    "table of betas": ({"noise": TABLE.diff(), "prediction": "v"}, "decreasing table"),
    "callable": ({"noise": lambda t: (2 - t, t + 1)}, "nothing tells"),
    "callable that decreases": ({"noise": lambda t: (t + 1, 2 - t), "prediction": "v"}, "increasing"),
    "event shape": ({"noise": (0.1, 9.0), "event_shape": None}, "expected event_shape="),
    "samples": ({"noise": (0.1, 9.0), "samples": torch.randn(30, 3)}, "expected samples of event shape"),
    "both": ({"noise": (0.1, 9.0), "samples": torch.randn(30, 2), "mean": 0.0}, "not both"),
    "basis": ({"noise": (0.1, 9.0), "basis": "pca"}, "expects samples"),
    "sd": ({"noise": (0.1, 9.0), "sigma_data": -1.0}, "sigma_data expects a positive number"),
    "factor": ({"noise": (0.1, 9.0), "rescale": (-1.0, 0.0)}, "factors > 0"),
    "shape of factor": ({"noise": (0.1, 9.0), "rescale": (torch.ones(3), 0.0)}, "broadcastable to"),
    "range": ({"noise": (0.1, 9.0), "schedule": Schedule.details_first()}, "within the noise that the denoiser knows"),
    "output": ({"noise": (0.1, 9.0), "denoiser": lambda x, t: x[:, :1]}, "the shape of its images"),
    "output of a wrong kind": ({"noise": (0.1, 9.0), "denoiser": lambda x, t: 3}, "got int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, message = BAD[name]
    options = {"denoiser": Timed(small()), "event_shape": (2,), **options}
    with pytest.raises(ValueError, match=message):
        ifpyro.from_denoiser(**options)


def test_other_schedules_and_bases_are_refused():
    samples = draws(3).float()
    options = {"noise": (0.01, 99.0), "samples": samples, "grid": GRID}
    network = exact_denoiser(3, torch.float32)
    angles = {"start": 0.05, "end": 1.5}
    with pytest.raises(ValueError, match="same for every axis"):
        ifpyro.from_denoiser(network, basis="pca", schedule=Schedule.preserving(**angles), **options)
    ifpyro.from_denoiser(network, basis="identity", schedule=Schedule.preserving(**angles), **options)
    units = Basis.from_samples(samples, own_units=True)
    with pytest.raises(ValueError, match="measured in units"):
        ifpyro.from_denoiser(network, basis=units, **options)
    with pytest.raises(ValueError, match="does not span axes"):
        ifpyro.from_denoiser(network, (0.5, 0.6), samples=samples, basis="pca")
    with pytest.raises(RuntimeError, match="works inside a flow"):
        DenoiserVelocity(network, Sigmas(0.1, 9.0), "x0", (3,)).embed(torch.zeros(1).double())
    with pytest.raises(TypeError, match="noise expects"):
        ifpyro.from_denoiser(network, 3.0, samples=samples)
    assert isinstance(network, ExactMixture)
