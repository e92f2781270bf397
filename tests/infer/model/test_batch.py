"""The batched density against Pyro's, against hand-written densities, and one batching against another."""

import warnings
from math import lgamma, log, pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

from flows_zoo import mixture_flow
from ifpyro import ModelError
from ifpyro.infer.model.batched import BatchedModel
from ifpyro.infer.model.density import log_density_and_grad
from ifpyro.infer.model.reparam import reparam
from models_zoo import CASES, flow_prior, flows_in_a_plate, one_flow

pytestmark = pytest.mark.filterwarnings("ignore:ifpyro:UserWarning")


@pytest.fixture(autouse=True)
def _clean_pyro():
    pyro.clear_param_store()
    yield
    assert _PYRO_STACK == []
    assert _DIM_ALLOCATOR._stack == []
    pyro.clear_param_store()


def build(name, **options):
    case = CASES[name]
    return BatchedModel(case.model, case.args, case.kwargs, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pyro_log_density(case, batched, row):
    """Pyro's potential, unconstrained site by unconstrained site."""
    with torch.random.fork_rng():
        _, potential, _, _ = initialize_model(reparam(case.model), case.args, case.kwargs)
    parts = {}
    for name, site in batched._layout.latents.items():
        shape = site.batch_shape + site.unconstrained_event_shape
        parts[name] = row[site.start : site.stop].reshape(shape).to(site.dtype)
    return -potential(parts)


def tolerance(batched):
    return {"rtol": 1e-9, "atol": 1e-9} if batched.dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}


# -- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.pyro_agrees])
def test_log_density_is_pyros(name):
    batched = build(name)
    q = batched.sample_prior(6, generator(1))
    expected = torch.stack([pyro_log_density(CASES[name], batched, row) for row in q])
    torch.testing.assert_close(sum(batched(q)), expected.to(q.dtype), **tolerance(batched))


@pytest.mark.parametrize("name", CASES)
def test_batching_is_the_expected_one(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batched = build(name)
    assert batched.batching == CASES[name].batching
    assert batched.batching in batched.describe()
    said = [w for w in caught if "draw by draw" in str(w.message)]
    assert bool(said) == (batched.batching == "loop")
    assert ("cannot batch the log-density" in batched.describe()) == (batched.batching != "plate")
    assert all(w.filename == __file__ for w in said)  # where the user's call stands


@pytest.mark.parametrize("name", CASES)
def test_batchings_agree(name):
    q = build(name).sample_prior(7, generator(2))
    results = {}
    for batching in ("plate", "vmap", "loop"):
        try:
            batched = build(name, batching=batching)
        except ValueError:
            continue
        results[batching] = (*log_density_and_grad(batched, q), batched.sites(q))
    assert {CASES[name].batching, "loop"} <= set(results)
    for lp, ll, gradient, sites in results.values():
        torch.testing.assert_close(lp, results["loop"][0], **tolerance(batched))
        torch.testing.assert_close(ll, results["loop"][1], **tolerance(batched))
        torch.testing.assert_close(gradient, results["loop"][2], rtol=1e-3, atol=1e-3)
        assert list(sites) == list(results["loop"][3])
        for site, value in sites.items():
            torch.testing.assert_close(value, results["loop"][3][site], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["schools", "from the left", "branching"])
@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_chunks_give_the_same(name, n):
    whole, chunked = build(name), build(name, batch_size=2)
    q = whole.sample_prior(n, generator(3))
    for ours, expected in zip(log_density_and_grad(chunked, q), log_density_and_grad(whole, q), strict=True):
        torch.testing.assert_close(ours, expected)
    for site, value in whole.sites(q).items():
        torch.testing.assert_close(chunked.sites(q)[site], value)
    assert chunked.sample_prior(n, generator(3)).shape == q.shape


def test_hierarchical_density_by_hand():
    case = CASES["schools"]
    (y,), sigma = case.args, case.kwargs["sigma"]
    batched = build("schools")
    q = batched.sample_prior(9, generator(4))
    mu, log_tau, theta = q[:, 0], q[:, 1], q[:, 2:]
    tau = log_tau.exp()

    def normal(x, loc, scale):
        return -0.5 * ((x - loc) / scale) ** 2 - torch.log(scale) - 0.5 * log(2 * pi)

    half_cauchy = log(2 / (pi * 5)) - torch.log1p((tau / 5) ** 2)
    prior = normal(mu, 0.0, torch.tensor(5.0)) + half_cauchy + log_tau
    prior = prior + normal(theta, mu[:, None], tau[:, None]).sum(-1)
    log_prior, log_likelihood = batched(q)
    torch.testing.assert_close(log_prior, prior, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_likelihood, normal(y, theta, sigma).sum(-1), rtol=1e-5, atol=1e-4)


def test_simplex_density_by_hand():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))

    batched = BatchedModel(model)
    q = batched.sample_prior(5, generator(5))
    p = batched.sites(q)["p"]
    density = lgamma(6.0) - lgamma(2.0) - lgamma(3.0) + p[:, 1].log() + 2 * p[:, 2].log()
    jacobian = torch.stack(
        [
            torch.linalg.slogdet(
                torch.autograd.functional.jacobian(lambda u: torch.distributions.StickBreakingTransform()(u), row)[:2]
            )[1]
            for row in q
        ]
    )
    torch.testing.assert_close(batched(q)[0], density + jacobian, rtol=1e-4, atol=1e-4)


def test_support_that_depends_on_another_latent():
    """a ~ Exp(1), b | a ~ U(0, a), y | b ~ U(0, b): bounds move, and the likelihood is -inf where b < y."""

    def model(y):
        a = pyro.sample("a", dist.Exponential(1.0))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("y", dist.Uniform(0.0, b), obs=y)

    y = torch.tensor(0.1)
    batched = BatchedModel(model, (y,))
    assert batched.batching == "plate"
    q = batched.sample_prior(50, generator(6))
    sites = batched.sites(q)
    a, b = sites["a"], sites["b"]
    assert bool((b < a).all())
    assert len(set((b < y).tolist())) == 2
    u = q[:, 1]
    jacobian = q[:, 0] + a.log() + torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
    log_prior, log_likelihood = batched(q)
    torch.testing.assert_close(log_prior, -a - a.log() + jacobian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_likelihood, torch.where(b >= y, -b.log(), -torch.inf))
    torch.testing.assert_close(batched.unconstrain({"a": a, "b": b}), q, rtol=1e-3, atol=1e-3)


def test_observation_outside_a_moving_support_is_impossible():
    """Without validation Pareto returns a finite number below its scale."""

    def model(y):
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Pareto(x, 2.0), obs=y)

    batched = BatchedModel(model, (torch.tensor(1.0),))
    _, log_likelihood = batched(torch.tensor([[-1.0], [-0.5], [0.5]]))
    assert torch.isfinite(log_likelihood).tolist() == [True, True, False]


def test_masks_and_scales_move_to_the_likelihood():
    """The prior term is the density of prior draws, whatever masks and scales say."""
    batched = build("masks and scales")
    q = batched.sample_prior(5, generator(7))
    x, z = q[:, 0], q[:, 1:]
    expected = dist.Normal(1.0, 2.0).log_prob(x) + dist.Normal(x[:, None], 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(batched(q)[0], expected)


def test_imputation_keeps_the_posterior_proper():
    case = CASES["missing entries"]
    y, seen = case.args
    batched = build("missing entries")
    q = batched.sample_prior(5, generator(8))
    x, z = q[:, 0], q[:, 1:]
    expected = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x[:, None], 0.5).log_prob(z).sum(-1)
    torch.testing.assert_close(batched(q)[0], expected)
    torch.testing.assert_close(batched(q)[1], dist.Normal(x[:, None], 0.5).log_prob(y)[:, seen].sum(-1))
    assert "masked-out" in batched.describe()


def test_gaussian_prior_is_recognised():
    expected = {"one flow": True, "undeclared batch": True, "schools": False, "flows in a plate": False}
    assert {name: build(name).gaussian_prior for name in expected} == expected

    def by_a_latent():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.relu(a - 100.0), 1.0))  # loc is 0 at every draw, and not constant

    assert not BatchedModel(by_a_latent).gaussian_prior


# -- draws and sites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_sites_and_unconstrain_are_inverse(name):
    batched = build(name)
    q = batched.sample_prior(4, generator(9))
    sites = batched.sites(q)
    latents = {site: sites[site] for site in batched._layout.latents}
    torch.testing.assert_close(batched.unconstrain(latents), q, rtol=1e-3, atol=1e-3)
    assert batched.sites(q[:1]).keys() == sites.keys()


def test_flow_sites_can_be_given_as_data():
    batched = build("flows in a plate")
    q = batched.sample_prior(4, generator(10))
    sites = batched.sites(q)
    assert sites["x"].shape == (4, 4, 3)
    assert sites["x_base"].shape == (4, 4, 3)
    assert sites["first"].shape == (4, 4)
    torch.testing.assert_close(sites["first"], sites["x"][..., 0] + sites["shift"][:, None])
    for n in (4, 1):
        given = {"x": sites["x"][:n], "shift": sites["shift"][:n]}
        torch.testing.assert_close(batched.unconstrain(given), q[:n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["schools", "flows in a plate", "ordered", "loop plate", "one flow"])
def test_prior_draws_have_the_priors_moments(name):
    """E of the prior's score is zero: a test of every site and of their dependence, for any prior."""
    batched = build(name)
    n = 4000
    q = batched.sample_prior(n, generator(11)).requires_grad_(True)
    (score,) = torch.autograd.grad(batched(q)[0].sum(), q)
    error = score.std(0) / n**0.5
    assert bool((score.mean(0).abs() < 4.5 * error).all())
    # and E[q * score] = -1, which a wrong scale breaks
    product = q.detach() * score
    assert bool(((product.mean(0) + 1).abs() < 4.5 * product.std(0) / n**0.5).all())


@pytest.mark.parametrize("name", ["schools", "mean over everything", "branching", "one flow"])
def test_randomness_comes_from_the_generator_alone(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batched = build(name)
    first = batched.sample_prior(6, generator(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    assert torch.equal(batched.sample_prior(6, generator(1)), first)
    assert not torch.equal(batched.sample_prior(6, generator(2)), first)
    source = generator(1)
    assert torch.equal(batched.sample_prior(6, source), first)
    assert not torch.equal(batched.sample_prior(6, source), first)


# -- wrong batches must not survive ------------------------------------------------------------------------


def test_a_size_at_which_the_plate_goes_wrong():
    """Right for every batch size but 8: found out when 8 draws first arrive."""

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x.shape and x.shape[0] == 8:
            x = x.flip(0)
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    batched = BatchedModel(model, (torch.tensor(0.3),))
    q = batched.sample_prior(9, generator())
    assert batched.batching == "plate"
    torch.testing.assert_close(batched(q)[1], dist.Normal(q[:, 0], 0.5).log_prob(torch.tensor(0.3)))
    eight = batched(q[:8])
    assert "8 draws" in batched.describe()
    torch.testing.assert_close(eight[1], batched(q)[1][:8])
    assert batched.batching == "vmap"


def test_sites_go_wrong_alone():
    """A deterministic site that mixes draws does not touch the density, and must be right all the same."""

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.deterministic("average", x.mean())
        pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)

    batched = BatchedModel(model, (torch.tensor(0.3),))
    assert "'average'" in batched.describe()
    assert (batched.batching, batched.site_batching) == ("plate", "vmap")
    q = batched.sample_prior(6, generator())
    torch.testing.assert_close(batched.sites(q)["average"], q.mean(-1))


def test_data_of_any_length_against_as_many_draws():
    """n equal to a plate's size, to the event size, and to the number of data."""
    for name in ("undeclared likelihood", "undeclared batch", "flows in a plate", "nested plates"):
        loop, batched = build(name, batching="loop"), build(name)
        for n in (3, 4, 5, 15):
            q = loop.sample_prior(n, generator(n))
            for ours, expected in zip(log_density_and_grad(batched, q), log_density_and_grad(loop, q), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
        assert batched.batching == "plate"


@pytest.mark.parametrize("form", ["item", "while", "bool", "int"])
def test_branches_on_latents_are_seen(form):
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if form == "item":
            scale = 0.5 + 0.0 * x.sum().item()
        elif form == "while":
            scale = torch.tensor(0.5)
            while (x.sum() > 50 * scale).all():
                scale = scale + 1
        elif form == "bool":
            scale = 0.5 if bool((x > -10).any()) else 1.0
        else:
            scale = 0.5 + int(x.sum() > 10)
        pyro.sample("y", dist.Normal(x, scale), obs=y)

    with pytest.warns(UserWarning, match=r"test_batch.py:\d+: .*x.*torch.where"):  # the user's line, and the mend
        assert BatchedModel(model, (torch.tensor(0.3),)).batching == "loop"


class _Opaque(torch.autograd.Function):
    """An operation that torch.func cannot see into."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize(("branch", "expected"), [(True, "loop"), (False, "plate")])
def test_branches_are_seen_where_vmap_fails(branch, expected):
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        doubled = _Opaque.apply(x)
        if branch and x.sum() > 50:
            doubled = doubled + 1
        pyro.sample("y", dist.Normal(doubled, 0.5), obs=y)

    assert BatchedModel(model, (torch.tensor(0.3),)).batching == expected


def test_padding_and_empty_sites():
    """Leading ones of a batch shape, and a site without entries."""

    def model(y):
        pyro.sample("nothing", dist.Normal(torch.zeros(0, 3), 1.0).to_event(2))
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([1, 1, 4]).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y)

    batched = BatchedModel(model, (torch.zeros(1, 1),))
    assert (batched.batching, batched.prior_batching) == ("plate", "plate")
    q = batched.sample_prior(3, generator())
    torch.testing.assert_close(batched(q)[1], dist.Normal(q.sum(-1), 0.5).log_prob(torch.zeros(3)))


def test_an_impossible_batching_is_refused():
    with pytest.raises(ValueError, match=r"batching='plate' is wrong.*'y'"):
        build("mean over everything", batching="plate")
    with pytest.raises(ValueError, match="branches on latent values"):
        build("branching", batching="vmap")


def test_a_failed_decomposition_spoils_its_own_draw_only():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        off = x[..., None, None] * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        tril = torch.linalg.cholesky(torch.eye(2) + 0.3 * off)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), obs=y)

    batched = BatchedModel(model, (torch.zeros(2),))
    q = torch.tensor([[0.0], [1.0], [9.0], [-1.0]])
    _, log_likelihood, gradient = log_density_and_grad(batched, q)
    expected = -torch.log(torch.tensor(2 * pi)) - 0.5 * torch.log(1 - 0.09 * q[:, 0] ** 2)
    torch.testing.assert_close(log_likelihood[[0, 1, 3]], expected[[0, 1, 3]])
    assert log_likelihood[2] == -torch.inf
    assert bool(torch.isfinite(gradient).all())


# -- bad models --------------------------------------------------------------------------------------------


def observed_only(y):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def discrete(y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def subsampled(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=5) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(10)[index])


def noisy(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + torch.randn(()), 1.0), obs=y)


def out_of_support(y):
    x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Gamma(x, 1.0), obs=-1 - y**2)


def out_of_bounds(y):
    x = pyro.sample("x", dist.Uniform(0.0, 1.0))
    pyro.sample("y", dist.Uniform(0.0, x), obs=y + 7.0)


def always_nan(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.log(-1 - x**2))


def never(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", x - torch.inf)


def missing(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y * torch.nan)


def no_tensor(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=float(y))


def sometimes_invalid(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, x), obs=y)


def nan_gradient(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.where(x.abs() >= 0, x, torch.sqrt(-1 - x**2)))


def twice(y):
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, 1.0))


def a_delta(y):
    x = pyro.sample("x", dist.Delta(torch.tensor(1.0)))
    pyro.sample("z", dist.Normal(x, 1.0))


def changing(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    for i in range(1 + int(x.abs() * 10)):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (observed_only, "no latent sites"),
        (discrete, "'k' is discrete"),
        (subsampled, "random subsample of 5 of 10"),
        (noisy, "not reproducible: site 'y'"),
        (out_of_support, "'y' is impossible"),
        (out_of_bounds, "impossible.*'y' is -inf"),
        (always_nan, "'f' is NaN"),
        (never, "'f' is -inf"),
        (missing, "'y' contains NaN"),
        (no_tensor, r"'y': expected obs to be a tensor, got float: use torch.as_tensor\(obs\)"),
        (sometimes_invalid, r"at some prior draws the model is invalid: .*scale.*enable_validation\(False\)"),
        (nan_gradient, "gradient with respect to site 'x'"),
        (twice, "two sites named 'x'"),
        (a_delta, "'x' is a Delta"),
        (changing, "change from run to run"),
    ],
)
def test_bad_models_are_refused(model, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        BatchedModel(model, (torch.tensor(0.3),))


def test_invalid_parameters_count_as_impossible_where_validation_is_off():
    with pyro.validation_enabled(False):
        batched = BatchedModel(sometimes_invalid, (torch.tensor(0.3),))
    assert torch.isfinite(batched(torch.tensor([[1.0], [-1.0]]))[1]).tolist() == [True, False]


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"one_flow\(y\).*missing a required argument: 'y'"):
        BatchedModel(one_flow)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigma'"):
        BatchedModel(pyro.condition(flows_in_a_plate, data={}), (torch.zeros(2),), {"sigma": 1.0})
    with pytest.raises(TypeError, match="expected a Pyro model"):
        BatchedModel(3)
    with pytest.raises(ValueError, match="batching expects"):
        build("one flow", batching="pmap")
    with pytest.raises(ValueError, match="batch_size expects"):
        build("one flow", batch_size=0)
    batched = build("one flow")
    with pytest.raises(ValueError, match=r"expected q of shape \(n, 3\)"):
        batched(torch.zeros(3))
    with pytest.raises(ValueError, match="missing"):
        batched.unconstrain({})
    with pytest.raises(ValueError, match=r"expected shape \('n', 3\)"):
        batched.unconstrain({"x": torch.zeros(3)})
    with pytest.raises(ValueError, match="'p' lie outside"):
        BatchedModel(lambda: pyro.sample("p", dist.Beta(2.0, 2.0))).unconstrain({"p": torch.tensor([0.5, 2.0])})


# -- nothing is left behind --------------------------------------------------------------------------------


def test_a_failing_model_leaves_pyro_clean():
    calls = []

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2), poutine.scale(scale=2.0):
            if calls:
                raise OSError("the simulator is gone")
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    batched = BatchedModel(model, (torch.zeros(2),))
    calls.append(1)
    with pytest.raises(OSError, match="simulator"):
        batched(torch.zeros(3, 1))
    assert _PYRO_STACK == []
    assert _DIM_ALLOCATOR._stack == []
    assert pyro.distributions.is_validation_enabled()


def test_parameters_are_constants_and_stay_out_of_the_store():
    store = pyro.get_param_store()
    batched = build("parameters")
    assert list(store.keys()) == []
    q = batched.sample_prior(5, generator())
    assert torch.equal(batched(q)[0], batched(q)[0])  # the random initial value was drawn once

    pyro.param("loc", torch.tensor(2.0))
    stored = build("parameters")
    q = torch.tensor([[1.5], [2.5]])
    torch.testing.assert_close(stored(q)[0], dist.Normal(2.0, 0.7).log_prob(q[:, 0]))
    assert list(store.keys()) == ["loc"]


def test_network_parameters_are_left_as_they_are():
    """Whoever trains a network in the model finds its gradients and flags untouched; new weights count."""
    case = CASES["network"]
    batched, weights = build("network"), list(case.model.parameters())
    before = batched(torch.ones(2, 2))[1]
    log_density_and_grad(batched, torch.ones(2, 2))
    assert weights
    assert all(p.requires_grad and p.grad is None for p in weights)
    with torch.no_grad():
        weights[0].add_(1.0)
    try:
        assert not torch.allclose(batched(torch.ones(2, 2))[1], before)
    finally:
        with torch.no_grad():
            weights[0].sub_(1.0)


def test_the_order_of_handlers_around_the_model():
    y = torch.tensor(0.3)

    def model(y):
        x = pyro.sample("x", flow_prior())
        pyro.sample("y", dist.Normal(x[..., 1], 0.5), obs=y)

    q = torch.randn(4, 3, generator=generator())
    plain = BatchedModel(model, (y,))
    scaled = BatchedModel(poutine.scale(model, scale=3.0), (y,))
    log_det = flow_prior().transforms[0].log_abs_det_jacobian(q, plain.sites(q)["x"])
    torch.testing.assert_close(sum(scaled(q)), 3 * sum(plain(q)) - 2 * log_det)  # p(x)^3 dx, in z
    torch.testing.assert_close(scaled(q)[0], plain(q)[0])
    twice = BatchedModel(reparam(model), (y,))
    torch.testing.assert_close(twice(q)[1], plain(q)[1])
    assert twice.sites(q).keys() == plain.sites(q).keys() == {"x_base", "x"}


@pytest.mark.parametrize("flow_dtype", [torch.float32, torch.float64])
def test_a_model_of_another_dtype_than_its_flow_is_told_so(flow_dtype):
    flow = mixture_flow(2, flow_dtype)
    other = torch.float64 if flow_dtype == torch.float32 else torch.float32
    matrix = torch.eye(2, dtype=other)

    def mixed(y):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x @ matrix, 0.5).to_event(1), obs=y)

    with pytest.raises(ModelError, match=rf"mixes dtypes .*'x_base' {flow_dtype}, .*flow\.to\(torch\.float32\)"):
        BatchedModel(mixed, (torch.zeros(2, dtype=other),))
