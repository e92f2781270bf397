"""Tempered SMC: weights and temperatures, evidence and posterior against exact answers, bad input."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from exact_densities import BIASES, PROBLEMS, GaussianMixture, conjugate, statistics, two_modes
from ifpyro.core.files import read_tensors, write_tensors
from ifpyro.infer import HMC, MCMC, SMC
from ifpyro.infer.engines.guided_density import Target
from ifpyro.infer.engines.particle_moves import WORTH_JUMPING
from ifpyro.infer.engines.prior_draws import START, prior_population, suffices
from ifpyro.infer.engines.tempering import (
    Genealogy,
    along_a_curve,
    effective_fraction,
    next_temperature,
    systematic_resample,
)
from ifpyro.infer.results.diagnostics import pareto_k

FOUR_ERRORS = float(stats.t.isf(stats.norm.sf(4.0), 15))  # where the error is the spread of 16 islands


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- weights ---------------------------------------------------------------------------------------


def test_effective_fraction():
    log_weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, -math.inf, -math.inf, 5.0], [-math.inf] * 4])
    torch.testing.assert_close(effective_fraction(log_weight), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(effective_fraction(log_weight[:2] - 1e4), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("scale", [10.0, 1e6, 1e12])
@pytest.mark.parametrize("beta", [0.0, 1e-7])
def test_next_temperature_keeps_what_was_asked(scale, beta):
    log_likelihood = -scale * torch.rand(4, 500, generator=generator(), dtype=torch.float64)
    after = next_temperature(log_likelihood, beta, 0.5)
    kept = float(effective_fraction((after - beta) * log_likelihood).mean())
    assert beta < after <= 1
    assert kept == pytest.approx(0.5, abs=0.01)


def test_next_temperature_goes_all_the_way_when_it_can_and_ignores_excluded_particles():
    flat = torch.zeros(2, 100)
    assert next_temperature(flat, 0.0, 0.5) == 1.0
    flat[:, :80] = -math.inf  # 20% survive any temperature: not a reason to take tiny steps
    assert next_temperature(flat, 0.0, 0.5) == 1.0


def test_next_temperature_goes_on_where_there_are_more_particles_than_needed():
    log_likelihood = -100 * torch.rand(4, 500, generator=generator(), dtype=torch.float64)
    kept = effective_fraction(next_temperature(log_likelihood, 0.0, 0.5, 1, 0.1) * log_likelihood)
    assert float(kept.mean()) == pytest.approx(0.1, abs=0.01)


def test_systematic_resampling_gives_each_particle_its_share():
    log_weight = torch.randn(50, 64, generator=generator(), dtype=torch.float64)
    log_weight[:, 0] = log_weight[:, -1] = -math.inf
    index = systematic_resample(log_weight, generator(1))
    expected = 64 * torch.softmax(log_weight, 1)
    count = torch.stack([row.bincount(minlength=64) for row in index])
    assert ((count >= expected.floor()) & (count <= expected.ceil())).all()
    assert not (index == 0).any()
    assert not (index == 63).any()


def test_resampling_along_a_curve_takes_from_every_region_its_share():
    q = torch.randn(40, 512, 2, generator=generator(), dtype=torch.float64)
    order = along_a_curve(q)
    assert torch.equal(order.sort(1).values, torch.arange(512).expand(40, -1))
    log_weight = -2 * (q - 0.5).square().sum(-1)
    weight = torch.softmax(log_weight, 1)
    errors = []
    for rows in (torch.arange(512).expand(40, -1), order):
        index = rows.gather(1, systematic_resample(log_weight.gather(1, rows), generator(1)))
        values = torch.cat([q, q.square()], -1)  # means and variances, within every island
        kept = values.gather(1, index[..., None].expand(-1, -1, 4)).mean(1)
        errors.append((kept - (weight[..., None] * values).sum(1)).square().mean())
    assert errors[1] < 0.25 * errors[0]


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("biased", [False, True])
def test_smc_is_exact(name, biased):
    problem = PROBLEMS[name](bias=BIASES[name] * biased)
    options = {"level": "coarse", "prior_draws": 1} if biased else {}  # the biased guide must have moves to spoil
    smc = SMC(problem, 2048, num_islands=16, seed=3, progress=False, **options).run()
    assert abs(smc.log_evidence - problem.log_evidence) < 4 * smc.log_evidence_se < 0.5
    # Islands are independent: their spread is the error of the pooled estimate.
    weight = smc.sample_stats()["log_weight"][:, 0].double().softmax(0)
    for what, (values, exact) in statistics(problem, smc.positions()).items():
        islands = values.double().mean(1)
        mean = weight @ islands
        error = float((weight.square() @ (islands - mean).square()).sqrt())
        miss = abs(float(mean) - exact) / error
        assert miss < FOUR_ERRORS, f"{what}: {float(mean):.4f}, exact {exact:.4f} +- {error:.4f}"


@pytest.mark.parametrize("prior_draws", [1, 16])
def test_the_standard_error_of_the_evidence_is_honest(prior_draws):
    """Over repeated runs the evidence misses by as much as it says."""
    z = []
    for seed in range(30):
        problem = two_modes(bias=0.1)
        smc = SMC(problem, 256, num_islands=8, prior_draws=prior_draws, seed=seed, progress=False).run()
        assert (smc.stages[-1].moves == 0) == (prior_draws == 16)
        z.append((smc.log_evidence - problem.log_evidence) / smc.log_evidence_se)
    assert 0.5 < float(torch.tensor(z).square().mean().sqrt()) < 1.6


def test_narrow_likelihood_in_many_dimensions():
    """32 of 64 coordinates seen through a mixing matrix with 3% noise: the evidence spans hundreds of
    nats."""
    mix = torch.linalg.qr(torch.randn(64, 64, generator=generator()))[0][:32]
    y = mix @ torch.randn(64, generator=generator(4))
    problem = GaussianMixture([1.0], torch.zeros(1, 64), torch.eye(64)[None], mix, y, 0.03)
    smc = SMC(problem, 512, seed=1, progress=False).run()
    assert abs(smc.log_evidence - problem.log_evidence) < 4 * smc.log_evidence_se < 4.0
    assert smc.island_log_evidence.std() < 1.0
    assert len(smc.stages) > 10


# -- prior draws that suffice ----------------------------------------------------------------------


def test_prior_draws_that_carry_the_weight_need_no_move():
    problem = conjugate(sd=1.0)
    smc = SMC(problem, 2048, num_islands=16, seed=1, progress=False).run()
    assert [(stage.beta, stage.moves) for stage in smc.stages] == [(1.0, 0)]
    assert problem.gradients == 0
    assert smc.attributes["prior_draws"] == problem.values - 2048  # but for the pilot
    assert smc.pareto_k is not None
    assert smc.pareto_k < 0.7
    assert smc.attributes["pareto_k"] == smc.pareto_k
    assert abs(smc.log_evidence - problem.log_evidence) < 3 * smc.log_evidence_se < 0.1
    for what, (values, exact) in statistics(problem, smc.positions()).items():
        error = float(values.double().mean(1).std() / 4)
        assert abs(float(values.double().mean()) - exact) < FOUR_ERRORS * error, what
    copies = torch.unique(smc.positions().flatten(0, 1), dim=0)
    assert len(copies) > 0.85 * 2048
    assert bool((smc.sample_stats()["n_steps"] == 0).all())


def test_the_shape_of_short_tails_is_found_quietly():
    """Weights of bounded likelihoods over many prior draws: ArviZ's candidates for the shape overflow."""
    draws = torch.randn(40_000, generator=generator(), dtype=torch.float64)
    with warnings.catch_warnings(action="error"):
        assert pareto_k(-0.5 * ((draws - 0.3) / 0.2).square()) < 0


def test_one_prior_draw_a_particle_is_the_textbook_algorithm():
    problem = conjugate(sd=3.0)
    smc = SMC(problem, 1024, num_islands=8, prior_draws=1, seed=1, progress=False).run()
    assert [(stage.beta, stage.moves >= 4) for stage in smc.stages] == [(1.0, True)]
    assert smc.attributes["prior_draws"] == 1024
    assert SMC(conjugate(sd=0.05), 128, seed=1, progress=False).run().pareto_k is None


def test_prior_draws_that_do_not_suffice_start_at_a_higher_temperature():
    one, more = (SMC(conjugate(sd=0.05), 256, prior_draws=k, seed=1, progress=False).run() for k in (1, 16))
    assert more.attributes["prior_draws"] == START * 256
    assert more.stages[0].beta > 2 * one.stages[0].beta
    assert more.stages[0].moves >= 4


def test_the_evidence_of_the_prior_draws_is_unbiased():
    target, source = Target(conjugate(sd=0.7)), generator(5)
    ratio, counts = [], set()
    for _ in range(500):
        found = prior_population(target, 16, 2, 64, source)
        counts.add(found.per_particle)
        ratio.append(float((found.fine.log_likelihood - target.density.log_evidence).exp().mean()))
    ratio = torch.tensor(ratio)
    assert len(counts) > 10
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / len(ratio) ** 0.5 < 0.1


def test_a_heavy_tail_of_weights_does_not_suffice():
    equal = torch.zeros(4, 100)
    assert suffices(equal, 50, 1, math.nan)
    assert suffices(equal, 80, 1, 0.69)
    assert not suffices(equal, 81, 1, 0.1)
    assert not suffices(equal, 50, 1, 0.71)
    equal[2:, 1:] = -math.inf  # the second data set has one draw an island
    assert suffices(equal, 25, 1, 0.1)
    assert not suffices(equal, 25, 2, 0.1)


class Ring:
    """A standard normal prior in the plane and a likelihood that holds it to a thin circle."""

    dim, gaussian_prior = 2, True

    def __init__(self, sd):
        self.sd, self.gradients = sd, 0
        r = torch.linspace(0, 4, 400_001, dtype=torch.float64)
        mass = r * (-0.5 * r.square() - 0.5 * ((r - 1) / sd).square()).exp()
        self.log_evidence = float(torch.trapezoid(mass, r).log())

    def __call__(self, q):
        self.gradients += len(q) * torch.is_grad_enabled()
        log_prior = -0.5 * q.square().sum(-1) - math.log(2 * math.pi)
        return log_prior, -0.5 * ((q.norm(dim=-1) - 1) / self.sd).square()

    def sample_prior(self, num, generator):
        return torch.randn(num, 2, generator=generator)

    def sites(self, q):
        return {"q": q}


def test_jumps_carry_particles_along_pieces_too_thin_for_leapfrog_steps():
    problem = Ring(0.005)
    smc = SMC(problem, 1024, num_islands=8, seed=2, progress=False).run()
    assert abs(smc.log_evidence - problem.log_evidence) < 3 * smc.log_evidence_se < 0.5
    angle = torch.atan2(*smc.positions().double().unbind(-1))
    for statistic in (angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()):  # all zero on average
        islands = statistic.mean(1)
        assert abs(float(islands.mean())) < 4 * float(islands.std()) / 8**0.5
        assert float(islands.std()) < 0.15
    assert smc.stages[-1].jumps > 0.2
    assert problem.gradients / 1024 < 60 * len(smc.stages)  # leapfrog alone would need 300 for one way round


def test_jumps_are_dropped_where_they_are_hardly_ever_accepted():
    smc = SMC(conjugate(sd=0.01), 64, seed=1, progress=False).run()
    assert any(stage.jumps > 0 for stage in smc.stages)
    mix = torch.linalg.qr(torch.randn(24, 24, generator=generator()))[0]
    hard = GaussianMixture([1.0], torch.zeros(1, 24), torch.eye(24)[None], mix, torch.ones(24), 0.02)
    stages = SMC(hard, 128, seed=1, progress=False).run().stages
    dropped = [stage.jumps < WORTH_JUMPING for stage in stages]
    assert dropped[-1]
    assert dropped == sorted(dropped)


# -- the result ------------------------------------------------------------------------------------


def test_draws_and_statistics():
    smc = SMC(conjugate(bias=0.1), 64, num_islands=4, seed=1, progress=False).run()
    assert smc.get_samples()["q"].shape == (64, 4)
    assert smc.get_samples(group_by_chain=True)["q"].shape == (4, 16, 4)
    stats = smc.sample_stats()
    expected = "lp energy acceptance_rate diverging step_size n_steps fidelity_gap log_weight"
    assert set(stats) == set(expected.split())
    assert all(value.shape == (4, 16) for value in stats.values())
    log_prior, log_likelihood = smc.model(smc.positions().reshape(64, 4))
    torch.testing.assert_close(stats["lp"].flatten(), log_prior + log_likelihood)
    assert (stats["energy"] > -stats["lp"]).all()
    mean_weight = stats["log_weight"][:, 0].double().exp().mean()
    assert float(mean_weight) == pytest.approx(1.0)
    assert smc.diagnostics().passed["divergences"]


def test_pooled_draws_weigh_islands_by_their_evidence():
    smc = SMC(two_modes(), 64, num_islands=2, seed=1, progress=False).run()
    smc._stats["log_weight"] = torch.tensor([math.log(1.5), math.log(0.5)])[:, None].expand(2, 32)
    first = {tuple(row.tolist()) for row in smc.positions()[0]}
    share = [tuple(row.tolist()) in first for row in smc.get_samples()["q"]]
    assert sum(share) == 48
    assert torch.equal(smc.get_samples()["q"], smc.get_samples()["q"])


def test_seeds_decide_everything_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    one, same, other = (SMC(two_modes(), 64, seed=s, progress=False).run() for s in (1, 1, 2))
    assert torch.equal(one.positions(), same.positions())
    assert one.log_evidence == same.log_evidence != other.log_evidence
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_size_changes_nothing_but_memory():
    problem = two_modes()
    whole = SMC(problem, 64, prior_draws=1, seed=1, progress=False).run()
    sizes = []
    call = type(problem).__call__

    class Watched(type(problem)):
        def __call__(self, q):
            sizes.append(len(q))
            return call(self, q)

    problem.__class__ = Watched
    parts = SMC(problem, 64, prior_draws=1, seed=1, batch_size=24, progress=False).run()
    assert max(sizes) == 24
    assert parts.log_evidence == pytest.approx(whole.log_evidence, abs=1e-6)


# -- bad input -------------------------------------------------------------------------------------


class Broken:
    """A standard normal prior with a likelihood to order."""

    dim, gaussian_prior = 2, True

    def __init__(self, log_likelihood):
        self.log_likelihood = log_likelihood

    def __call__(self, q):
        return -0.5 * q.square().sum(-1), self.log_likelihood(q)

    def sample_prior(self, num, generator):
        return torch.randn(num, 2, generator=generator)

    def sites(self, q):
        return {"q": q}


@pytest.mark.parametrize(
    ("log_likelihood", "message"),
    [
        (lambda q: q[:, 0] * math.nan, "NaN at every one of 64 prior draws"),
        (lambda q: q[:, 0] * 0 - math.inf, "impossible .* at every one of 64 prior draws"),
        (lambda q: q[:, 0] * 0 + math.inf, r"\+inf at some of 64 prior draws"),
        (
            lambda q: torch.where(q[:, 0] > 1.9, 0.0, -math.inf),
            "islands no particle has a positive likelihood",
        ),
    ],
)
def test_impossible_models(log_likelihood, message):
    with pytest.raises(ValueError, match=message):
        SMC(Broken(log_likelihood), 64, num_islands=16, seed=1, progress=False).run()


def test_a_model_that_fails_on_the_way():
    calls = []

    def later(q):
        calls.append(len(q))
        if len(calls) > 20:
            raise ValueError("bad scale")
        return -50 * (q - 1).square().sum(-1)

    with pytest.raises(RuntimeError, match=r"inverse temperature .*ValueError: bad scale"):
        SMC(Broken(later), 64, seed=1, progress=False).run()


def test_data_in_other_units_are_warned_of():
    def far(q):
        if q.requires_grad:
            raise OSError("enough")
        return -1e9 * (q[:, 0] - 1000).square()

    with pytest.warns(UserWarning, match="first inverse temperature .* same units"), pytest.raises(RuntimeError):
        SMC(Broken(far), 64, seed=1, progress=False).run()


def test_partly_undefined_likelihoods_count_as_impossible():
    def half(q):
        return torch.where(q[:, 0] > 0, -0.5 * (q[:, 0] - 1) ** 2, torch.nan)

    with pytest.warns(UserWarning, match="NaN at .* prior draws"):
        smc = SMC(Broken(half), 512, seed=1, progress=False).run()
    assert (smc.positions()[..., 0] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles must be an integer of at least 2, got 0"),
        ({"num_particles": 10, "num_islands": 4}, "multiple of num_islands"),
        ({"num_particles": 4, "num_islands": 4}, "at least 2 each"),
        ({"num_particles": 255, "num_islands": 1}, "a lone island .* an even number"),
        ({"num_islands": -1}, "num_islands must be an integer of at least 1"),
        ({"ess_threshold": 1.5}, "ess_threshold must be a number strictly between 0 and 1"),
        ({"max_moves": 0}, "max_moves"),
        ({"prior_draws": 0}, "prior_draws must be an integer of at least 1, got 0"),
        ({"seed": -3}, "seed expects an integer from 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"batching": "pmap"}, "batching must be one of 'plate', 'vmap', 'loop', None; got 'pmap'"),
        ({"level": "rough"}, "level must be 'fine', 'coarse', a positive number of solver steps"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SMC(conjugate(), **options)


def test_numbers_of_numpy():
    smc = SMC(conjugate(), np.int64(64), num_islands=np.int32(2), ess_threshold=np.float32(0.25))
    assert (smc.num_particles, smc.num_islands, smc.ess_threshold) == (64, 2, 0.25)


def test_misuse():
    with pytest.raises(TypeError, match="particles"):
        SMC(conjugate(), particles=10)
    with pytest.raises(TypeError, match="expects no arguments"):
        SMC(conjugate(), 64, progress=False).run(1.0)
    with pytest.raises(RuntimeError, match="holds no draws"):
        SMC(conjugate(), 64).get_samples()


# -- interrupted, restored, run again --------------------------------------------------------------


class Interrupted:
    """A problem at whose ``after``-th gradient something happens."""

    def __init__(self, problem, after, how):
        self.problem, self.after, self.how, self.calls = problem, after, how, 0
        self.dim, self.gaussian_prior, self.sites = problem.dim, problem.gaussian_prior, problem.sites
        self.sample_prior = problem.sample_prior

    def __call__(self, q):
        self.calls += torch.is_grad_enabled()
        if self.calls == self.after:
            self.calls += 1
            raise self.how
        return self.problem(q)


HARD = {"num_particles": 64, "prior_draws": 1, "seed": 3, "progress": False}


def hard(y=0.5, sd=0.02):
    """Data so exact that it takes several temperatures."""
    eye = [[1.0, 0.0], [0.0, 1.0]]
    return GaussianMixture([1.0], [[0.0, 0.0]], [eye], eye, [y, -0.2], sd, bias=0.1)


def assert_same_run(a, b):
    assert torch.equal(a.positions(), b.positions())
    assert (a.log_evidence, a.log_evidence_se, a.stages) == (b.log_evidence, b.log_evidence_se, b.stages)
    assert a.tuning == b.tuning
    assert a.attributes == b.attributes
    for name, value in a.sample_stats().items():
        assert torch.equal(value, b.sample_stats()[name]), name


@pytest.mark.parametrize("how", [KeyboardInterrupt(), ValueError("busy")], ids=["Ctrl-C", "failure"])
@pytest.mark.parametrize("after", [3, 60])
def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(how, after, recwarn):
    """In the first temperature there is nothing to go on from, later there is."""
    whole = SMC(hard(), **HARD).run()
    smc = SMC(Interrupted(hard(), after, how), **HARD)
    error = KeyboardInterrupt if isinstance(how, KeyboardInterrupt) else RuntimeError
    with pytest.raises(error) as raised:
        smc.run()
    told = str(raised.value) + "".join(str(warning.message) for warning in recwarn)
    assert not hasattr(smc, "log_evidence")
    with pytest.raises(RuntimeError, match="holds no draws"):
        smc.positions()
    if after == 3:
        assert "no posterior draws before the inverse temperature reaches 1" in told
        with pytest.raises(RuntimeError, match="no interrupted run to go on from"):
            smc.resume()
        return
    assert "and resume() goes on from there" in told
    assert_same_run(smc.resume(), whole)
    with pytest.raises(RuntimeError, match="no interrupted run"):
        smc.resume()


def test_a_killed_run_goes_on_from_its_file(tmp_path, monkeypatch):
    whole = SMC(hard(), **HARD).run()
    path = tmp_path / "particles"
    with pytest.warns(UserWarning, match="so does run"), pytest.raises(KeyboardInterrupt):
        SMC(Interrupted(hard(), 60, KeyboardInterrupt()), checkpoint=path, **HARD).run()
    counted = Interrupted(hard(), -1, None)
    assert_same_run(SMC(counted, checkpoint=path, **HARD).run(), whole)
    gradients = counted.calls
    assert_same_run(SMC(counted, checkpoint=path, **HARD).run(), whole)  # the last temperature is in the file
    assert 0 < gradients == counted.calls


OTHER = {
    "num_particles": ({"num_particles": 128}, "num_particles 64 there, 128 here"),
    "seed": ({"seed": 4}, "seed 3 there, 4 here"),
    "moves": ({"max_moves": 3}, "max_moves 20 there, 3 here"),
    "level": ({"level": "fine"}, "level None there, 'fine' here"),
}


@pytest.mark.parametrize("what", OTHER)
def test_particles_of_another_sampler_are_refused(tmp_path, what):
    SMC(hard(), checkpoint=tmp_path / "particles", **HARD).run()
    options, message = OTHER[what]
    with pytest.raises(ValueError, match=message):
        SMC(hard(), checkpoint=tmp_path / "particles", **{**HARD, **options}).run()


def test_particles_of_other_data_are_refused(tmp_path):
    SMC(hard(), checkpoint=tmp_path / "particles", **HARD).run()
    other = hard(y=0.51)
    with pytest.raises(ValueError, match=r"are of another model or of other data: the log-density was .* and is now"):
        SMC(other, checkpoint=tmp_path / "particles", **HARD).run()


def test_a_restored_run_is_whole(tmp_path):
    whole = SMC(hard(), **HARD).run()
    whole.save(tmp_path / "draws")
    again = SMC(hard(), 8, num_islands=2, progress=False).restore(tmp_path / "draws")
    assert_same_run(again, whole)
    assert torch.equal(again.island_log_evidence, whole.island_log_evidence)
    assert (again.num_particles, again.num_islands, again.pareto_k) == (64, 4, whole.pareto_k)
    assert torch.equal(again.get_samples()["q"], whole.get_samples()["q"])


def test_draws_of_another_engine_or_other_data_are_not_restored(tmp_path):
    SMC(hard(), **HARD).run().save(tmp_path / "draws")
    with pytest.raises(ValueError, match="made by SMC, not by MCMC"):
        MCMC(HMC(hard()), 5).restore(tmp_path / "draws")
    for other in (hard(y=0.51), hard(sd=0.021)):
        smc = SMC(other, **HARD)
        with pytest.raises(ValueError, match="of another model or of other data"):
            smc.restore(tmp_path / "draws")
        with pytest.raises(RuntimeError, match="holds no draws"):  # and nothing of them was taken over
            smc.positions()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header.pop("facts"),
        lambda tensors, header: header.update(attributes=3),
        lambda tensors, header: header["facts"].update(stages=[1]),
        lambda tensors, header: tensors.pop("stats.lp"),
        lambda tensors, header: tensors.update({"stats.lp": torch.zeros(3)}),
        lambda tensors, header: tensors.update({"positions": torch.full((4, 16, 2), torch.nan)}),
        lambda tensors, header: tensors.update({"positions": torch.zeros(2)}),
    ],
)
def test_forged_draws_are_refused(tmp_path, change):
    path = tmp_path / "draws"
    SMC(hard(), **HARD).run().save(path)
    tensors, header = read_tensors(path, "draws")
    change(tensors, header)
    write_tensors(path, tensors, "draws", header)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        SMC(hard(), **HARD).restore(path)


def test_a_run_that_ends_early_leaves_nothing_of_the_one_before():
    smc = SMC(hard(), **HARD).run()
    assert smc.log_evidence
    smc.model = Interrupted(hard(), 3, KeyboardInterrupt())
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt):
        smc.run()
    for name in ("log_evidence", "log_evidence_se", "island_log_evidence", "stages", "pareto_k", "tuning"):
        assert not hasattr(smc, name) or name in ("stages", "pareto_k"), name
    assert (smc.attributes, smc._stats) == ({}, {})
    smc.model = 3
    with pytest.raises(TypeError):
        smc.run()
    assert not hasattr(smc, "log_evidence")


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
    whole = SMC(hard(), **HARD).run()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ifpyro.infer.engines.smc.SAVE_EVERY", 0.0)
    monkeypatch.setattr("ifpyro.infer.engines.smc_state.write_tensors", full)
    with pytest.warns(UserWarning, match="No space left on device; sampling goes on"):
        assert_same_run(SMC(hard(), checkpoint=tmp_path / "particles", **HARD).run(), whole)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        SMC(hard(), checkpoint=tmp_path / "nowhere" / "particles")


def test_a_genealogy_sums_the_errors_of_families():
    """Copies that nothing moves repeat their ancestor's error; errors of independent chains add in squares."""
    log_weight = torch.randn(400, 64, generator=generator(), dtype=torch.float64)
    error = torch.softmax(log_weight, 1).sub(1 / 64)
    one = Genealogy.start(400, 64, torch.device("cpu")).weigh(log_weight)
    torch.testing.assert_close(one.variance(), error.square().sum(1) / (1 - 1 / 64))
    torch.testing.assert_close(one.weigh(log_weight).variance(), 4 * one.variance())
    other = torch.randn(400, 64, generator=generator(1), dtype=torch.float64)
    both, alone = one.weigh(other).variance(), Genealogy.start(400, 64, torch.device("cpu")).weigh(other).variance()
    assert float((both / (one.variance() + alone)).mean()) == pytest.approx(1.0, abs=0.05)
    collapsed = one.resample(torch.zeros(400, 64, dtype=torch.long))
    assert (collapsed.variance() > one.variance()).all()
    truth = (log_weight.logsumexp(1) - math.log(64)).var()
    assert float(one.variance().mean() / truth) == pytest.approx(1.0, abs=0.25)


def test_heavy_weights_take_smaller_steps():
    """Weights without a variance pass for effective in a sample: the shape of their tail tells."""
    uniform = torch.rand(4, 500, generator=generator(), dtype=torch.float64)
    log_likelihood = -uniform.log()  # at power b a Pareto tail of shape b
    assert 0.4 < next_temperature(log_likelihood, 0.0, 0.05) < 0.6
    assert next_temperature(log_likelihood, 0.0, 0.05, enough=0.05) > 0.6
