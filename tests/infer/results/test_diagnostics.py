"""R-hat, effective sample sizes and tail shapes: those of ArviZ, and what chance alone explains."""

import numpy as np
import pytest
import torch

from ifpyro.infer.results import diagnostics
from ifpyro.infer.results.diagnostics import bulk_ess, convergence, convergence_figures, pareto_k, screened


def chains(*shape, correlation=0.0, seed=0):
    """Stationary first-order autoregressions of variance one along axis 1."""
    x = np.random.default_rng(seed).standard_normal(shape)
    for i in range(1, shape[1]):
        x[:, i] = correlation * x[:, i - 1] + (1 - correlation**2) ** 0.5 * x[:, i]
    return x


@pytest.mark.parametrize("shape", [(4, 100, 3), (3, 51, 2), (8, 13, 2), (4, 8, 3), (6, 10, 2), (2, 400, 2)])
@pytest.mark.parametrize("correlation", [0.0, 0.9, -0.7])
def test_figures_are_those_of_arviz(shape, correlation):
    import arviz

    x = chains(*shape, correlation=correlation)
    x[0] += 0.3
    figures = convergence_figures(x)
    for k in range(shape[2]):
        column = x[:, :, k]
        tail = arviz.ess(column, method="tail", prob=(0.05, 0.95))
        theirs = [arviz.rhat(column), arviz.ess(column, method="bulk"), tail]
        np.testing.assert_allclose([figures.r_hat[k], figures.bulk[k], figures.tail[k]], theirs, rtol=1e-9)


def test_ties_share_their_rank():
    import arviz

    x = np.round(chains(4, 60, 1, correlation=0.8), 1)
    figures = convergence_figures(x)
    assert figures.r_hat[0] == pytest.approx(arviz.rhat(x[:, :, 0]), rel=1e-9)
    assert figures.bulk[0] == pytest.approx(arviz.ess(x[:, :, 0], method="bulk"), rel=1e-9)


def test_shapes_and_what_has_no_figures(monkeypatch):
    x = chains(4, 40, 6)
    x[..., 1] = 7.0
    x[0, 0, 2] = np.inf
    monkeypatch.setattr(diagnostics, "CHUNK", 200)  # one quantity at a time
    figures = convergence_figures(x)
    assert np.isnan(figures.r_hat[[1, 2]]).all()
    assert figures.bulk[1] == 160
    assert np.isnan(figures.bulk[2])
    assert np.isfinite(figures.r_hat[[0, 3, 4, 5]]).all()
    found = convergence({"x": torch.from_numpy(x).reshape(4, 40, 2, 3)})["x"]
    assert found["r_hat"].shape == (2, 3)
    np.testing.assert_array_equal(found["n_eff"].flatten(), figures.bulk)
    np.testing.assert_array_equal(bulk_ess(x[..., 3:]), figures.bulk[3:])
    assert np.isnan(convergence_figures(x[:, :5])).all()
    assert bulk_ess(x[..., :0]).shape == (0,)


@pytest.mark.parametrize(("shape", "correlation"), [((32, 40), 0.0), ((16, 100), 0.5), ((4, 400), 0.8), ((8, 32), 0.0)])
def test_agreeing_chains_hardly_ever_exceed_what_is_explained(shape, correlation):
    """Their R-hat is often above 1.01, since they are short; 100 runs of four quantities, one run in 50 at most."""
    runs = 100
    long = chains(shape[0], shape[1] + 30, 4 * runs, correlation=correlation)[:, 30:]
    figures = convergence_figures(long, 0.02, quantities=4)
    above = (figures.r_hat > figures.explained).reshape(runs, 4).any(1)
    assert above.sum() <= 2 + 3 * 2**0.5


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_chains_that_sit_in_different_places_are_not_explained(correlation):
    x = chains(16, 100, 50, correlation=correlation)
    x[:4] += 1.5
    figures = convergence_figures(x)
    assert (figures.r_hat > np.maximum(1.01, figures.explained)).all()


def test_of_very_many_quantities_the_worst_are_kept(monkeypatch):
    x = chains(4, 50, 200)
    x[:2, :, 17] += 1.0
    x[:, :, 121] = chains(4, 50, 1, correlation=0.95, seed=1)[..., 0]
    assert len(screened(x)) == 200
    monkeypatch.setattr(diagnostics, "MOST", 200 * 10)
    kept = screened(x)
    assert len(kept) == 10
    assert {17, 121} <= set(kept.tolist())


@pytest.mark.parametrize("shape", [0.3, 1.5])
def test_pareto_k_is_the_shape_of_the_tail(shape):
    """``exp(shape e)`` with ``e`` exponential follows a Pareto distribution of exactly this shape."""
    e = np.random.default_rng(0).exponential(size=20_000)
    assert pareto_k(torch.from_numpy(shape * e)) == pytest.approx(shape, abs=0.15)


@pytest.mark.parametrize("count", [30, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_pareto_k_is_that_of_arviz(count, scale):
    import arviz

    x = scale * np.random.default_rng(0).standard_normal(count)
    if hasattr(arviz, "psislw"):
        theirs = float(arviz.psislw(x)[1])
    else:
        from arviz_stats.base import array_stats

        theirs = float(array_stats.psislw(-x)[1])
    close = 1e-6 if hasattr(arviz, "psislw") else 0.03  # newer ones take a tail of another length
    assert pareto_k(torch.from_numpy(x)) == pytest.approx(theirs, rel=close, abs=close)


def test_weights_without_a_tail():
    assert np.isnan(pareto_k(torch.zeros(100)))
    assert np.isnan(pareto_k(torch.randn(10)))
    weights = torch.cat([torch.full((50,), -torch.inf), torch.zeros(3)])
    assert np.isnan(pareto_k(weights))
