"""Checks of conditional flows: the exact one passes, one that is off for some conditions does not."""

import pytest
import torch

import ifpyro
from conditional_zoo import conditional_flow, pairs
from ifpyro import Grid


def shifted_by_condition(size):
    """The exact flow, but for a mean that moves with the condition by ``size`` standard deviations."""
    flow = conditional_flow(torch.float, grid=Grid(6))
    flow.coefficient[0, 0] += size * 1.0
    return flow


@pytest.fixture(scope="module")
def held_out():
    return pairs(500, seed=11)


def test_the_exact_flow_passes(held_out):
    x, c = held_out
    result = ifpyro.check(conditional_flow(torch.float, grid=Grid(6)), x, condition=c)
    assert result.passed, str(result)
    assert result["below regression"].value < 0


def test_a_mean_that_moves_with_the_condition_is_found(held_out):
    x, c = held_out
    result = ifpyro.check(shifted_by_condition(0.3), x, condition=c, store=False)
    assert not result.passed
    assert "fail" in (result["latent and condition"].verdict, result["latent in groups"].verdict)
    assert "feature 0" in result["latent and condition"].note


def test_a_flow_that_ignores_its_condition_is_found(held_out):
    x, c = held_out
    flow = conditional_flow(torch.float, grid=Grid(6))
    result = ifpyro.check(flow, x, condition=c[torch.randperm(500, generator=torch.Generator().manual_seed(0))])
    assert not result.passed
    assert result["latent and condition"].verdict == "fail"


def test_pairs_are_asked_for(held_out):
    x, c = held_out
    flow = conditional_flow(torch.float, grid=Grid(6))
    with pytest.raises(ValueError, match="checked on pairs"):
        ifpyro.check(flow, x)
    with pytest.raises(ValueError, match="checked on pairs"):
        ifpyro.check(flow.given(c[0]), x, condition=c)
    with pytest.raises(ValueError, match="with a condition each"):
        ifpyro.check(flow, x, condition=c[:5])
