"""Calibration of arrays: bands, ranks, coverage, TARP, latent coverage. The calibrators are calibrated themselves."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ifpyro.calibration import coverage, ecdf_differences, latent_coverage, tarp
from ifpyro.calibration.bands import (
    band_p_value,
    grid,
    pointwise,
    probability_inside,
    simultaneous_band,
    smallest_tails,
)
from ifpyro.calibration.ranks import combine, uniform_ranks, uniformity

WRONG = {"narrow": (0.0, 0.8), "wide": (0.0, 1.2), "shifted": (0.2, 1.0)}
"""Location and scale of posteriors whose truth is N(0, 1)."""


def posteriors(location=0.0, scale=1.0, sets=500, draws=100, dim=1, seed=0):
    """Truths, and draws of posteriors that depend on the data and are wrong by a shift and a factor."""
    rng = np.random.default_rng(seed)
    centre = 2.0 * rng.normal(size=(sets, dim))
    truth = centre + rng.normal(size=(sets, dim))
    return truth, centre[:, None] + location + scale * rng.normal(size=(sets, draws, dim))


# -- bands -----------------------------------------------------------------------------------------------------------


def test_probability_inside_a_band_by_hand():
    one = np.array([0.3])
    assert probability_inside(np.array([0]), np.array([0]), 1, one) == pytest.approx(0.7)
    assert probability_inside(np.array([1]), np.array([2]), 2, one) == pytest.approx(1 - 0.7**2)
    two = np.array([0.2, 0.5])
    # of two numbers: none below 0.2 and exactly one below 0.5
    assert probability_inside(np.array([0, 1]), np.array([0, 1]), 2, two) == pytest.approx(2 * 0.3 * 0.5)
    assert probability_inside(np.array([2, 0]), np.array([2, 1]), 2, two) == 0.0


@pytest.mark.parametrize("n", [7, 60, 500])
def test_the_band_holds_as_often_as_it_says(n):
    points, prob, repeats = grid(n), 0.9, 4000
    low, high = simultaneous_band(n, points, prob)
    values = np.random.default_rng(n).random((repeats, n))
    curve = np.stack([(values <= z).mean(-1) for z in points], -1)
    inside = ((curve >= low - 1e-12) & (curve <= high + 1e-12)).all(1)
    exact = probability_inside(np.round(low * n), np.round(high * n), n, points)
    assert exact >= prob  # counts are discrete: a little more than asked for
    assert abs(inside.mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / repeats)
    # the p-value is the same statement
    alarms = [band_p_value(row, points) < 1 - prob for row in values[:200]]
    assert (np.array(alarms) == ~inside[:200]).all()


def test_the_widest_pointwise_level_is_between_bonferroni_and_none():
    n, points = 200, grid(200)
    low, high = simultaneous_band(n, points, 0.99)
    narrow, wide = pointwise(0.01, n, points), pointwise(0.01 / len(points), n, points)
    assert (low * n <= narrow[0]).all()
    assert (low * n >= wide[0]).all()
    assert (high * n >= narrow[1]).all()
    assert (high * n <= wide[1]).all()
    assert smallest_tails(np.full((1, n), 0.5), points)[0] < 1e-20  # all in one place


# -- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 3])
def test_ranks_are_uniform_for_few_draws_and_for_ties(levels):
    rng = np.random.default_rng(1)
    truth, draws = rng.normal(size=(20_000,)), rng.normal(size=(20_000, 4))
    if levels:  # a discrete quantity: most draws are ties
        truth, draws = np.floor(levels * stats.norm.cdf(truth)), np.floor(levels * stats.norm.cdf(draws))
    counts = np.histogram(uniform_ranks(truth, draws, rng), bins=20, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_false_alarms_are_as_rare_as_they_should_be():
    rng = np.random.default_rng(2)
    p_values = np.array([uniformity(row).p for row in rng.random((1000, 100))])
    for size in (0.01, 0.1):
        alarms = (p_values < size).mean()
        # combining tests that depend on each other is a little generous or strict: within half of the size
        assert abs(alarms - size) < 0.5 * size + 4 * math.sqrt(size * (1 - size) / 1000)


@pytest.mark.parametrize(("wrong", "least"), [("narrow", 0.98), ("wide", 0.95), ("shifted", 0.88)])
def test_wrong_posteriors_are_caught_at_500_simulations(wrong, least):
    """One coordinate: no test of 1% can notice a shift of 0.2 sd more than 97% of the time. Four: nearly always."""
    location, scale = WRONG[wrong]
    repeats = 60
    truth, draws = posteriors(location, scale, 500 * repeats)
    ranks = uniform_ranks(truth, draws, np.random.default_rng(3))[:, 0].reshape(repeats, 500)
    p_values = np.array([uniformity(row).p for row in ranks])
    assert (p_values < 0.01).mean() >= least
    assert (combine(p_values.reshape(-1, 4)) < 0.01).all()


def test_scores_say_what_is_wrong():
    for location, scale in WRONG.values():
        truth, draws = posteriors(location, scale, 20_000)
        test = uniformity(uniform_ranks(truth, draws, np.random.default_rng(0))[:, 0])
        assert test.mean_score == pytest.approx(-location / scale, abs=0.05)
        assert test.sd_score == pytest.approx(1 / scale, abs=0.05)


# -- coverage --------------------------------------------------------------------------------------------------------


def test_coverage_of_right_posteriors_is_nominal_even_with_few_draws():
    truth, draws = posteriors(sets=20_000, draws=12, dim=2)
    found = coverage(truth, draws)
    assert (np.abs(found.covered - found.levels[:, None]) < 4 * found.error[:, None]).all()
    assert (np.abs(found.pooled - found.levels) < 4 * found.pooled_error).all()
    assert found.inside.all()
    assert "0.95" in str(found)


@pytest.mark.parametrize(("scale", "sign"), [(0.8, -1), (1.2, 1)])
def test_coverage_of_wrong_posteriors_is_not(scale, sign):
    found = coverage(*posteriors(0.0, scale, dim=2))
    exact = 2 * stats.norm.cdf(scale * stats.norm.ppf(0.5 + found.levels / 2)) - 1
    assert (np.abs(found.pooled - exact) < 4 * found.pooled_error).all()
    assert (np.sign(found.pooled - found.levels) == sign).all()
    assert not coverage(*posteriors(0.0, scale, sets=3000)).inside.any()


def test_coverage_of_one_coordinate_and_of_tensors():
    truth, draws = posteriors(sets=50)
    flat = coverage(truth[:, 0], draws[:, :, 0], levels=[0.9])
    tensors = coverage(torch.as_tensor(truth), torch.as_tensor(draws), levels=[0.9])
    assert flat.covered == tensors.covered
    assert flat.width[0, 0] == pytest.approx(2 * 1.645, abs=0.2)


# -- TARP ------------------------------------------------------------------------------------------------------------


def test_tarp_false_alarms():
    p_values = np.array([tarp(*posteriors(dim=2, sets=100, seed=s), num_references=4).p_value for s in range(120)])
    assert (p_values < 0.01).mean() <= 0.01 + 4 * math.sqrt(0.01 / 120)
    assert (p_values < 0.5).mean() == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize("wrong", WRONG)
def test_tarp_catches_wrong_posteriors(wrong):
    assert all(not tarp(*posteriors(*WRONG[wrong], dim=4, seed=s)).passed for s in range(5))


def test_tarp_sees_what_marginals_do_not():
    truth, draws = posteriors(dim=2)
    rng = np.random.default_rng(5)
    shared, own = rng.normal(size=(500, 100, 1)), rng.normal(size=(500, 100, 2))
    centre = draws.mean(1, keepdims=True)
    centre = truth[:, None] - rng.normal(size=(500, 1, 2))  # the truth is independent on both axes, given the centre
    correlated = centre + math.sqrt(0.8) * shared + math.sqrt(0.2) * own  # draws are not
    assert coverage(truth, correlated).inside.all()
    found = tarp(truth, correlated)
    assert not found.passed
    assert "miscalibrated" in str(found)


def test_tarp_with_references_that_depend_on_the_data():
    truth, draws = posteriors(dim=2)
    references = np.random.default_rng(1).normal(size=(3, 500, 2))
    found = tarp(truth, draws, references=references)
    assert found.values.shape == (3, 500)
    assert found.passed


# -- latent coverage -------------------------------------------------------------------------------------------------


def affine(dim, extra=0.0):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(dim, dim, generator=generator, dtype=torch.double) + 2 * torch.eye(dim)
    noise = {"generator": generator, "dtype": torch.double}

    def decode(z):
        return z @ matrix.T + 1.0 + extra * torch.randn(z.shape, **noise)

    def encode(x):
        return torch.linalg.solve(matrix, (x - 1.0).T).T

    return encode, decode


@pytest.mark.parametrize("dim", [1, 3])
def test_latent_coverage_of_an_exact_map(dim):
    encode, decode = affine(dim)
    x = decode(torch.randn(5000, dim, generator=torch.Generator().manual_seed(1), dtype=torch.double))
    found = latent_coverage(encode, decode, x)
    assert found.mismatch < 1e-3  # a point may lie on the edge
    assert (np.abs(found.data - found.levels) < 4 * found.data_error).all()
    monte_carlo = np.sqrt(found.levels * (1 - found.levels) / 20_000)
    assert (np.abs(found.gaussian_before - found.levels) < 4 * monte_carlo).all()
    assert found.data_p_value > 1e-3
    assert "0.99" in str(found)


def test_latent_coverage_notices_a_poor_round_trip_and_wrong_data():
    encode, decode = affine(3, extra=0.3)
    x = affine(3)[1](1.1 * torch.randn(5000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double))
    found = latent_coverage(encode, decode, x)
    assert found.displacement > 0.05
    assert found.mismatch > 0.02
    assert found.data_mismatch > 0.05
    assert found.data_p_value < 1e-6


# -- pictures and errors ---------------------------------------------------------------------------------------------


def test_picture_has_one_panel_per_quantity():
    figure = ecdf_differences(np.random.default_rng(0).random((5, 100)), list("abcde"))
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles == list("abcde")


BAD = {
    "shapes": (lambda t, d: coverage(t[:10], d), "data sets, draws, coordinates"),
    "nan": (lambda t, d: coverage(t * np.nan, d), "truth contains 50 NaN"),
    "levels": (lambda t, d: coverage(t, d, levels=[0.9, 0.5]), "increasing"),
    "level of one": (lambda t, d: coverage(t, d, levels=[1.0]), "strictly between 0 and 1"),
    "prob": (lambda t, d: tarp(t, d, prob=1.0), "prob must be strictly between 0 and 1, got 1.0"),
    "references": (lambda t, d: tarp(t, d, references=np.zeros((2, 3))), r"shape \(R, 1\)"),
    "no references": (lambda t, d: tarp(t, d, num_references=0), "at least 1, got 0"),
    "encode": (lambda t, d: latent_coverage(lambda x: x[:, 0], lambda z: z, t), r"shape \(50, dim\)"),
    "no data": (lambda t, d: latent_coverage(lambda x: x, lambda z: z, t[:0]), "at least one row"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(*posteriors(sets=50))
