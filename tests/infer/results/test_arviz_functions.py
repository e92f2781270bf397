"""Every ArviZ function that a Pyro user reaches for accepts what `to_arviz` returns, on ArviZ 0.2x and on
1.x."""

import warnings

import matplotlib

matplotlib.use("Agg")

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ifpyro.infer.results.arviz import to_arviz

CHAINS, DRAWS, ROWS = 4, 150, 20
NEW = int(az.__version__.split(".")[0]) >= 1


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, generator=generator)
    return x, 0.5 + 1.5 * x + 0.4 * torch.randn(ROWS, generator=generator)


def line(x, y=None, slope=True):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("row", len(x)):
        mean = pyro.deterministic("mean", a + (b[..., :1] if slope else 0.0) * x)
        pyro.sample("y", dist.Normal(mean, 0.4), obs=y)


class Chains:
    """Exact draws of the conjugate posterior, with statistics, in the shape of this library's own engines."""

    def __init__(self, slope=True):
        x, y = data()
        self.model, self.model_args, self.model_kwargs = line, (x,), {"y": y, "slope": slope}
        self.attributes = {"sampling_time": 1.5, "seed": 7, "exact": True}
        design = torch.stack([torch.ones_like(x), x if slope else torch.zeros_like(x)], -1)
        precision = design.T @ design / 0.4**2 + torch.eye(2) / 4
        mean = torch.linalg.solve(precision, design.T @ y / 0.4**2)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            draws = torch.distributions.MultivariateNormal(mean, precision_matrix=precision).sample((CHAINS, DRAWS))
            second = torch.stack([draws[..., 1], 2 * torch.randn(CHAINS, DRAWS)], -1)
            self.stats = {
                "energy": torch.randn(CHAINS, DRAWS),
                "acceptance_rate": torch.rand(CHAINS, DRAWS),
                "diverging": torch.rand(CHAINS, DRAWS) < 0.1,
                "step_size": torch.full((CHAINS, DRAWS), 0.3),
                "n_steps": torch.full((CHAINS, DRAWS), 7),
                "log_weight": torch.zeros(CHAINS, DRAWS),
            }
        self.samples = {"a": draws[..., 0], "b": second}

    def get_samples(self, group_by_chain=False):
        return self.samples if group_by_chain else {n: v.flatten(0, 1) for n, v in self.samples.items()}

    def sample_stats(self):
        return self.stats


@pytest.fixture(scope="module")
def posterior():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return to_arviz(Chains(), prior=100, progress=False)


def rank(data):
    az.plot_rank(data, var_names=["a"])


def pair(data):
    if NEW:
        az.plot_pair(data, var_names=["a", "b"], visuals={"divergence": True})
    else:
        az.plot_pair(data, var_names=["a", "b"], divergences=True)


def predictive_check(data):
    if NEW:
        az.plot_ppc_dist(data, num_samples=20)
    else:
        az.plot_ppc(data, num_pp_samples=20)


def prior_check(data):
    if NEW:
        az.plot_ppc_dist(data, group="prior_predictive", num_samples=20)
    else:
        az.plot_ppc(data, group="prior", num_pp_samples=20)


def loo_pit(data):
    if NEW:
        az.plot_loo_pit(data)
    else:
        az.plot_loo_pit(data, y="y")


def prior_posterior(data):
    if NEW:
        az.plot_prior_posterior(data, var_names=["a"])
    else:
        az.plot_dist_comparison(data, var_names=["a"])


FUNCTIONS = {
    "summary": lambda data: az.summary(data),
    "trace": lambda data: az.plot_trace(data, var_names=["a", "b"]),
    "rank": rank,
    "energy": lambda data: az.plot_energy(data),
    "ess": lambda data: (az.ess(data), az.plot_ess(data, var_names=["a"])),
    "rhat": lambda data: az.rhat(data),
    "bfmi": lambda data: az.bfmi(data),
    "pair": pair,
    "forest": lambda data: az.plot_forest(data, var_names=["a", "mean"]),
    "predictive check": predictive_check,
    "prior check": prior_check,
    "prior against posterior": prior_posterior,
    "loo": lambda data: az.loo(data),
    "loo_pit": loo_pit,
    "extract": lambda data: az.extract(data, num_samples=10),
}


PLOTS = {name for name in FUNCTIONS if name not in {"summary", "rhat", "bfmi", "loo", "extract"}}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_runs_without_a_warning(posterior, name):
    plt.close("all")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        FUNCTIONS[name](posterior)
    assert bool(plt.get_fignums()) == (name in PLOTS)
    plt.close("all")


@pytest.fixture(scope="module")
def from_pyro():
    x, y = data()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro says when it runs chains one after the other
        torch.manual_seed(1)
        mcmc = pyro.infer.MCMC(
            pyro.infer.NUTS(line), num_samples=60, warmup_steps=60, num_chains=2, disable_progbar=True
        )
        mcmc.run(x, y=y)
    mcmc._diagnostics[1]["divergences"] = [3, 59]  # a straight line never diverges by itself
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return to_arviz(mcmc, prior=50, progress=False)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in {"energy", "bfmi"}])
def test_function_runs_on_pyro_nuts(from_pyro, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if name == "loo":  # sixty draws are too few for it, and ArviZ says so
            warnings.simplefilter("ignore")
        FUNCTIONS[name](from_pyro)
    plt.close("all")


def test_the_divergences_pyro_counted_are_the_draws_marked(from_pyro):
    marked = from_pyro["sample_stats"]["diverging"].values
    assert marked.shape == (2, 60)
    assert not marked[0].any()
    assert np.flatnonzero(marked[1]).tolist() == [3, 59]


def test_loo_is_what_psis_gives_from_the_exact_log_likelihood(posterior):
    """Importance weights 1/p(y_i | theta) without smoothing estimate the same elpd; the weights are well
    behaved."""
    x, y = data()
    chains = Chains()
    mean = chains.samples["a"][..., None] + chains.samples["b"][..., :1] * x
    exact = dist.Normal(mean, 0.4).log_prob(y).flatten(0, 1)
    elpd = -(torch.logsumexp(-exact, 0) - np.log(CHAINS * DRAWS)).sum().item()
    result = az.loo(posterior)
    found = float(result.elpd if NEW else result.elpd_loo)
    assert found == pytest.approx(elpd, abs=0.2 * float(result.se))
    assert result.n_data_points == ROWS


def test_compare_prefers_the_model_that_made_the_data(posterior):
    worse = to_arviz(Chains(slope=False), progress=False)
    table = az.compare({"line": posterior, "constant": worse})
    assert list(table.index) == ["line", "constant"]


def test_netcdf_keeps_everything(posterior, tmp_path):
    path = tmp_path / "posterior.nc"
    posterior.to_netcdf(path)
    back = az.from_netcdf(path)
    for group in ("posterior", "sample_stats", "log_likelihood", "observed_data", "prior_predictive"):
        before, after = posterior[group], back[group]
        assert set(before.data_vars) == set(after.data_vars)
        for name in before.data_vars:
            assert before[name].dims == after[name].dims
            assert before[name].dtype == after[name].dtype
            np.testing.assert_array_equal(before[name].values, after[name].values)
        for key in ("sampling_time", "inference_library", "replay"):
            assert after.attrs[key] == before.attrs[key]
    back.close()
