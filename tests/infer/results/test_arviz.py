"""`to_arviz` against densities worked out by hand, on models that batch and models that do not."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import TransformReparam

import ifpyro.infer
from ifpyro import InflationaryFlow, Schedule
from ifpyro.core.errors import ConvergenceWarning
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.infer.results.arviz import to_arviz

Y = torch.tensor([0.3, -1.2, 0.8, 2.0])
CHAINS, DRAWS = 2, 25


def draws(*shape, seed=0, chains=CHAINS, num=DRAWS):
    return torch.randn(chains, num, *shape, generator=torch.Generator().manual_seed(seed))


def normal_log_prob(value, mean, sd):
    return -0.5 * ((value - mean) / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.deterministic("twice", 2 * mu.expand(y.shape) if mu.dim() == 0 else 2 * mu + 0 * y)
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def quick(kernel, *args, num=DRAWS, chains=1, seed=0, **kwargs):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        mcmc = MCMC(kernel, num_samples=num, warmup_steps=num, num_chains=chains, disable_progbar=True)
        mcmc.run(*args, **kwargs)
    return mcmc


def convert(result, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return to_arviz(result, progress=False, **options)


def groups(data):
    names = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names} - {""}


def values(data, group, name):
    return torch.from_numpy(np.asarray(data[group][name].values))


# ---------------------------------------------------------------- exact answers


def test_log_likelihood_and_lp_are_the_formula():
    mu = draws()
    data = convert({"mu": mu}, model=conjugate, args=(Y,))
    pointwise = normal_log_prob(Y, mu[..., None], 0.5)
    torch.testing.assert_close(values(data, "log_likelihood", "y"), pointwise)
    torch.testing.assert_close(values(data, "sample_stats", "lp"), normal_log_prob(mu, 1.0, 2.0) + pointwise.sum(-1))
    torch.testing.assert_close(values(data, "posterior", "twice"), (2 * mu[..., None]).expand(-1, -1, 4))


def test_lp_is_larger_where_the_posterior_is():
    """Conjugate: precision 1/4 + 4/0.25, so the mode is known; an lp of the wrong sign would rank it last."""
    mode = (1.0 / 4 + Y.sum() / 0.25) / (1 / 4 + 4 / 0.25)
    data = convert({"mu": torch.stack([mode, mode + 3, mode - 5])[None]}, model=conjugate, args=(Y,))
    near, far, farther = values(data, "sample_stats", "lp")[0]
    assert near > far > farther


def test_lp_is_in_the_constrained_space():
    def model(y):
        sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(0.0, sd), obs=y)

    sd = draws().exp()
    data = convert({"sd": sd}, model=model, args=(Y,))
    prior = normal_log_prob(sd.log(), 0.0, 1.0) - sd.log()  # the density of sd itself, not of log sd
    expected = prior + dist.Normal(0.0, sd[..., None]).log_prob(Y).sum(-1)
    torch.testing.assert_close(values(data, "sample_stats", "lp"), expected)


def test_scale_and_factor_count_in_lp_and_masks_everywhere():
    seen = torch.tensor([True, False, True, True])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("push", 3 * mu)
        with pyro.plate("row", len(y)), poutine.scale(scale=0.25), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mu = draws()
    data = convert({"mu": mu}, model=model, args=(Y,))
    pointwise = normal_log_prob(Y, mu[..., None], 1.0) * seen
    torch.testing.assert_close(values(data, "log_likelihood", "y"), pointwise)
    expected = normal_log_prob(mu, 0.0, 1.0) + 3 * mu + 0.25 * pointwise.sum(-1)
    torch.testing.assert_close(values(data, "sample_stats", "lp"), expected)
    assert set(data["observed_data"].data_vars) == {"y"}  # a factor is no observation


def test_predictive_draws_have_the_right_moments_and_are_independent():
    """Given mu, y ~ N(mu, 0.5): z = (y - mu) / 0.5 is white noise over draws and rows."""
    mu = draws(num=2000, seed=4) * 3
    data = convert({"mu": mu}, model=conjugate, args=(Y,))
    z = (values(data, "posterior_predictive", "y") - mu[..., None]) / 0.5
    z = z.flatten(0, 1)
    count = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(count)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / count)
    correlation = torch.corrcoef(z.T) - torch.eye(4)
    assert correlation.abs().max() < 4.5 / math.sqrt(len(z))
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(count)


def test_prior_draws_follow_the_prior():
    data = convert({"mu": draws()}, model=conjugate, args=(Y,), prior=4000)
    mu, y = values(data, "prior", "mu")[0], values(data, "prior_predictive", "y")[0]
    assert abs(mu.mean() - 1) < 4 * 2 / math.sqrt(4000)
    assert abs(mu.var() - 4) < 4 * 4 * math.sqrt(2 / 4000)
    assert abs((y - mu[:, None]).var() - 0.25) < 4 * 0.25 * math.sqrt(2 / y.numel())
    assert data["prior"]["twice"].dims == ("chain", "draw", "row")


def test_predictions_at_new_data():
    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            mean = pyro.deterministic("mean", a * x)
            pyro.sample("y", dist.Normal(mean, 1e-3), obs=y)

    a, new = draws(), torch.arange(7.0)
    for change in ({"x": new, "y": None}, (new,)):
        data = convert({"a": a}, model=model, args=(Y,), kwargs={"y": Y}, predictions=change)
        torch.testing.assert_close(values(data, "predictions", "mean"), a[..., None] * new)
        torch.testing.assert_close(values(data, "predictions", "y"), a[..., None] * new, atol=6e-3, rtol=0)
        assert data["predictions"]["y"].sizes["row"] == 7
        assert "a" not in data["predictions"]
        np.testing.assert_array_equal(data["predictions_constant_data"]["x"], new)


# ---------------------------------------------------------------- batched or not, the same answer


def whole_mean(y):  # right for one draw; under a plate, the mean over draws too
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.deterministic("m", x.mean())
    pyro.sample("y", dist.Normal(m, 1.0).expand([len(y)]).to_event(1), obs=y)


def from_the_left(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.deterministic("m", x[0] - x[2])
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def no_plate(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.deterministic("m", x[..., 0])
    pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def branches(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.deterministic("m", x[0] if x[1].item() > 0 else x[2] * 10)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def any_of_them(y):  # a batch takes the branch if any draw would
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.deterministic("m", x[..., 0] * (5.0 if bool((x[..., 1] > 0).any()) else 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def any_of_them_quietly(y):  # the same without a Python branch, so that no batch would complain
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.deterministic("m", x[..., 0] * torch.where((x[..., 1] > 0).any(), 5.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def looping(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.deterministic("m", x[..., 0] * x[..., 2])
    for i in pyro.plate("row", len(y)):
        pyro.sample(f"y_{i}", dist.Normal(m, 1.0), obs=y[i])


def vectors(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.deterministic("m", x[..., :2].sum(-1, keepdim=True))
    with pyro.plate("row", len(y)):
        pyro.sample(
            "y",
            dist.Normal(m.unsqueeze(-1).expand(*m.shape, 2), 1.0).to_event(1),
            obs=y[:, None] * torch.ones(2),
        )


MODELS = {
    whole_mean: "vmap",
    from_the_left: "vmap",
    no_plate: "vmap",
    vectors: "vmap",
    branches: "loop",
    any_of_them: "loop",
    any_of_them_quietly: "vmap",
    looping: "vmap",
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("num", [DRAWS, 2], ids=["25 draws", "as many draws as rows"])
def test_every_method_gives_what_one_draw_at_a_time_gives(model, num):
    x = draws(3, num=num, seed=8)
    data = convert({"x": x}, model=model, args=(Y,), posterior_predictive=False)
    assert data["posterior"].attrs["replay"] == MODELS[model]
    names = list(data["log_likelihood"].data_vars)
    for chain in range(CHAINS):
        for draw in range(num):
            held = poutine.condition(model, {"x": x[chain, draw]})
            trace = poutine.trace(held).get_trace(Y)
            trace.compute_log_prob()
            torch.testing.assert_close(values(data, "posterior", "m")[chain, draw], trace.nodes["m"]["value"])
            lp = values(data, "sample_stats", "lp")[chain, draw]
            torch.testing.assert_close(lp, trace.log_prob_sum(), rtol=1e-4, atol=1e-5)
            for name in names:
                found = values(data, "log_likelihood", name)[chain, draw]
                torch.testing.assert_close(found, trace.nodes[name]["log_prob"])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_predictions_of_models_that_do_not_batch(model):
    """Noise around the right mean: a mixed-up batch would have the wrong one."""
    x = draws(3, num=100, seed=8) * 10
    data = convert({"x": x}, model=model, args=(Y,))
    m = values(data, "posterior", "m")
    for name in data["posterior_predictive"].data_vars:
        y = values(data, "posterior_predictive", name)
        z = y - m.reshape(*m.shape[:2], *(1,) * (y.dim() - 2))
        assert abs(z.mean()) < 4.5 / math.sqrt(z.numel())
        assert abs(z.var() - 1) < 4.5 * math.sqrt(2 / z.numel())
        assert y.shape[2:] == data["observed_data"][name].shape


def test_batches_are_bounded_and_their_size_does_not_matter():
    sizes = []

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        sizes.append(mu.numel())
        with pyro.plate("row", len(y)):
            pyro.deterministic("m", mu + y)
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mu = draws()
    whole = convert({"mu": mu}, model=model, args=(Y,))
    assert max(sizes) == CHAINS * DRAWS
    sizes.clear()
    parts = convert({"mu": mu}, model=model, args=(Y,), batch_size=7)
    assert max(sizes) == 7
    for group, name in (("posterior", "m"), ("log_likelihood", "y"), ("sample_stats", "lp")):
        torch.testing.assert_close(values(whole, group, name), values(parts, group, name))


def test_large_sites_make_small_batches():
    sizes = []

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        sizes.append(mu.numel())
        pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    convert({"mu": draws(num=30)}, model=model, args=(torch.zeros(300_000),), posterior_predictive=False)
    assert max(sizes) <= 2**22 // 300_000


# ---------------------------------------------------------------- names


def test_plates_name_dimensions():
    def model(y):
        with pyro.plate("school", 3, dim=-2):
            site = pyro.sample("site", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("pupil", 4, dim=-1):
                pyro.deterministic("ability", site[..., 0] + torch.zeros(3, 4))
                pyro.sample("y", dist.Normal(site[..., 0], 1.0).expand([3, 4]), obs=y)
            pyro.deterministic("best", site.max(-1).values)

    data = convert({"site": draws(3, 1, 2)}, model=model, args=(torch.zeros(3, 4),), dims={"site": ["one", "way"]})
    assert data["posterior"]["site"].dims == ("chain", "draw", "school", "one", "way")
    assert data["posterior"]["ability"].dims == ("chain", "draw", "school", "pupil")
    assert data["posterior"]["best"].dims == ("chain", "draw", "school", "best_dim_1")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "school", "pupil")
    assert data["observed_data"]["y"].dims == ("school", "pupil")


def test_coords_and_dims_from_the_user():
    names = ["a", "b", "c", "d"]
    data = convert({"mu": draws()}, model=conjugate, args=(Y,), coords={"patient": names}, dims={"y": ["patient"]})
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "patient")
    assert list(data["observed_data"]["patient"].values) == names
    assert data["posterior"]["twice"].dims == ("chain", "draw", "row")


def test_a_plate_that_bears_the_name_of_a_variable_names_nothing():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("draw", 4):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    data = convert({"a": draws()}, model=model, args=(Y,))
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "draw_")  # a name of its own


def test_constant_data_are_the_arguments_that_are_not_observed():
    def model(x, y, scale=1.0, weights=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(a * x, scale), obs=y)

    data = convert({"a": draws()}, model=model, args=(torch.arange(4.0), Y), kwargs={"weights": np.ones(3)})
    assert set(data["constant_data"].data_vars) == {"x", "weights"}
    data = convert({"a": draws()}, model=model, args=(torch.arange(4.0), Y), constant_data={"z": [1, 2]})
    assert set(data["constant_data"].data_vars) == {"z"}


# ---------------------------------------------------------------- results of every kind


no_forks = pytest.mark.skipif(torch.cuda.is_available(), reason="Pyro forks, torch with CUDA forbids it")


@pytest.mark.parametrize("chains", [1, pytest.param(2, marks=no_forks)])
def test_pyro_mcmc(chains):
    mcmc = quick(NUTS(conjugate), Y, chains=chains)
    data = convert(mcmc, attrs={"sampling_time": 2.5, "ok": True, "nothing": None, "grid": [1, 2]})
    mu = mcmc.get_samples(group_by_chain=True)["mu"]
    assert mu.shape == (chains, DRAWS)
    torch.testing.assert_close(values(data, "posterior", "mu"), mu)
    torch.testing.assert_close(values(data, "log_likelihood", "y"), normal_log_prob(Y, mu[..., None], 0.5))
    stats = data["sample_stats"]
    assert stats["diverging"].dtype == bool
    assert stats["acceptance_rate"].dims == ("chain",)
    assert ("step_size" in stats) == (chains == 1)
    assert "n_steps" not in stats
    assert "energy" not in stats
    attrs = data["posterior"].attrs
    assert attrs["inference_library"] == "pyro"
    assert attrs["inference_library_version"] == pyro.__version__
    assert attrs["sampling_time"] == 2.5
    assert attrs["ok"] == 1
    assert attrs["grid"] == "[1, 2]"
    assert "nothing" not in attrs


def test_static_hmc_knows_its_steps():
    mcmc = quick(HMC(conjugate, step_size=0.1, num_steps=5, adapt_step_size=False, adapt_mass_matrix=False), Y)
    stats = convert(mcmc)["sample_stats"]
    assert np.allclose(stats["step_size"], 0.1)
    assert (stats["n_steps"] == mcmc.kernel.num_steps).all()


class Shear(dist.transforms.AffineTransform):
    """Stands for a flow: an exact map with the mark that flows carry."""

    is_ifpyro_flow = True


def flow_prior():
    shift, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 2.0, 3.0])
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [Shear(shift, scale, event_dim=1)]), shift, scale


def with_flow(y):
    prior, _, _ = flow_prior()
    with pyro.plate("object", 2):
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[..., 1], 0.2), obs=y)


def test_the_latent_of_a_flow_is_there_under_plain_nuts():
    _, shift, scale = flow_prior()
    mcmc = quick(NUTS(with_flow), Y[:2])
    data = convert(mcmc, prior=30)
    for group in ("posterior", "prior"):
        x, base = values(data, group, "x"), values(data, group, "x_base")
        torch.testing.assert_close(base, (x - shift) / scale)
        assert data[group]["x_base"].dims == ("chain", "draw", "object", "x_base_dim_1")
    x = values(data, "posterior", "x")
    lp = normal_log_prob((x - shift) / scale, 0.0, 1.0) - scale.log()
    expected = lp.sum((-1, -2)) + normal_log_prob(Y[:2], x[..., 1], 0.2).sum(-1)
    torch.testing.assert_close(values(data, "sample_stats", "lp"), expected)


def test_a_reparameterised_site_is_there_in_both_spaces():
    _, shift, scale = flow_prior()
    model = poutine.reparam(with_flow, {"x": TransformReparam()})
    mcmc = quick(NUTS(model), Y[:2])
    assert set(mcmc.get_samples()) == {"x_base"}
    data = convert(mcmc)
    base = values(data, "posterior", "x_base")
    torch.testing.assert_close(values(data, "posterior", "x"), shift + scale * base)
    expected = normal_log_prob(base, 0.0, 1.0).sum((-1, -2))
    expected = expected + normal_log_prob(Y[:2], values(data, "posterior", "x")[..., 1], 0.2).sum(-1)
    torch.testing.assert_close(values(data, "sample_stats", "lp"), expected)


class Engine:
    """The protocol of this library's engines: all sites are there, and statistics under ArviZ's names."""

    def __init__(self):
        self.model, self.model_args, self.model_kwargs = with_flow, (Y[:2],), {}
        self.attributes = {"sampling_time": 3.0, "log_evidence": torch.tensor(-4.5)}

    def get_samples(self, group_by_chain=False):
        assert group_by_chain
        _, shift, scale = flow_prior()
        base = draws(2, 3)
        return {"x": shift + scale * base, "x_base": base}

    def sample_stats(self):
        return {"lp": draws(seed=1), "energy": draws(seed=2), "log_weight": draws(seed=3)}


def test_an_engine_of_this_library():
    data = convert(Engine())
    torch.testing.assert_close(values(data, "posterior", "x_base"), draws(2, 3))
    for name, seed in (("lp", 1), ("energy", 2), ("log_weight", 3)):
        torch.testing.assert_close(values(data, "sample_stats", name), draws(seed=seed))
    assert data["posterior"].attrs["log_evidence"] == -4.5
    x = values(data, "posterior", "x")
    torch.testing.assert_close(values(data, "log_likelihood", "y"), normal_log_prob(Y[:2], x[..., 1], 0.2))


def fit(model, guide, *args, steps=30):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(steps):
            svi.step(*args)
    return svi


@pytest.fixture
def clean_store():
    with pyro.get_param_store().scope():
        yield


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal, AutoDelta], ids=lambda auto: auto.__name__)
def test_autoguides(auto, clean_store):
    guide = auto(conjugate)
    svi = fit(conjugate, guide, Y)
    for result in (guide, svi):
        data = convert(result, args=(Y,), num_samples=40)
        mu = values(data, "posterior", "mu")
        assert mu.shape == (1, 40)
        torch.testing.assert_close(values(data, "log_likelihood", "y"), normal_log_prob(Y, mu[..., None], 0.5))
        assert set(data["posterior"].data_vars) == {"mu", "twice"}
        assert ("log_q" in data["sample_stats"]) == (auto is not AutoDelta)


def test_log_q_is_the_density_of_the_guide_in_the_constrained_space(clean_store):
    def model(y):
        sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(0.0, sd), obs=y)

    guide = AutoNormal(model)
    fit(model, guide, Y)
    data = convert(guide, args=(Y,), num_samples=50)
    sd = values(data, "posterior", "sd")
    loc, scale = guide.locs.sd.detach(), guide.scales.sd.detach()
    torch.testing.assert_close(
        values(data, "sample_stats", "log_q"), dist.LogNormal(loc, scale).log_prob(sd), rtol=1e-4, atol=1e-5
    )


def test_a_guide_written_by_hand(clean_store):
    def guide(y):
        loc = pyro.param("loc", torch.tensor(0.7))
        pyro.sample("mu", dist.Normal(loc, 0.1))

    with pytest.warns(ConvergenceWarning, match="the guide may not be trusted"):  # it is too narrow
        data = to_arviz(guide, progress=False, model=conjugate, args=(Y,), num_samples=3000)
    mu = values(data, "posterior", "mu")
    assert abs(mu.mean() - 0.7) < 4 * 0.1 / math.sqrt(3000)
    torch.testing.assert_close(values(data, "sample_stats", "log_q"), normal_log_prob(mu, 0.7, 0.1))
    assert list(pyro.get_param_store()) == []


def test_kernels_without_a_model_give_their_draws():
    mcmc = MCMC(
        NUTS(potential_fn=lambda z: 0.5 * z["a"] ** 2),
        num_samples=10,
        warmup_steps=10,
        initial_params={"a": torch.tensor(0.1)},
        disable_progbar=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mcmc.run()
    assert groups(convert(mcmc)) == {"posterior", "sample_stats"}


def test_discrete_sites_that_hmc_summed_out_are_said_to_be_missing():
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    mcmc = quick(NUTS(model, max_plate_nesting=1), Y, num=10)
    with pytest.warns(UserWarning, match="no draws of the model's latent sites \\['z'\\]"):
        data = to_arviz(mcmc, progress=False)
    assert groups(data) == {"posterior", "sample_stats", "observed_data"}
    assert "lp" not in data["sample_stats"]
    with pytest.raises(ValueError, match="cannot compute log_likelihood"):
        to_arviz(mcmc, log_likelihood=True, progress=False)


def test_subsampled_data_are_not_taken_for_all_of_them():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    with pytest.warns(UserWarning, match="show only part of their data"):
        data = to_arviz({"mu": draws()}, model=model, args=(Y,), progress=False)
    assert "observed_data" not in groups(data)


def test_a_computed_observation_has_a_density_but_is_no_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("residual", dist.Normal(0.0, 1.0), obs=y - mu)

    mu = draws()
    data = convert({"mu": mu}, model=model, args=(Y,))
    torch.testing.assert_close(values(data, "log_likelihood", "residual"), normal_log_prob(Y, mu[..., None], 1.0))
    assert "observed_data" not in groups(data)


def a_flow():
    """A small flow that is not Gaussian, untrained: what it maps does not matter here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(2, width=16)
        torch.nn.init.normal_(network.outlet.weight, std=0.3)
    x = draws(2)[0] @ torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    return InflationaryFlow(Basis.from_samples(x), Schedule.details_first(), network)


def test_a_real_flow_as_the_prior_of_a_plain_pyro_model():
    flow = a_flow()

    def model(y):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 1], 0.2), obs=y)

    base = draws(2, num=3)
    with torch.no_grad():
        x = flow.decode(base)
        log_prior = flow.log_prob(x)
    data = convert({"x": x}, model=model, args=(Y[0],), prior=300)
    torch.testing.assert_close(values(data, "posterior", "x_base"), base, atol=1e-4, rtol=1e-4)
    expected = log_prior + normal_log_prob(Y[0], x[..., 1], 0.2)
    torch.testing.assert_close(values(data, "sample_stats", "lp"), expected, atol=1e-3, rtol=1e-4)
    latent = values(data, "prior", "x_base")[0]
    assert latent.mean(0).abs().max() < 4 / math.sqrt(300)
    torch.testing.assert_close(flow.decode(latent).detach(), values(data, "prior", "x")[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["mcmc", "smc"])
def test_the_engines_of_this_library(engine):
    _, shift, scale = flow_prior()
    if engine == "mcmc":
        result = ifpyro.infer.MCMC(
            ifpyro.infer.HMC(with_flow), num_samples=20, warmup_steps=20, num_chains=6, seed=1, progress=False
        )
    else:
        result = ifpyro.infer.SMC(with_flow, num_particles=64, seed=1, progress=False)
    result.run(Y[:2])
    data = convert(result)
    x, base = values(data, "posterior", "x"), values(data, "posterior", "x_base")
    torch.testing.assert_close(x, shift + scale * base)
    torch.testing.assert_close(values(data, "log_likelihood", "y"), normal_log_prob(Y[:2], x[..., 1], 0.2))
    stats = {name: value.numpy() for name, value in result.sample_stats().items()}
    assert stats.keys() == set(data["sample_stats"].data_vars)
    np.testing.assert_array_equal(data["sample_stats"]["lp"], stats["lp"])
    joint = normal_log_prob(base, 0.0, 1.0).sum((-1, -2)) + normal_log_prob(Y[:2], x[..., 1], 0.2).sum(-1)
    assert np.corrcoef(stats["lp"].ravel(), joint.numpy().ravel())[0, 1] > 0.99  # the sign of lp
    assert ("log_weight" in stats) == (engine == "smc")


# ---------------------------------------------------------------- a good guest


def test_nothing_global_changes(clean_store):
    pyro.param("mine", torch.tensor(2.0))

    def model(y):
        loc = pyro.param("other", torch.tensor(0.0))
        mu = pyro.sample("mu", dist.Normal(loc, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    before = torch.get_rng_state()
    mine = pyro.get_param_store()._params["mine"]
    with pyro.validation_enabled(True), poutine.trace() as outer:
        one = convert({"mu": draws()}, model=model, args=(Y,), prior=5)
        assert torch.distributions.Distribution._validate_args
    assert torch.equal(before, torch.get_rng_state())
    assert list(pyro.get_param_store()) == ["mine"]
    assert pyro.get_param_store()._params["mine"] is mine
    assert not outer.trace.nodes
    torch.rand(3)
    two = convert({"mu": draws()}, model=model, args=(Y,), prior=5)
    other = convert({"mu": draws()}, model=model, args=(Y,), prior=5, seed=1)
    assert torch.equal(values(one, "posterior_predictive", "y"), values(two, "posterior_predictive", "y"))
    assert not torch.equal(values(one, "posterior_predictive", "y"), values(other, "posterior_predictive", "y"))


def test_a_model_that_cannot_predict_keeps_its_other_groups():
    class Improper(dist.Normal):
        def rsample(self, sample_shape=()):
            raise NotImplementedError("no draws of this")

        sample = rsample

        def expand(self, batch_shape, _instance=None):
            return super().expand(batch_shape, self._get_checked_instance(Improper))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", Improper(mu, 1.0), obs=y)

    with pytest.warns(UserWarning, match="leaves out posterior_predictive: NotImplementedError"):
        data = to_arviz({"mu": draws()}, model=model, args=(Y,), progress=False)
    assert "log_likelihood" in groups(data)
    with pytest.raises(NotImplementedError):
        to_arviz({"mu": draws()}, model=model, args=(Y,), posterior_predictive=True, progress=False)


def local(x, y=None):
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


GOOD = {"result": {"mu": draws()}, "model": conjugate, "args": (Y,)}
BAD = {
    "a number": ({"result": 3}, TypeError, "Pyro's MCMC or SVI"),
    "mcmc not run": ({"result": MCMC(NUTS(conjugate), num_samples=1)}, ValueError, "run"),
    "guide without model": ({"result": lambda y: None, "model": None}, TypeError, "pass model="),
    "guide of nothing": ({"result": lambda y: None}, ValueError, "no latent sites"),
    "empty mapping": ({"result": {}}, ValueError, "empty"),
    "draws without chains": ({"result": {"mu": torch.zeros(5)}}, ValueError, "chains, draws"),
    "uneven draws": ({"result": {"mu": draws(), "b": draws(num=3)}}, ValueError, "differ"),
    "no draws": ({"result": {"mu": draws(num=0)}}, ValueError, "nothing to convert"),
    "draws of another shape": ({"result": {"mu": draws(3)}}, ValueError, "site 'mu' has shape"),
    "no args": ({"args": None}, TypeError, "pass args="),
    "args not a tuple": ({"args": Y}, TypeError, "tuple"),
    "log_likelihood, no model": ({"model": None, "args": None, "log_likelihood": True}, ValueError, "model="),
    "prior, no model": ({"model": None, "args": None, "prior": 5}, ValueError, "model="),
    "log_likelihood of no data": (
        {"result": {"z": draws(4), "y": draws(4)}, "model": local, "args": (Y,), "log_likelihood": True},
        ValueError,
        "no site is observed",
    ),
    "prior of zero": ({"prior": 0}, ValueError, "positive"),
    "prior true": ({"prior": True}, ValueError, "positive"),
    "predictive a number": ({"posterior_predictive": 5}, ValueError, "True, False"),
    "predictive of another size": (
        {"posterior_predictive": {"y": torch.zeros(7, 4)}},
        ValueError,
        "all draws",
    ),
    "predictions an array": ({"predictions": Y}, ValueError, "tuple or by name"),
    "predictions of no argument": ({"predictions": {"x": Y}}, ValueError, r"\['x'\].*\['y'\]"),
    "batch of none": ({"batch_size": 0}, ValueError, "positive"),
    "no samples": ({"result": lambda y: None, "num_samples": 0}, ValueError, "positive"),
    "dims of nothing": ({"dims": {"nu": ["a"]}}, ValueError, r"dims has entries for \['nu'\]"),
    "coords of nothing": ({"coords": {"nu": ["a"]}}, ValueError, r"coords has entries for \['nu'\]"),
    "too many dims": ({"dims": {"twice": ["a", "b"]}}, ValueError, "must name its 1 axes"),
    "too few labels": ({"coords": {"row": [1, 2]}}, ValueError, "4 labels"),
    "local latents at new data": (
        {"result": {"z": draws(4)}, "model": local, "args": (Y, Y), "predictions": (torch.zeros(9),)},
        ValueError,
        r"site 'z' has shape \(9,\).*\(4,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    options = GOOD | change
    with pytest.raises(error, match=message):
        to_arviz(options.pop("result"), progress=False, **options)


def test_sites_that_come_and_go_are_refused():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if bool((mu > 0).all()):
            pyro.deterministic("sometimes", mu)
        pyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1), obs=y)

    with pytest.raises(ValueError, match="came or went: \\['sometimes'\\]"):
        to_arviz({"mu": draws()}, model=model, args=(Y,), progress=False)
