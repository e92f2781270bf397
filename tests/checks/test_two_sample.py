import numpy as np
import pytest
from scipy import stats

from ifpyro.checks.two_sample import (
    axes_normal,
    axes_power,
    classifier,
    energy,
    mean_above,
    radial_normal,
    sliced_wasserstein,
    total_power,
)

TESTS = {
    "energy": lambda x, y, rng: energy(x, y, rng, 99),
    "sliced": lambda x, y, rng: sliced_wasserstein(x, y, rng, 99),
    "classifier": classifier,
    "axes, shape": lambda x, y, rng: axes_normal(x),
    "axes, width": lambda x, y, rng: axes_power(x),
    "width": lambda x, y, rng: total_power(x),
    "radius": lambda x, y, rng: radial_normal(x),
    "mean": lambda x, y, rng: mean_above(x[:, 0]),
}


def pair(seed, rows=60, dim=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, dim)), rng.standard_normal((2 * rows, dim)), rng


@pytest.mark.parametrize("name", TESTS)
def test_p_values_are_right_under_no_difference(name):
    times = 24 if name == "classifier" else 200
    p = np.array([TESTS[name](*pair(seed)).p for seed in range(times)])
    for level in (0.1, 0.5):
        assert np.sum(p <= level) <= stats.binom.isf(1e-4, times, level), level
    if name != "classifier":  # Bonferroni over its two halves makes it careful
        assert np.sum(p <= 0.5) >= stats.binom.ppf(1e-4, times, 0.5 if "axes" not in name else 0.35)


SHIFTED = ["energy", "sliced", "classifier", "axes, shape", "mean"]


@pytest.mark.parametrize("name", SHIFTED)
def test_a_shift_is_found(name):
    x, y, rng = pair(0, rows=200)
    assert TESTS[name](x + 0.6, y, rng).p <= 0.01


@pytest.mark.parametrize("name", ["axes, width", "width", "radius"])
@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_width_is_found(name, factor):
    x, y, rng = pair(0, rows=300)
    found = TESTS[name](factor * x, y, rng)
    assert found.p < 1e-3
    if "width" in name:
        assert np.sign(found.effect) == np.sign(factor - 1)


def test_worst_axis_is_named():
    x = pair(0)[0]
    x[:, 1] += 1.0
    assert axes_normal(x).worst == axes_power(x).worst == 1


def test_energy_is_the_published_one():
    x, y, rng = pair(1, rows=50, dim=1)
    # Scipy's energy distance is the square root of the V-statistic; at one point each the U-statistic has no pairs, so
    # compare after removing the pairs of a point with itself by hand.
    v = stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    cross = np.abs(x - y.T).mean()
    within = [np.abs(a - a.T).mean() for a in (x, y)]
    expected = v + within[0] + within[1] - within[0] * 50 / 49 - within[1] * 100 / 99
    assert energy(x, y, rng, 9).effect == pytest.approx(expected / (2 * cross), abs=1e-6)


def test_energy_of_shifted_gaussians_is_a_quarter_of_the_square():
    rng = np.random.default_rng(0)
    for dim in (1, 20):
        x, y = rng.standard_normal((2, 1500, dim))
        assert energy(x + 0.5, y, rng, 1).effect == pytest.approx(0.5**2 / 4, rel=0.15)


def test_sliced_distance_is_scipys_in_one_dimension():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((70, 1)) + 2.0, rng.standard_normal((90, 1))
    spread = np.concatenate([x, y]).std()
    found = sliced_wasserstein(x, y, rng, 400)
    null = [
        stats.wasserstein_distance(order[:70], order[70:])
        for order in (rng.permutation(np.concatenate([x, y])[:, 0]) for _ in range(400))
    ]
    expected = (stats.wasserstein_distance(x[:, 0], y[:, 0]) - np.mean(null)) / spread
    assert found.effect == pytest.approx(expected, abs=6 * np.std(null) / spread / np.sqrt(200))


def test_classifier_reaches_the_best_accuracy():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 600, 2))
    best = stats.norm.cdf(1.0)  # two Gaussians two standard deviations apart along the diagonal
    found = classifier(x + np.sqrt(2), y, rng)
    assert found.effect == pytest.approx(best, abs=4 * np.sqrt(best * (1 - best) / 1200) + 0.01)


def test_classifier_sees_a_width_spread_over_many_axes():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 400, 40))
    assert classifier(1.15 * x, y, rng).p < 1e-4


@pytest.mark.parametrize("name", TESTS)
def test_equal_seeds_give_equal_answers(name):
    first, second = (TESTS[name](*pair(5)) for _ in range(2))
    assert first == second


def test_mean_with_an_error_of_its_own():
    x = np.random.default_rng(0).standard_normal(100) + 0.5
    alone, other = mean_above(x), mean_above(x, 0.0, 0.2)
    assert alone.p == pytest.approx(stats.ttest_1samp(x, 0, alternative="greater").pvalue, rel=1e-9)
    assert other.p > alone.p
    assert mean_above(np.zeros(10)).p == 1.0
