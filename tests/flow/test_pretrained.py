"""Noise of pretrained networks in the forms in which it comes, and what tells that it is wrong."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import ifpyro
from denoisers_zoo import Discrete, ExactMixture, exact_denoiser, linear_table
from flows_zoo import mixture, mixture_density
from ifpyro.flow.networks.noise import Continuous, LogSigmas, Straight, Table, as_noise, noise_from_dict
from ifpyro.flow.solver.grid import Grid

TABLE = linear_table()
GRID = Grid(8)


def draws(dim, rows=2_000, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mixture_density(*mixture(dim)).sample((rows,))


# -- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDPM", "DDIM"])
def test_zero_terminal_snr_leaves_out_the_placeholder(name):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, f"{name}Scheduler")(rescale_betas_zero_snr=True)
    shares = scheduler.alphas_cumprod.double()
    found = as_noise(scheduler)
    assert isinstance(found, Table)
    assert len(found.shares) == len(shares) - 1
    assert found.sigma_max == pytest.approx(float(((1 - shares[-2]) / shares[-2]).sqrt()))
    sigma = ((1 - shares[[0, 500, 998]]) / shares[[0, 500, 998]]).sqrt()
    torch.testing.assert_close(found(sigma)[0], torch.tensor([0.0, 500.0, 998.0]).double(), rtol=0, atol=1e-6)


def test_a_table_that_begins_with_one_keeps_counting_from_its_first_entry():
    t = torch.linspace(0, 1, 101, dtype=torch.double)
    cosine = torch.cos(t * math.pi / 2).square()
    table = torch.cat([torch.ones(1).double(), cosine[:-1]])  # two entries of exactly 1
    found = as_noise(table)
    sigma = ((1 - table[[2, 50]]) / table[[2, 50]]).sqrt()
    torch.testing.assert_close(found(sigma)[0], torch.tensor([2.0, 50.0]).double(), rtol=0, atol=1e-6)
    again = noise_from_dict(found.to_dict(), None)
    torch.testing.assert_close(again(sigma)[0], found(sigma)[0], rtol=0, atol=0)


def test_tables_that_are_none_are_still_refused():
    for table in (TABLE.flip(0), torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.5, 0.6]), torch.tensor([0.5, 0.5])):
        with pytest.raises(ValueError, match="decreasing table"):
            Table(table)


# -- other schedulers -----------------------------------------------------------------------------------------------


class Straightened(nn.Module):
    """The exact network of flow matching: sees ``(1 - t) x_0 + t n`` and ``1000 t``."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def forward(self, image, time):
        t = (time / 1000)[:, None]
        sigma = t / (1 - t)
        x0 = self.exact.x0(image / (1 - t), sigma[:, 0])
        return (image - (1 - t) * x0) / t - x0


class Preconditioned(nn.Module):
    """The network inside EDM's denoiser, exact."""

    def __init__(self, exact, sd, sign):
        super().__init__()
        self.exact, self.sd, self.sign = exact, sd, sign

    def forward(self, image, time):
        sigma = (4 * time).exp()[:, None]
        root = (sigma**2 + self.sd**2).sqrt()
        noised = image * root
        x0 = self.exact.x0(noised, sigma[:, 0])
        return self.sign * (x0 - self.sd**2 / root**2 * noised) * root / (sigma * self.sd)


def same_flow(network, noise, floor, last, **options):
    """The flow is that of the exact denoiser between the same noise levels."""
    x = draws(2)
    flow = ifpyro.from_denoiser(network, noise, samples=x, grid=GRID, basis="pca", **options)
    plain = ifpyro.from_denoiser(exact_denoiser(2), (floor, last), samples=x, grid=GRID, basis="pca")
    torch.testing.assert_close(flow.encode(x[:5]), plain.encode(x[:5]), rtol=0, atol=1e-6)
    return flow


def test_flow_matching_scheduler():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    found = as_noise(scheduler)
    assert isinstance(found, Straight)
    time, alpha = found(torch.tensor([1.0, 3.0]).double())
    torch.testing.assert_close(time, torch.tensor([500.0, 750.0]).double())
    torch.testing.assert_close(alpha, torch.tensor([0.5, 0.25]).double())
    flow = same_flow(Straightened(exact_denoiser(2)), scheduler, found.sigma_min, found.sigma_max)
    assert flow.velocity.prediction == "flow"
    again = noise_from_dict(found.to_dict(), None)
    assert (again.sigma_min, again.sigma_max) == (found.sigma_min, found.sigma_max)
    shifted = as_noise(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))  # the same path, other steps on it
    torch.testing.assert_close(shifted(torch.tensor([1.0]))[0], torch.tensor([500.0]))
    by_flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert isinstance(as_noise(by_flow), Straight)
    with pytest.raises(ValueError, match="invert_sigmas=True"):
        as_noise(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


@pytest.mark.parametrize(("kind", "sign"), [("epsilon", 1.0), ("v_prediction", -1.0)])
def test_edm_scheduler(kind, sign):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.02, sigma_max=400.0, sigma_data=1.7, prediction_type=kind)
    network = Preconditioned(exact_denoiser(2), 1.7, sign)
    # What the scheduler makes of the network is the denoiser.
    x, sigma = draws(2, 4), torch.tensor(0.8).double()
    inner = network(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma).expand(4))
    torch.testing.assert_close(
        scheduler.precondition_outputs(x, inner, sigma), exact_denoiser(2)(x, sigma.expand(4)), rtol=1e-6, atol=1e-6
    )
    flow = same_flow(network, scheduler, 0.02, 400.0)
    assert isinstance(flow.velocity.noise, LogSigmas)
    assert flow.velocity.prediction == {"epsilon": "edm", "v_prediction": "edm_v"}[kind]
    again = noise_from_dict(flow.velocity.noise.to_dict(), None)
    torch.testing.assert_close(again(sigma[None])[1], flow.velocity.noise(sigma[None])[1])

    class OtherTime(diffusers.EDMEulerScheduler):
        def precondition_noise(self, sigma):
            return sigma.atan()

    with pytest.raises(ValueError, match=r"noise of OtherTime expects the time log\(sigma\) / 4"):
        as_noise(OtherTime())


def test_straight_line_on_the_whole_interval_is_told_what_to_do():
    def scales(t):
        return 1 - t, t

    with pytest.raises(ValueError, match=r"got 0 at 0 and inf at 1; clip to \[eps, 1 - eps\]"):
        Continuous(scales)
    with pytest.raises(ValueError, match=r"reverse time: noise=lambda t: scales\(1 - t\).*changes its sign"):
        Continuous(lambda t: (t, 1 - t))
    found = Continuous(lambda t: scales(t.clamp(1e-3, 1 - 1e-3)))  # as the message says
    assert found.sigma_min == pytest.approx(1e-3 / 0.999)
    time, alpha = found(torch.tensor([found.sigma_min, 1.0, found.sigma_max]).double())
    torch.testing.assert_close(time, torch.tensor([1e-3, 0.5, 0.999]).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(alpha, 1 - time)
    reversed_path = Continuous(lambda t: (lambda u: (u, 1 - u))((1 - t).clamp(1e-3, 1 - 1e-3)))
    torch.testing.assert_close(reversed_path(torch.ones(1).double())[0], torch.tensor([0.5]).double())


# -- what tells that something is wrong -------------------------------------------------------------------------------


def test_a_wrong_table_is_told_by_the_latents():
    network, x = Discrete(exact_denoiser(2), "epsilon", TABLE), draws(2)
    right = ifpyro.from_denoiser(network, TABLE, prediction="epsilon", samples=x, grid=GRID)
    assert right.report["denoiser"]["latents"]["power"] == pytest.approx(1, abs=0.1)
    with pytest.warns(UserWarning, match="latents have a mean square of .*not its roots"):
        wrong = ifpyro.from_denoiser(network, TABLE.sqrt(), prediction="epsilon", samples=x, grid=GRID)
    assert wrong.report["denoiser"]["latents"]["power"] > 1.12


def test_noise_that_does_not_drown_the_data_is_told():
    weights, means = torch.tensor([0.5, 0.5]).double(), torch.tensor([[-2.0], [2.0]]).double()
    network = ExactMixture(weights, means, torch.full((2, 1, 1), 0.04).double())
    generator = torch.Generator().manual_seed(0)
    side = 4.0 * torch.randint(0, 2, (4000, 1), generator=generator) - 2
    x = side + 0.2 * torch.randn(4000, 1, generator=generator, dtype=torch.double)
    with pytest.warns(UserWarning, match=r"kurtosis of .* largest noise does not drown the data \(up to"):
        ifpyro.from_denoiser(network, (0.02, 2.0), samples=x, grid=GRID)
    flow = ifpyro.from_denoiser(network, (0.02, 200.0), samples=x, grid=GRID)  # and is not where it does
    assert flow.report["denoiser"]["latents"]["kurtosis"] == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("samples", [None, draws(2, 50)])
def test_a_network_that_returns_nan_is_told_so(samples):
    class Broken(nn.Module):
        def forward(self, image, time):
            return image * torch.where(time > 1.0, torch.nan, 1.0)[:, None]

    shape = (2,) if samples is None else None
    with pytest.raises(ValueError, match=r"finite answers of the denoiser, got NaN or infinity at sigma "):
        ifpyro.from_denoiser(Broken(), (0.02, 80.0), event_shape=shape, samples=samples)


def test_tuning_shows_its_progress_on_few_rows_of_many_axes(capsys):
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = 0

        def forward(self, image, time):
            return image / (1 + time[:, None] ** 2)

    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    options = {"samples": x, "basis": "identity", "tolerance": 0.1}
    ifpyro.from_denoiser(Gaussian(), (0.02, 80.0), **options)
    shown = capsys.readouterr().err
    assert "tuning the solver" in shown
    assert "encoding 128 rows" in shown
    ifpyro.from_denoiser(Gaussian(), (0.02, 80.0), progress=False, **options)
    assert "tuning" not in capsys.readouterr().err


def test_numpy_tables_of_other_bytes():
    assert as_noise(TABLE.numpy()).sigma_max == as_noise(TABLE).sigma_max
    assert as_noise(np.asarray(TABLE, dtype=np.float32)).sigma_max == pytest.approx(as_noise(TABLE).sigma_max, rel=1e-4)
