"""Everything a user does, on an accelerator: flows, training, files, every engine, what is read and checked."""

import copy
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from test_devices import image_flow

import ifpyro
from denoisers_zoo import exact_denoiser
from exact_densities import GaussianMixture, assert_exact
from flows_zoo import FLOWS, latents, mixture_flow, mlp_flow, samples
from ifpyro import Pool
from ifpyro.calibration import coverage, latent_coverage
from ifpyro.cli.main import main
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.reconstruction import measure
from ifpyro.flow.solver.grid import Grid
from ifpyro.infer.model.many import ManyDataSets
from ifpyro.training import Recipe
from interruptions import interrupt_at

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WEIGHTS = torch.tensor([0.3, 0.7])
MEANS = torch.tensor([[-2.0, 0.3], [2.0, 0.0]])
COVARIANCES = torch.tensor([[[0.25, 0.1], [0.1, 0.3]], [[0.5, 0.0], [0.0, 0.4]]])
OPTIONS = {
    "recipe": Recipe(max_steps=60, batch=64, shared=1, rate=2e-3, patience=1_000, check_every=10, matrix_rate=0.02),
    "network": {"width": 16, "blocks": 1, "dropout": 0.1},
    "progress": False,
    "seed": 3,
}


def two_modes():
    return ifpyro.InflationaryFlow.from_gaussian_mixture(WEIGHTS, MEANS, COVARIANCES).to(DEVICE)


def seen(y, flow):
    x = pyro.sample("x", flow.prior())
    pyro.sample("y", dist.Normal(x[..., 1], 0.4), obs=y)


def kind_of(tensor):
    return tensor.device.type


# -- flows ----------------------------------------------------------------------------------------------------------


def flow_of(name):
    if name in FLOWS:
        return FLOWS[name](torch.float32)
    if name == "denoiser":
        return ifpyro.from_denoiser(
            exact_denoiser(2, torch.float32), (0.02, 400.0), event_shape=(2,), sigma_data=1.5, grid=Grid(8)
        )
    return image_flow(name)


@pytest.mark.parametrize(
    "name", ["mixture 2", "network 8", "simplex", "stack", "pca", "separable", "low_rank", "identity", "denoiser"]
)
def test_a_flow_moves(name):
    flow = flow_of(name)
    z = latents(flow, 12)
    x, log_prob = flow.decode(z), flow.log_prob(flow.decode(z))
    there = copy.deepcopy(flow).to(DEVICE)
    found = there.decode(z.to(DEVICE))
    assert kind_of(found) == DEVICE
    torch.testing.assert_close(found.cpu(), x, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(there.log_prob(x.to(DEVICE)).cpu(), log_prob, rtol=0, atol=5e-2)
    torch.testing.assert_close(there.decode(there.encode(found)), found, rtol=2e-3, atol=2e-3)
    assert kind_of(there.sample(5, seed=0)) == DEVICE
    with ifpyro.fidelity("coarse"):
        assert there.decode(z.to(DEVICE)).isfinite().all()
    assert there.participation_ratio() > 0
    there.exact_up_to = 1
    assert (there.log_prob_estimate(found, probes=12, method="hutch++").standard_error >= 0).all()
    back = copy.deepcopy(there).to("cpu")
    torch.testing.assert_close(back.decode(z), x, rtol=0, atol=1e-5)


def test_what_lies_elsewhere_is_refused():
    flow = two_modes()
    with pytest.raises(TypeError, match=rf"float32 on {DEVICE}:0, got torch.float32 on cpu"):
        flow.decode(torch.zeros(3, 2))


def test_gradients_and_checkpoints_agree():
    flow = image_flow().to(DEVICE)
    leaf = latents(flow, 8).to(DEVICE).requires_grad_()
    (plain,) = torch.autograd.grad(flow.decode(leaf).sin().sum(), leaf)
    flow.gradient_checkpointing = True
    (again,) = torch.autograd.grad(flow.decode(leaf).sin().sum(), leaf)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixture 2", "network 8", "stack", "separable", "denoiser"])
def test_recorded_decodes_are_decodes(name):
    flow = flow_of(name).to(DEVICE)
    plain = copy.deepcopy(flow)
    flow.cuda_graphs = True
    z = [latents(flow, 7, seed=seed).to(DEVICE) for seed in range(8)]
    for values in z:  # the third is recorded, those after it are played
        assert torch.equal(flow.decode(values), plain.decode(values))
    kept = [flow.decode(values) for values in z]
    torch.testing.assert_close(torch.stack(kept), torch.stack([plain.decode(values) for values in z]))

    def gradients(of, starts):
        """Backwards in another order, the last one twice."""
        leaves = [start.clone().requires_grad_() for start in starts]
        ends = [of.decode(leaf).sin().sum() for leaf in leaves]
        found = [torch.autograd.grad(end, leaf, retain_graph=True)[0] for end, leaf in zip(ends, leaves, strict=True)]
        return [*found, torch.autograd.grad(ends[-1], leaves[-1])[0]]

    for _ in range(2):
        for found, expected in zip(gradients(flow, z), gradients(plain, z), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with ifpyro.fidelity("coarse"):
        for _ in range(4):
            torch.testing.assert_close(flow.decode(z[0]), plain.decode(z[0]))
    assert len(flow.map.recordings) == 3
    with torch.inference_mode():
        found = flow.decode(z[1])
    torch.testing.assert_close(found.clone(), plain.decode(z[1]))
    mine, flow.velocity = flow.velocity, copy.deepcopy(flow.velocity)  # another network for a while
    flow.encode(plain.decode(z[0]))
    flow.velocity = mine
    for values in z:
        torch.testing.assert_close(flow.decode(values), plain.decode(values))
    if name == "network 8":  # other weights are seen
        with torch.no_grad():
            for network in (flow.velocity, plain.velocity):
                network.outlet.weight.mul_(1.5)
        for _ in range(4):
            torch.testing.assert_close(flow.decode(z[0]), plain.decode(z[0]))
        leaf = z[0].clone().requires_grad_()
        for _ in range(4):
            end = flow.decode(leaf).sum()
        with torch.no_grad():
            flow.velocity.outlet.weight.mul_(1.1)
        with pytest.raises(RuntimeError, match="changed in place"):
            torch.autograd.grad(end, leaf)
        hessian = torch.autograd.functional.hessian(lambda v: flow.decode(v[None]).square().sum(), z[0][0])
        assert hessian.isfinite().all()
    assert len(copy.deepcopy(flow).map.recordings) == 0


def test_reduced_precision_and_layout():
    flow = image_flow().to(DEVICE)
    z = latents(flow, 16).to(DEVICE)
    full = flow.decode(z)
    flow.autocast = torch.bfloat16
    flow.to(memory_format=torch.channels_last)
    x = flow.decode(z, batch_size=8)
    assert x.dtype == torch.float32
    assert 0 < float((x - full).abs().max()) < 0.05


def test_compiled_steps_agree():
    flow, plain = (mlp_flow(4, torch.float32, grid=Grid(6)).to(DEVICE) for _ in range(2))
    assert flow.compile() > 0
    for rows in (64, 17):
        leaf = latents(flow, rows).to(DEVICE).requires_grad_()
        (found,) = torch.autograd.grad(flow.decode(leaf).sin().sum(), leaf)
        (expected,) = torch.autograd.grad(plain.decode(leaf).sin().sum(), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- training and files ---------------------------------------------------------------------------------------------


def test_training_goes_on_where_it_was(tmp_path, monkeypatch):
    x = samples(3, rows=400)
    whole = ifpyro.fit(x, device=DEVICE, **OPTIONS)
    assert kind_of(whole.sample(4, seed=0)) == DEVICE
    assert whole.log_prob(whole.sample(4, seed=0)).isfinite().all()
    path = tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 40)
        ifpyro.fit(x, device=DEVICE, checkpoint=path, **OPTIONS)
    resumed = ifpyro.fit(x, device=DEVICE, checkpoint=path, **OPTIONS)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_a_network_of_ones_own():
    flow = ifpyro.fit(samples(3, rows=400), device=DEVICE, **{**OPTIONS, "network": MLP(3, width=16, blocks=1)})
    assert kind_of(flow.sample(2, seed=0)) == DEVICE


def test_rows_from_a_file(tmp_path):
    np.save(tmp_path / "x.npy", samples(3, rows=400).numpy())
    flow = ifpyro.fit(np.load(tmp_path / "x.npy", mmap_mode="r"), device=DEVICE, **OPTIONS)
    assert kind_of(flow.sample(2, seed=0)) == DEVICE


def test_files_remember_no_device(tmp_path):
    flow = mlp_flow(2, torch.float32).to(DEVICE)
    flow.save(tmp_path / "flow")
    assert kind_of(ifpyro.load(tmp_path / "flow").basis.scale) == "cpu"
    there = ifpyro.load(tmp_path / "flow", device=DEVICE)
    z = latents(flow, 5).to(DEVICE)
    assert torch.equal(there.decode(z), flow.decode(z))


def test_command_line(tmp_path):
    x = mixture_flow(2, torch.float32).sample(900, seed=0).numpy()
    np.save(tmp_path / "x.npy", x[:600])
    np.save(tmp_path / "held_out.npy", x[600:])
    files = {name: str(tmp_path / name) for name in ("x.npy", "held_out.npy", "flow", "draws.npy")}
    network = ["--network", "width=16,blocks=1", "--max-steps", "30", "--quiet", "--device", DEVICE]
    assert main(["fit", files["x.npy"], "--out", files["flow"], *network]) == 0
    assert main(["sample", files["flow"], "--out", files["draws.npy"], "-n", "50", "--quiet", "--device", DEVICE]) == 0
    assert np.load(files["draws.npy"]).shape == (50, 2)
    assert main(["check", files["flow"], files["held_out.npy"], "--device", DEVICE]) in (0, 1)


def test_a_denoiser_from_diffusers():
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).to(DEVICE)
    flow = ifpyro.from_denoiser(diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()), grid=Grid(2))
    x = flow.sample(3, seed=0)
    assert kind_of(x) == DEVICE
    assert x.isfinite().all()


# -- inference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["smc", "hmc", "elliptical", "checkpointed hmc", "recorded smc", "recorded hmc"])
def test_engines_are_exact(engine, tmp_path):
    flow = two_modes()
    flow.gradient_checkpointing, flow.cuda_graphs = "checkpointed" in engine, "recorded" in engine
    y = torch.tensor(0.6, device=DEVICE)
    exact = GaussianMixture(WEIGHTS, MEANS, COVARIANCES, [[0.0, 1.0]], [0.6], 0.4)
    if "smc" in engine:
        run = ifpyro.SMC(seen, 2048, num_islands=16, prior_draws=1, seed=1, progress=False).run(y, flow)
        assert abs(run.log_evidence - exact.log_evidence) < 4 * run.log_evidence_se + 0.01
        empty = ifpyro.SMC(seen, 2048)
    else:
        kernel = ifpyro.HMC(seen) if "hmc" in engine else ifpyro.EllipticalSlice(seen)
        draws = 100 if "hmc" in engine else 250
        run = ifpyro.MCMC(kernel, draws, 60, 48, smc_particles=256, seed=1, progress=False).run(y, flow)
        empty = ifpyro.MCMC(kernel, 1)
    assert run.attributes["batching"] == "plate"
    assert (len(flow.map.recordings) > 0) == flow.cuda_graphs
    found = run.get_samples(group_by_chain=True)["x"]
    assert_exact(exact, found.double().cpu())
    posterior = ifpyro.to_arviz(run, progress=False).posterior["x"]
    np.testing.assert_allclose(posterior, found.cpu(), rtol=1e-5)
    run.save(tmp_path / "run")
    kept = empty.restore(tmp_path / "run", y, flow)
    torch.testing.assert_close(kept.positions(), run.positions())


def test_a_seed_decides_and_the_global_generators_are_left_alone():
    flow, y = two_modes(), torch.tensor(0.6, device=DEVICE)
    torch.manual_seed(7)
    torch.rand(3, device=DEVICE)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    runs = [ifpyro.SMC(seen, 64, seed=4, progress=False).run(y, flow) for _ in range(2)]
    assert torch.equal(runs[0].positions(), runs[1].positions())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(), before[1])


def test_constrained_sites_and_a_hierarchy():
    """Latents beside the flow whose tensors the model makes itself, on its own device."""
    flow = two_modes()
    y = torch.tensor([0.2, 0.9, 0.4], device=DEVICE)

    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones((), device=y.device)))
        with pyro.plate("objects", len(y)):
            x = pyro.sample("x", flow.prior())
            pyro.sample("y", dist.Normal(x[..., 1], scale + 0.1), obs=y)

    for run in (
        ifpyro.SMC(model, 128, seed=0, progress=False).run(y),
        ifpyro.MCMC(ifpyro.HMC(model), 20, 20, 8, seed=0, progress=False).run(y),
    ):
        assert (run.get_samples()["scale"] > 0).all()
        posterior = ifpyro.to_arviz(run, progress=False)
        assert posterior.posterior["x"].shape[-2:] == (3, 2)
        assert np.isfinite(posterior.log_likelihood["y"]).all()


def test_discrete_latents_are_summed_out():
    y = torch.tensor([-1.2, 0.4, 2.5], device=DEVICE)

    @config_enumerate
    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(2, device=y.device), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((), 0.4, device=y.device)))
            pyro.sample("y", dist.Normal(torch.where(k == 1, x[..., 0], x[..., 1]), 0.5), obs=y)

    there = ifpyro.SMC(model, 1024, seed=0, progress=False).run(y)
    here = ifpyro.SMC(model, 1024, seed=1, progress=False).run(y.cpu())
    assert abs(there.log_evidence - here.log_evidence) < 4 * math.hypot(there.log_evidence_se, here.log_evidence_se)


def test_many_data_sets_at_once():
    flow = two_modes()
    data = torch.tensor([0.6, -0.3], device=DEVICE)
    many = ManyDataSets(seen, (data[0], flow), {}, {"y": data})
    assert many.batching == "plate"
    totals = many(torch.zeros(4, 2, device=DEVICE))
    assert kind_of(totals[0]) == DEVICE
    assert totals[1].isfinite().all()


def test_linear_observations_of_a_gaussian():
    flow = ifpyro.InflationaryFlow.from_gaussian_mixture(torch.ones(1), MEANS[:1], COVARIANCES[:1]).to(DEVICE)
    operator, y = torch.tensor([[0.0, 1.0]], device=DEVICE), torch.tensor([0.9], device=DEVICE)
    draws = ifpyro.linear_posterior(flow, operator, y, 0.3, draws=4000, sweeps=60, ratio=0.3, progress=False)
    exact = GaussianMixture([1.0], MEANS[:1], COVARIANCES[:1], operator.cpu(), y.cpu(), 0.3)
    mean, variance = exact.moments()
    assert kind_of(draws) == DEVICE
    assert ((draws.mean(0).cpu() - mean) / variance.sqrt()).abs().max() < 5 / 4000**0.5
    assert (draws.std(0).cpu() / variance.sqrt() - 1).abs().max() < 5 / 8000**0.5


def test_variational_inference():
    flow, y = two_modes(), torch.tensor(0.6, device=DEVICE)
    pyro.clear_param_store()
    target = ifpyro.reparam(seen)
    guide = AutoNormal(target)
    with torch.random.fork_rng():
        svi = SVI(target, guide, ClippedAdam({"lr": 0.05}), Trace_ELBO(num_particles=16, vectorize_particles=True))
        losses = [svi.step(y, flow) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    data = ifpyro.to_arviz(guide, args=(y, flow), num_samples=50, seed=0, progress=False)
    assert data.posterior["x"].shape[-1] == 2
    pyro.clear_param_store()


# -- can it be trusted? ---------------------------------------------------------------------------------------------


def test_checks_and_calibration():
    flow = mixture_flow(2, torch.float32, grid=Grid(8)).to(DEVICE)
    x = flow.sample(1000, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = ifpyro.check(flow, x[500:], train=x[:500], level=0.05)
    assert "round trip" in str(result)
    found = latent_coverage(flow.encode, flow.decode, x, num=2000)
    assert found.mismatch < 0.01
    truth, draws = x[:20].cpu(), flow.sample((20, 30), seed=2).cpu()
    assert 0.5 < coverage(truth.numpy(), draws.numpy(), (0.9,)).pooled[0] <= 1
    assert 0 <= measure(flow, x[500:], x[:500])["error"][0] <= 1


def test_a_pool_of_one_takes_the_accelerator():
    pool = Pool.join()
    assert pool.size == 1
    assert pool.device.type == DEVICE
    flow = ifpyro.fit(samples(3, rows=400), pool=pool, device=pool.device, **OPTIONS)
    assert flow.device.type == DEVICE
