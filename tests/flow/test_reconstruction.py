"""The first k latents: what a decoder reconstructs, its measured price, and inference in k latents."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import ifpyro
from flows_zoo import latents, mixture_density, mixture_flow, mlp_flow
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.reconstruction import lost, measure
from ifpyro.flow.solver.grid import Grid
from ifpyro.infer.model.batched import BatchedModel

SD = torch.tensor([2.0, 1.0, 0.5, 0.25], dtype=torch.double)


def gaussian(rows, seed, mean=3.0):
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double))[0]
    return mean + (torch.randn(rows, 4, generator=generator, dtype=torch.double) * SD) @ rotation.T


def gaussian_flow(x, schedule=None):
    covariance = torch.cov(x.T)
    return InflationaryFlow.from_gaussian_mixture(
        torch.ones(1).double(), x.mean(0, keepdim=True), covariance[None], schedule=schedule, grid=Grid(1)
    )  # its velocity is zero: any grid is exact


@pytest.mark.parametrize("schedule", [Schedule.preserving(), Schedule.details_first(2.0), Schedule.reducing(2, 0.5)])
def test_a_gaussian_is_reconstructed_as_by_principal_components(schedule):
    """The flow of a Gaussian is linear on each principal axis, so k latents are k principal components."""
    train, held_out = gaussian(400, 1), gaussian(300, 2)
    report = measure(gaussian_flow(train, schedule), train, held_out)
    assert report["k"] == [1, 2, 4]
    assert report["rows"] == 300
    assert report["error"] == pytest.approx(report["pca"], abs=1e-6)
    exact = 1 - SD.square().cumsum(0) / SD.square().sum()
    # a share of variance from 300 rows of few degrees of freedom is known to a few parts in a hundred
    assert report["pca"][:2] == pytest.approx(exact[:2].tolist(), abs=4 * max(report["error_se"]))
    assert report["error"][-1] == pytest.approx(0.0, abs=1e-12)


def test_standard_error_is_that_of_repeated_samples():
    train = gaussian(2000, 1)
    flow = gaussian_flow(train)
    reports = [measure(flow, train, gaussian(100, seed)) for seed in range(40)]
    spread = torch.tensor([r["error"][0] for r in reports]).std()
    claimed = torch.tensor([r["error_se"][0] for r in reports]).mean()
    assert float(spread / claimed) == pytest.approx(1.0, abs=4 / (2 * 39) ** 0.5)


def curve():
    """A parabola in the plane as a mixture of short, thin Gaussians along it: weights, means, covariances."""
    u = Normal(0.0, 1.0).icdf((torch.arange(24, dtype=torch.double) + 0.5) / 24)
    means = torch.stack([2 * u, 0.35 * (u.square() - 1)], -1)
    along = torch.stack([torch.full_like(u, 0.5), 0.175 * u], -1)
    covariances = 0.2 * along[:, :, None] * along[:, None, :] + 0.03**2 * torch.eye(2)
    return torch.full((24,), 1 / 24, dtype=torch.double), means, covariances


@pytest.mark.parametrize(
    ("schedule", "low", "high"),
    [
        (Schedule.preserving(), 3.0, 10.0),
        (Schedule.reducing(1, 1.0), 3.0, 12.0),
        (Schedule.details_first(2.0), 0.0, 0.2),
        (Schedule.details_first(4.0), 0.0, 0.02),
    ],
)
def test_one_latent_follows_a_curve_only_if_the_details_inflate_first(schedule, low, high):
    """Exact velocities. Generated last, the height of the parabola is a function of the first latent.

    Generated first, as in the paper's reducing order, it is known before the position, and of that only a sign is left
    to say: one latent then reconstructs worse than a straight line.
    """
    flow = InflationaryFlow.from_gaussian_mixture(*curve(), schedule=schedule, grid=Grid(24))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        points = mixture_density(*curve()).sample((600,))
    ours, theirs, _ = lost(flow, points, points[:100], [1])
    assert low <= float(ours.sum() / theirs.sum()) < high


def test_columns_in_their_own_units_are_compared_in_them():
    unit = torch.tensor([1.0, 1000.0, 1.0, 1.0], dtype=torch.double)
    train, held_out = gaussian(400, 1), gaussian(200, 2)

    def report(factor):
        basis = Basis.from_samples(train * factor, own_units=True)
        flow = InflationaryFlow(basis, Schedule.preserving(), MLP(4, width=8).double(), grid=Grid(1))
        return measure(flow, train * factor, held_out * factor)

    plain, stretched = report(torch.ones(4, dtype=torch.double)), report(unit)
    assert stretched["error"] == pytest.approx(plain["error"], abs=1e-9)
    assert stretched["error"] == pytest.approx(stretched["pca"], abs=1e-9)
    assert 0.05 < stretched["error"][0] < 0.95


def test_fit_measures_and_the_file_keeps_it(tmp_path):
    x = gaussian(200, 1).float().reshape(200, 2, 2)
    flow = ifpyro.fit(x, seed=0, max_steps=20, progress=False)
    json.dumps(flow.report["reconstruction"], allow_nan=False)
    flow.save(tmp_path / "flow.safetensors")
    loaded = ifpyro.load(tmp_path / "flow.safetensors")
    for k, index in ((1, 0), (2, 1), (3, 1), (4, 2)):
        for name in ("error", "pca"):
            expected = flow.report["reconstruction"][name][index]
            decoder = loaded.decoder(k)
            assert expected == (decoder.reconstruction_error if name == "error" else decoder.pca_error)


def test_a_flow_that_was_not_measured_says_so():
    with pytest.raises(ValueError, match=r"found no flow\.report"):
        _ = mixture_flow(3, torch.double).decoder(2).reconstruction_error


def test_decoder_and_encode_agree_with_the_flow():
    flow = mlp_flow(6, torch.double, event_shape=(2, 3))
    z = latents(flow, 5)
    decoder = flow.decoder(6)
    assert torch.equal(decoder(z), flow.decode(z))
    assert torch.allclose(flow.decoder(2).encode(flow.decode(z)), z[:, :2], atol=1e-6)


def test_inference_in_k_latents_is_exact_for_a_gaussian():
    """SMC through a decoder against the conjugate posterior of a linear map."""
    x = gaussian(400, 1)
    flow = gaussian_flow(x).float()
    decoder, noise = flow.decoder(2), 0.5
    zero, eye = torch.zeros(1, 2), torch.eye(2)
    offset = decoder(zero)[0]
    matrix = torch.cat([decoder(row[None]) - offset for row in eye]).T  # the Gaussian's flow is affine
    y = torch.tensor([1.0, 5.0, 3.0, 2.0])
    precision = eye + matrix.T @ matrix / noise**2
    mean = torch.linalg.solve(precision, matrix.T @ (y - offset) / noise**2)
    evidence = MultivariateNormal(offset, matrix @ matrix.T + noise**2 * torch.eye(4)).log_prob(y)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = pyro.deterministic("x", decoder(z), event_dim=1)
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    assert BatchedModel(model, (y,)).sample_prior(3, torch.Generator().manual_seed(0)).shape == (3, 2)
    smc = ifpyro.SMC(model, 1024, seed=0, progress=False)
    smc.run(y)
    draws = smc.get_samples()
    sd = precision.inverse().diagonal().sqrt()
    assert torch.allclose(draws["z"].mean(0), mean, atol=5 * float(sd.max()) / 200**0.5)
    assert torch.allclose(draws["z"].std(0), sd, rtol=5 / (2 * 200) ** 0.5)
    assert torch.allclose(draws["x"], decoder(draws["z"]), atol=1e-5)
    assert smc.log_evidence == pytest.approx(float(evidence), abs=0.3)
