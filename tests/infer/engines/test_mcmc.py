"""The driver, and every engine on whole Pyro models with known posteriors."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats as scipy_stats

from exact_densities import GaussianMixture, assert_exact, conjugate, two_modes
from ifpyro import InflationaryFlow
from ifpyro.infer import HMC, MCMC, SMC, EllipticalSlice

ENGINES = ["hmc", "elliptical", "smc"]


def sample(engine, model, *args, seed=1, **kwargs):
    if engine == "smc":
        return SMC(model, 2048, num_islands=16, prior_draws=1, seed=seed, progress=False).run(*args, **kwargs)
    kernel = {"hmc": HMC, "elliptical": EllipticalSlice}[engine](model)
    draws = {"hmc": 100, "elliptical": 250}[engine]
    run = MCMC(kernel, draws, 60, 48, smc_particles=256, seed=seed, progress=False)
    return run.run(*args, **kwargs)


# -- Pyro models with known posteriors -----------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_conjugate_gaussian_model(engine):
    """``z ~ N(0, I_3)``, ``y_i ~ N(sum z, 0.5)``: Gaussian posterior, known evidence."""
    y = torch.tensor([1.0, 2.0, 1.2], dtype=torch.float64)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=y)

    exact = GaussianMixture([1.0], torch.zeros(1, 3), torch.eye(3)[None], torch.ones(3, 3), y, 0.5)
    run = sample(engine, model, y)
    assert_exact(exact, run.get_samples(group_by_chain=True)["z"])
    assert run.attributes["batching"] == "plate"
    if engine == "smc":
        assert abs(run.log_evidence - exact.log_evidence) < 3 * run.log_evidence_se


@pytest.fixture(scope="module")
def mixture_flow():
    """An exact flow of two separated Gaussians, and the mixture itself."""
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mean = torch.tensor([[-2.0, 0.3], [2.0, 0.0]], dtype=torch.float64)
    covariance = torch.tensor([[[0.25, 0.1], [0.1, 0.3]], [[0.5, 0.0], [0.0, 0.4]]], dtype=torch.float64)
    flow = InflationaryFlow.from_gaussian_mixture(weight, mean, covariance)
    return flow, (weight, mean, covariance)


@pytest.mark.parametrize("engine", ENGINES)
def test_mixture_prior_through_a_flow_keeps_its_mode_weights(engine, mixture_flow):
    """The posterior of a flow prior with two modes, coarse trajectories and all, is that of the mixture."""
    flow, mixture = mixture_flow

    def model(y):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 1], 0.4), obs=y)

    exact = GaussianMixture(*mixture, [[0.0, 1.0]], [0.6], 0.4)
    run = sample(engine, model, torch.tensor(0.6, dtype=torch.float64))
    draws = run.get_samples(group_by_chain=True)["x"].double()
    assert_exact(exact, draws)
    right = (draws[..., 0] > 0).double()
    expected = 1 - exact.cdf(0.0)
    assert float(right.mean()) == pytest.approx(expected, abs=0.06)
    assert (run.sample_stats()["fidelity_gap"].abs() > 1e-4).any()  # there really were two levels
    if engine == "smc":
        assert abs(run.log_evidence - exact.log_evidence) < 3 * run.log_evidence_se


def hierarchical(y, s):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(5.0, dtype=y.dtype)))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        theta = pyro.deterministic("theta", mu + tau * effect)
        pyro.sample("y", dist.Normal(theta, s), obs=y)


class Schools:
    """The hierarchical model with everything but ``tau`` integrated out by hand, ``tau`` by quadrature."""

    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    s = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)

    def __init__(self):
        self.tau = torch.linspace(1e-4, 40, 4001, dtype=torch.float64)
        variance = self.s**2 + self.tau[:, None] ** 2
        marginal = torch.diag_embed(variance) + 25.0
        normal = torch.distributions.MultivariateNormal(torch.zeros(8, dtype=torch.float64), marginal)
        log_density = normal.log_prob(self.y) + math.log(2 / 5) - (self.tau / 5) ** 2 / 2
        log_density = log_density - 0.5 * math.log(2 * math.pi)
        self.log_evidence = float(torch.trapezoid(log_density.exp(), self.tau).log())
        self.density = (log_density - self.log_evidence).exp()
        precision = 1 / 25 + (1 / variance).sum(-1)
        self.mu_mean = (self.y / variance).sum(-1) / precision
        self.mu_variance = 1 / precision

    def expect(self, values):
        return float(torch.trapezoid(self.density * values, self.tau))

    def exact(self):
        """Name -> (function of the draws, exact mean)."""
        shrink = self.s[0] ** 2 / (self.s[0] ** 2 + self.tau**2)
        theta = shrink * self.mu_mean + (1 - shrink) * self.y[0]
        below = torch.special.ndtr((3.0 - self.mu_mean) / self.mu_variance.sqrt())
        return {
            "mu": (lambda d: d["mu"], self.expect(self.mu_mean)),
            "mu^2": (lambda d: d["mu"] ** 2, self.expect(self.mu_mean**2 + self.mu_variance)),
            "mu < 3": (lambda d: (d["mu"] < 3).double(), self.expect(below)),
            "tau": (lambda d: d["tau"], self.expect(self.tau)),
            "tau^2": (lambda d: d["tau"] ** 2, self.expect(self.tau**2)),
            "tau < 2": (lambda d: (d["tau"] < 2).double(), self.expect((self.tau < 2).double())),
            "theta_0": (lambda d: d["theta"][..., 0], self.expect(theta)),
        }


@pytest.mark.parametrize("engine", ["hmc", "smc"])
def test_hierarchical_model_with_plates_and_constrained_scales(engine):
    import arviz

    schools = Schools()
    run = sample(engine, hierarchical, schools.y, schools.s)
    draws = run.get_samples(group_by_chain=True)
    assert draws["theta"].shape[2:] == (8,)
    assert (draws["tau"] > 0).all()
    for name, (f, exact) in schools.exact().items():
        values = f(draws)
        error = float(values.std()) / float(arviz.ess(values.numpy(), method="mean")) ** 0.5
        assert abs(float(values.mean()) - exact) < 4 * error, f"{name}: {values.mean():.4f}, exact {exact:.4f}"
    if engine == "smc":
        assert abs(run.log_evidence - schools.log_evidence) < 3 * run.log_evidence_se < 0.3
    else:
        assert run.diagnostics().value["R-hat"] < 1.02
        table = run.summary(var_names=["mu", "tau"])
        assert list(table.index) == ["mu", "tau"]


def test_init_in_the_users_space():
    schools = Schools()
    start = {
        "mu": torch.full((6,), 4.0).double(),
        "tau": torch.full((6,), 2.0).double(),
        "effect": torch.zeros(6, 8).double(),
    }
    options = {"num_chains": 6, "init": start, "seed": 1, "progress": False}
    tiny = HMC(hierarchical, step_size=1e-9, trajectory_length=1e-9, jumps=False)
    run = MCMC(tiny, 1, 0, **options).run(schools.y, schools.s)
    for name, value in run.get_samples().items():
        if name in start:
            torch.testing.assert_close(value, start[name], atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"init\['mu'\] must hold one value per chain"):
        MCMC(tiny, 1, 0, **{**options, "num_chains": 5}).run(schools.y, schools.s)


@pytest.mark.parametrize("engine", ENGINES)
def test_models_that_cannot_be_run(engine):
    def no_latents(y):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def outside(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(z * 0, 1.0, validate_args=False), obs=y)

    for model, message in ((no_latents, "latent"), (outside, "impossible|-inf")):
        with pytest.raises(ValueError, match=message):
            sample(engine, model, torch.tensor(5.0))
    with pytest.raises(TypeError, match="argument"):
        sample(engine, outside, wrong=1.0)


# -- the driver ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [HMC, EllipticalSlice])
def test_draws_and_statistics(kernel):
    problem = conjugate(bias=0.1)
    mcmc = MCMC(kernel(problem), 7, 5, 6, init="prior", seed=1, progress=False).run()
    assert mcmc.model is problem
    assert (mcmc.model_args, mcmc.model_kwargs) == ((), {})
    grouped, flat = mcmc.get_samples(group_by_chain=True)["q"], mcmc.get_samples()["q"]
    assert grouped.shape == (6, 7, 4)
    torch.testing.assert_close(flat, grouped.reshape(42, 4))
    stats = mcmc.sample_stats()
    expected = "lp energy acceptance_rate diverging step_size n_steps fidelity_gap"
    assert set(stats) == set(expected.split())
    assert all(value.shape == (6, 7) for value in stats.values())
    log_prior, log_likelihood = problem(flat)
    torch.testing.assert_close(stats["lp"].flatten(), log_prior + log_likelihood)
    assert mcmc.attributes["warmup_steps"] == 5
    assert mcmc.attributes["seed"] == 1


def test_particles_shorten_the_warm_up():
    warmups = [
        MCMC(HMC(conjugate()), 5, init=init).warmup_steps for init in ("smc", "prior", {"q": torch.zeros(64, 4)})
    ]
    assert warmups == [50, 300, 300]


def test_nothing_is_tuned_after_warm_up():
    mcmc = MCMC(HMC(conjugate()), 30, 30, 16, init="prior", seed=1, progress=False).run()
    assert len(mcmc.sample_stats()["step_size"].unique()) == 1


@pytest.mark.parametrize("init", ["smc", "prior"])
@pytest.mark.parametrize("kernel", [HMC, EllipticalSlice])
def test_seeds_decide_everything_and_the_global_generator_is_left_alone(init, kernel):
    before = torch.get_rng_state()

    def run(seed):
        options = {"smc_particles": 32, "init": init, "seed": seed, "progress": False}
        return MCMC(kernel(conjugate(bias=0.1)), 5, 25, 4, **options).run().positions()

    one, same, other = run(1), run(1), run(2)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_run_forgets_the_first():
    kernel = HMC(conjugate())
    options = {"smc_particles": 32, "seed": 1, "progress": False}
    fresh = MCMC(HMC(conjugate()), 5, 25, 4, **options).run().positions()
    MCMC(kernel, 5, 25, 9, **options).run()
    again = MCMC(kernel, 5, 25, 4, **options).run().positions()
    assert torch.equal(fresh, again)


def test_more_chains_than_particles_and_a_single_chain():
    options = {"smc_particles": 16, "seed": 1, "progress": False}
    assert MCMC(HMC(two_modes()), 2, 20, 50, **options).run().positions().shape == (50, 2, 2)
    assert MCMC(HMC(two_modes()), 2, 30, 1, **options).run().positions().shape == (1, 2, 2)


def test_no_warm_up():
    assert MCMC(HMC(conjugate()), 3, 0, 4, smc_particles=16, seed=1, progress=False).run().positions().numel()


class Failing:
    """A conjugate problem that misbehaves after a given number of fine evaluations."""

    def __init__(self, after, how):
        self.problem, self.after, self.how, self.calls = conjugate(bias=0.1), after, how, 0
        self.dim, self.gaussian_prior = self.problem.dim, True
        self.sample_prior, self.sites = self.problem.sample_prior, self.problem.sites

    def __call__(self, q):
        self.calls += not torch.is_grad_enabled()
        log_prior, log_likelihood = self.problem(q)
        if self.calls > self.after:
            if self.how == "nan":
                return log_prior, log_likelihood * math.nan
            raise self.how
        return log_prior, log_likelihood


def failing_run(after, how):
    return MCMC(
        HMC(Failing(after, how), level="coarse", jumps=False),
        50,
        10,
        4,
        init="prior",
        seed=1,
        progress=False,
    )


def test_interrupting_keeps_the_draws_made():
    mcmc = failing_run(30, KeyboardInterrupt())
    with pytest.warns(UserWarning, match="interrupted: .* of 50 draws per chain are kept"):
        mcmc.run()
    kept = mcmc.positions().shape[1]
    assert 10 < kept < 30
    assert all(value.shape == (4, kept) for value in mcmc.sample_stats().values())
    assert mcmc.attributes["warmup_steps"] == 10


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (ValueError("bad scale"), r"failed in sampling, transition .* \(ValueError: bad scale\)"),
        ("nan", "NaN at every draw in 10 evaluations in a row"),
    ],
)
def test_a_model_that_fails_on_the_way_keeps_the_draws_made(how, message):
    mcmc = failing_run(30, how)
    with pytest.raises(RuntimeError, match=message):
        mcmc.run()
    assert 10 < mcmc.get_samples(group_by_chain=True)["q"].shape[1] < 50


def test_draws_are_kept_by_a_model_that_fails_for_good():
    calls = []

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls.append(1)
        if len(calls) > 200:
            raise OSError("the simulator is gone")
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    mcmc = MCMC(HMC(model), 500, 2, 4, init="prior", seed=1, progress=False)
    with pytest.raises(RuntimeError, match="failed in sampling"):
        mcmc.run(torch.tensor(0.3))
    with pytest.raises(RuntimeError, match=r"the simulator is gone\); the unconstrained draws are kept: positions\(\)"):
        mcmc.get_samples()
    assert mcmc.positions().shape[1] > 2


def test_a_failure_in_warm_up_leaves_nothing():
    mcmc = failing_run(5, ValueError("early"))
    with pytest.raises(RuntimeError, match="failed in warm-up"):
        mcmc.run()
    with pytest.raises(RuntimeError, match="holds no draws"):
        mcmc.get_samples()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains must be an integer of at least 1, got 0"),
        ({"num_samples": -5}, "num_samples must be an integer of at least 1, got -5"),
        ({"num_samples": 1.5}, "num_samples must be an integer"),
        ({"num_chains": True}, "num_chains must be an integer"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0"),
        ({"init": "random"}, "init must be 'smc', 'prior' or a dictionary .* got 'random'"),
        ({"batching": "pmap"}, "batching must be one of"),
        ({"smc_particles": 2}, "smc_particles"),
        ({"batch_size": -1}, "batch_size"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MCMC(HMC(conjugate()), **{"num_samples": 5, **options})


def test_misuse():
    with pytest.raises(TypeError, match="chains"):
        MCMC(HMC(conjugate()), 5, chains=3)
    with pytest.raises(TypeError, match=r"MCMC expects a kernel.*got ifpyro.*SMC; an SMC runs by itself"):
        MCMC(SMC(conjugate()), 5)
    with pytest.raises(TypeError, match="MCMC expects a kernel"):
        MCMC(pyro.infer.NUTS(lambda: None), 5)
    with pytest.raises(RuntimeError, match="holds no draws"):
        MCMC(HMC(conjugate()), 5).get_samples()


def test_the_statistical_assertion_can_fail():
    """A normal sample of slightly wrong mean or width is caught."""
    problem = conjugate()
    mean, variance = problem.moments()
    noise = torch.from_numpy(scipy_stats.norm.rvs(size=(8, 2000, 4), random_state=0))
    right = SimpleNamespace(moments=problem.moments, cdf=problem.cdf)
    assert_exact(right, mean + variance.sqrt() * noise)
    for wrong in (mean + 0.05 + variance.sqrt() * noise, mean + 1.05 * variance.sqrt() * noise):
        with pytest.raises(AssertionError, match="exact"):
            assert_exact(right, wrong)


def located(y, sd=0.5):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, sd), obs=y)


def renamed(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def test_draws_of_a_file_belong_to_one_model_and_its_data(tmp_path):
    path, options = tmp_path / "draws", {"init": "prior", "seed": 1, "progress": False}
    y = torch.tensor([0.3, -0.2, 0.9])
    whole = MCMC(HMC(located), 6, 5, 4, checkpoint=path, **options).run(y)
    again = MCMC(HMC(located), 1).restore(path, y)
    assert torch.equal(again.positions(), whole.positions())
    assert (again.num_chains, again.num_samples) == (4, 6)
    for kernel, data, message in (
        (HMC(located), (y + 0.05,), "of another model or of other data"),
        (HMC(located), (y[:2],), "of another model or of other data"),
        (HMC(located), (y, 0.6), "of another model or of other data"),
        (HMC(renamed), (y,), r"of the sites \['x'\], this model has \['z'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            MCMC(kernel, 1).restore(path, *data)
    with pytest.raises(ValueError, match="made by MCMC, not by SMC"):
        SMC(located).restore(path, y)
