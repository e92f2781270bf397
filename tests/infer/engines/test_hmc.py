"""Hamiltonian Monte Carlo: the integrator, the adaptation, the jumps, and the whole kernel against exact
answers."""

import math

import pytest
import torch
from scipy import stats

from exact_densities import BIASES, PROBLEMS, Warped, assert_exact, conjugate, two_modes
from ifpyro.infer import HMC, MCMC
from ifpyro.infer.engines.adaptation import (
    FINE_COST,
    SPREAD,
    DualAveraging,
    SpreadSteps,
    TrajectoryLength,
    harmonic_mean,
    van_der_corput,
)
from ifpyro.infer.engines.guided_density import Guide, Target, Value, pad_rows
from ifpyro.infer.engines.hamiltonian import start, transition
from ifpyro.infer.engines.integrator import leapfrog
from ifpyro.infer.engines.jumps import IndependenceProposal, jump
from ifpyro.infer.engines.metric import Metric, metric_from_draws


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def round_gaussian(q):
    zero = torch.zeros(len(q), dtype=q.dtype)
    return Guide(Value(-0.5 * q.square().sum(-1), zero), -q)


def quartic(q):
    """An asymmetric potential, so that a sign error cannot hide."""
    zero = torch.zeros(len(q), dtype=q.dtype)
    return Guide(Value(-(0.25 * q**4 + 0.3 * q**3 + q**2).sum(-1), zero), -(q**3 + 0.9 * q**2 + 2 * q))


def random_start(dim=3, n=5):
    g = generator()
    return [torch.randn(n, dim, generator=g, dtype=torch.float64) for _ in range(2)]


# -- the integrator --------------------------------------------------------------------------------


def test_leapfrog_reaches_the_known_end_of_a_quarter_turn():
    q, p = random_start()
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def scaled(x):
        return Guide(round_gaussian(x / scale).value, -x / scale**2)

    end = leapfrog(scaled, q, p, scaled(q), math.pi / 2 / 2000, 2000, Metric(scale))
    torch.testing.assert_close(end.position, scale * p, atol=1e-5, rtol=0)
    torch.testing.assert_close(end.momentum, -q / scale, atol=1e-5, rtol=0)
    assert not end.failed.any()


def test_energy_error_is_of_second_order():
    q, p = random_start()
    metric = Metric(torch.tensor([[1.0, 0, 0], [0.3, 0.7, 0], [-0.2, 0.1, 1.2]], dtype=torch.float64))
    errors = []
    steps = [20, 40, 80, 160]
    for count in steps:
        end = leapfrog(quartic, q, p, quartic(q), 1.0 / count, count, metric)
        before = 0.5 * p.square().sum(-1) - quartic(q).value.log_prior
        after = 0.5 * end.momentum.square().sum(-1) - end.guide.value.log_prior
        errors.append(float((after - before).abs().mean().log()))
    order = -stats.linregress([math.log(s) for s in steps], errors).slope
    assert 1.9 < order < 2.1


@pytest.mark.parametrize("dense", [False, True])
def test_leapfrog_reverses(dense):
    q, p = random_start()
    scale = torch.tensor([[1.0, 0, 0], [0.3, 0.7, 0], [-0.2, 0.1, 1.2]], dtype=torch.float64)
    metric = Metric(scale if dense else scale.diagonal())
    there = leapfrog(quartic, q, p, quartic(q), 0.1, 25, metric)
    assert (there.position - q).abs().max() > 0.5
    back = leapfrog(quartic, there.position, -there.momentum, there.guide, 0.1, 25, metric)
    torch.testing.assert_close(back.position, q, atol=1e-11, rtol=0)
    torch.testing.assert_close(back.momentum, -p, atol=1e-11, rtol=0)


def test_a_chain_that_leaves_the_domain_fails_alone_and_the_model_never_sees_it():
    def walled(q):
        assert q.isfinite().all(), "the model was evaluated at a point that is not finite"
        guide = round_gaussian(q)
        return Guide(guide.value, torch.where(q.abs() > 3, torch.nan, guide.gradient))

    q = torch.tensor([[0.0], [2.9]])
    p = torch.tensor([[0.1], [3.0]])
    end = leapfrog(walled, q, p, walled(q), 0.2, 5, Metric(torch.ones(1)))
    assert end.failed.tolist() == [False, True]
    alone = leapfrog(walled, q[:1], p[:1], walled(q[:1]), 0.2, 5, Metric(torch.ones(1)))
    torch.testing.assert_close(end.position[:1], alone.position)


def test_one_gradient_per_leapfrog_step_and_one_fine_value_per_proposal():
    problem = conjugate(bias=0.1)
    target = Target(problem)
    state = start(target, problem.sample_prior(10, generator()))
    problem.gradients = problem.values = 0
    options = {"step_size": 0.3, "metric": Metric(torch.ones(4).double()), "generator": generator()}
    for _ in range(3):
        state, _ = transition(target, state, num_steps=7, **options)
    assert problem.gradients == 3 * 7 * 10
    assert problem.values == 3 * 10


def test_metric_whitens_and_its_maps_are_transposes():
    g = generator()
    mix = torch.randn(3, 3, generator=g, dtype=torch.float64)
    draws = torch.randn(4000, 3, generator=g, dtype=torch.float64) @ mix.T
    dense = metric_from_draws(draws)
    assert dense.scale.ndim == 2
    torch.testing.assert_close(torch.cov(dense.whiten(draws).T), torch.eye(3).double(), atol=0.06, rtol=0)
    for metric in (dense, metric_from_draws(draws, dense=False)):
        w, v = random_start()
        torch.testing.assert_close(metric.whiten(metric.push(w)), w)
        torch.testing.assert_close((metric.push(w) * v).sum(), (w * metric.pull(v)).sum())
    assert metric_from_draws(draws[:5]).scale.ndim == 1  # five draws cannot carry a covariance
    assert metric_from_draws(draws[:1].expand(50, -1)).scale.isfinite().all()


# -- adaptation ------------------------------------------------------------------------------------


def test_harmonic_mean_survives_what_is_not_a_number():
    assert harmonic_mean(torch.tensor([0.5, 0.5])) == pytest.approx(0.5)
    values = torch.tensor([0.8] * 62 + [math.nan, 0.0])
    assert 0.5 < harmonic_mean(values) < 0.7  # two dead chains of 64 lower it, and do not rule it
    assert harmonic_mean(torch.tensor([math.inf, -math.inf, math.nan])) == pytest.approx(0.1)


def test_van_der_corput():
    assert [van_der_corput(i) for i in range(1, 6)] == [0.5, 0.25, 0.75, 0.125, 0.625]


@pytest.mark.parametrize("first", [0.001, 10.0])
def test_dual_averaging_finds_the_step(first):
    averaging = DualAveraging(first, target=0.65)
    for _ in range(400):
        averaging.update(math.exp(-averaging.step_size))
    assert averaging.average == pytest.approx(-math.log(0.65), rel=0.1)


@pytest.mark.parametrize("first", [0.01, 20.0])
@pytest.mark.parametrize("hopeless", [0.0, 0.4])
def test_particles_find_the_step_that_accepts_most_for_its_cost(first, hopeless):
    """Whatever share of them is rejected at any step."""
    g, steps, found = generator(), SpreadSteps(first), []
    lives = torch.rand(1024, generator=g) > hopeless
    for _ in range(150):
        step = steps.draw(1024, g, torch.float64)[:, 0]
        steps.update(torch.where(lives, (-step.square()).exp(), 0.0), round(max(1.0, 10 / steps.step_size)))
        found.append(math.log(steps.step_size))
    grid = torch.linspace(0.05, 3.0, 2000, dtype=torch.float64)
    z = SPREAD * torch.linspace(-4, 4, 401, dtype=torch.float64)
    accepted = ((-(grid[:, None] * z.exp()).square()).exp() * torch.exp(-0.5 * (z / SPREAD) ** 2)).sum(1)
    best = float(grid[(accepted / (10 / grid + FINE_COST)).argmax()])
    assert math.exp(sum(found[50:]) / 100) == pytest.approx(best, rel=0.1)


def test_particles_that_are_all_rejected_take_smaller_steps():
    steps = SpreadSteps(1.0)
    steps.draw(64, generator(), torch.float32)
    steps.update(torch.zeros(64), 5)
    assert steps.step_size < 0.7


@pytest.mark.parametrize("criterion", ["chees", "snaper"])
def test_trajectory_length_does_not_depend_on_where_it_starts(criterion):
    lengths = []
    for first in (0.2, 12.0):
        length, g = TrajectoryLength(first, criterion), generator()
        q = torch.randn(128, 10, generator=g)
        for i in range(400):
            u = length.jitter(i)
            p = torch.randn(128, 10, generator=g)
            angle = torch.tensor(u * length.length)  # the exact flow of a round Gaussian
            after, velocity = angle.cos() * q + angle.sin() * p, angle.cos() * p - angle.sin() * q
            length.update(q, after, velocity, torch.ones(128), u, 0.25)
            q = after
        length.freeze()
        lengths.append(length.length)
    assert lengths[0] == pytest.approx(lengths[1], rel=0.3)
    assert 0.5 < lengths[0] < math.pi


def test_step_size_is_not_ruled_by_the_gap_between_guide_and_fine_density():
    steps = []
    for bias in (0.0, 0.15):
        kernel = HMC(conjugate(bias=bias), level="coarse")
        MCMC(kernel, 5, 100, 64, seed=1, progress=False).run()
        steps.append(kernel.report()["step_size"])
    assert steps[1] > 0.5 * steps[0]


def test_a_hopeless_guide_is_given_up():
    for bias, expected in ((0.02, "1 evaluation"), (3.0, "32 evaluations")):  # fewer are biased
        mcmc = MCMC(HMC(conjugate(bias=bias, sd=0.2)), 5, 30, 32, seed=1, progress=False).run()
        assert mcmc.attributes["guide_level"] == expected
    target = Target(conjugate())
    q = target.density.sample_prior(20, generator())
    target.choose_level(q, target.fine(q))
    assert target.one_level


# -- jumps -----------------------------------------------------------------------------------------


def test_the_proposal_is_the_density_of_its_draws():
    problem = two_modes()
    proposal = IndependenceProposal(problem.sample_prior(60, generator()), Target(problem))
    axis = torch.linspace(-9, 9, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = proposal.log_density(grid, problem(grid)[0]).exp()
    cell = float(axis[1] - axis[0]) ** 2
    assert float(density.sum()) * cell == pytest.approx(1.0, abs=1e-3)
    draws = proposal.sample(20000, generator(1))
    for f in (lambda x: x[:, 0], lambda x: x[:, 0] * x[:, 1], lambda x: x[:, 1] ** 3):
        exact, values = float((density * f(grid)).sum()) * cell, f(draws)
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 20000**0.5


def test_jumps_alone_sample_the_posterior():
    problem = two_modes(bias=0.3)
    target, g = Target(problem), generator(2)
    # A poor mixture, fitted to the prior, and chains that all start in one mode.
    proposal = IndependenceProposal(problem.sample_prior(200, g), target)
    state = start(target, torch.full((64, 2), -3.0, dtype=torch.float64))
    draws = []
    for i in range(340):
        state, acceptance = jump(target, state, proposal, g)
        if i >= 40:
            draws.append(state.q)
    assert 0.05 < float(acceptance.mean()) < 1
    torch.testing.assert_close(state.fine.log_likelihood, target.fine(state.q).log_likelihood)
    torch.testing.assert_close(state.guide.gradient, target.guide(state.q).gradient)
    assert_exact(problem, torch.stack(draws, 1))


def test_pad_rows():
    q = torch.arange(10.0)[:, None]
    assert [len(pad_rows(q[:n], 10)) for n in (1, 2, 3, 5, 9, 10)] == [1, 2, 4, 8, 10, 10]
    assert torch.equal(pad_rows(q[:3], 10)[:3], q[:3])


# -- the kernel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("biased", [False, True])
def test_hmc_is_exact(name, biased):
    problem = PROBLEMS[name](bias=BIASES[name] * biased)
    level = "coarse" if biased else None
    mcmc = MCMC(HMC(problem, level=level), 150, 100, 64, seed=7, smc_particles=256, progress=False).run()
    assert_exact(problem, mcmc.positions())
    gap = mcmc.sample_stats()["fidelity_gap"]
    assert bool((gap.abs() > 1e-3).any()) == biased


@pytest.mark.parametrize("name", ["conjugate", "skewed"])
@pytest.mark.parametrize("criterion", ["chees", "snaper"])
@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_trajectories_alone_are_exact_with_a_biased_guide(name, criterion, metric):
    problem = PROBLEMS[name](bias=BIASES[name])
    kernel = HMC(problem, jumps=False, level="coarse", criterion=criterion, metric=metric)
    mcmc = MCMC(kernel, 150, 120, 64, seed=6, init="prior", progress=False).run()
    assert mcmc.attributes["jump_acceptance"] == 0.0
    assert_exact(problem, mcmc.positions())


def test_the_biased_guide_would_be_noticed():
    """The guide's own posterior is many standard errors away: the two-level tests can fail."""
    problem = conjugate(bias=BIASES["conjugate"])
    wrong = conjugate(bias=BIASES["conjugate"])
    wrong.y = (wrong.y - wrong.bias) / (1 + wrong.bias)
    wrong.sd, wrong.bias = wrong.sd / (1 + wrong.bias), 0.0
    mcmc = MCMC(HMC(wrong), 150, 100, 64, seed=5, smc_particles=256, progress=False).run()
    with pytest.raises(AssertionError, match="exact"):
        assert_exact(problem, mcmc.positions(), errors=8.0)


def test_given_step_and_length_are_kept():
    kernel = HMC(conjugate(), step_size=0.3, trajectory_length=1.2)
    mcmc = MCMC(kernel, 10, 30, 8, seed=1, init="prior", progress=False).run()
    assert (mcmc.sample_stats()["step_size"] == 0.3).all()
    assert mcmc.attributes["trajectory_length"] == 1.2


def test_divergences_are_counted():
    kernel = HMC(Warped(sd=0.01), step_size=2.0, jumps=False)
    mcmc = MCMC(kernel, 20, 0, 16, seed=1, progress=False).run()
    assert mcmc.attributes["divergences"] == int(mcmc.sample_stats()["diverging"].sum()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size must be a positive number"),
        ({"trajectory_length": -1.0}, "trajectory_length must be a positive number"),
        ({"criterion": "nuts"}, "criterion must be one of 'chees', 'snaper'; got 'nuts'"),
        ({"metric": "full"}, "metric must be one of"),
        ({"target_accept": 1.0}, "target_accept must be a number strictly between 0 and 1"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1"),
        ({"jumps": "yes"}, "jumps must be one of"),
        ({"level": 0}, "level must be .* got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HMC(conjugate(), **options)


def test_unknown_options_raise():
    with pytest.raises(TypeError, match="steps"):
        HMC(conjugate(), steps=10)
    with pytest.raises(TypeError, match="HMC expects a Pyro model"):
        HMC("model")
