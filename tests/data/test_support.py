"""What may be said about the values of an event: every form of it, its chart, and its plain form."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

from ifpyro.data.circle import circular
from ifpyro.data.constrained import Inside
from ifpyro.data.parts import chart_of
from ifpyro.data.support import as_support, support_from_dict, support_to_dict

INF = math.inf
THREE = [constraints.positive, constraints.real, constraints.unit_interval]
UP_TO = torch.tensor([1.0, 2.0, 3.0])
SIMPLEX_FIRST = constraints.cat([constraints.simplex, constraints.positive], lengths=[2, 1])

# What a user may give for events (3,), and the support it has to become (None for real).
EQUIVALENT = {
    "independent": (constraints.independent(constraints.positive, 1), constraints.positive),
    "real vector": (constraints.real_vector, None),
    "half open": (constraints.half_open_interval(0, 1), constraints.interval(0.0, 1.0)),
    "numpy scalars": (constraints.interval(np.float32(0.5), np.int64(2)), constraints.interval(0.5, 2.0)),
    "numpy array": (
        constraints.interval(np.zeros(3, ">f4"), np.array([1, 2, 3])),
        constraints.interval(0.0, torch.tensor([1.0, 2.0, 3.0])),
    ),
    "no upper end": (constraints.interval(0, INF), constraints.positive),
    "no lower end": (constraints.interval(-INF, 2.0), constraints.less_than(2.0)),
    "no end": (constraints.interval(-INF, INF), None),
    "ends by column": (
        constraints.interval(torch.tensor([0.0, -INF, 0.0]), torch.tensor([INF, INF, 1.0])),
        ["positive", "real", "unit"],
    ),
    "of Normal": (dist.Normal(0.0, 1.0).support, None),
    "of a vector": (dist.Normal(torch.zeros(3), 1.0).to_event(1).support, None),
    "of Gamma": (dist.Gamma(2.0, 1.0).support, constraints.positive),
    "of LogNormal": (dist.LogNormal(0.0, 1.0).support, "positive"),
    "of Beta": (dist.Beta(2.0, 1.0).support, "unit"),
    "of Uniform": (
        dist.Uniform(-1.0, torch.tensor([1.0, 2.0, 3.0])).support,
        constraints.interval(-1, np.arange(1, 4)),
    ),
    "of Pareto": (dist.Pareto(2.0, 1.0).support, constraints.greater_than(2.0)),
    "of Dirichlet": (dist.Dirichlet(torch.ones(3)).support, "simplex"),
    "of a mixture": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(torch.ones(2), 1.0)).support,
        constraints.positive,
    ),
    "Pyro's own": (dist.constraints.softplus_positive, constraints.positive),
    "default dim": (constraints.stack(THREE), constraints.stack(THREE, -1)),
    "default dim of cat": (SIMPLEX_FIRST, constraints.cat([constraints.simplex, constraints.positive], -1, [2, 1])),
    "a list": (["positive", "real", constraints.interval(0, 1)], {0: constraints.positive, 2: "unit_interval"}),
    "a dictionary": ({-1: "unit", 0: "circular"}, ("circular", "real", "unit")),
    "a word": ("positive", constraints.positive),
    "all real": (["real"] * 3, None),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_every_form_of_a_support_is_understood(name):
    given, meant = (as_support(form, (3,)) for form in EQUIVALENT[name])
    assert (given is None) == (meant is None)
    free = torch.linspace(-2, 2, 18, dtype=torch.double).reshape(6, 3)
    ours, theirs = chart_of(given, (3,)), chart_of(meant, (3,))
    free = free[:, : ours.free_shape.numel()]
    x = ours.from_free(free)
    torch.testing.assert_close(x, theirs.from_free(free), rtol=0, atol=0)
    assert ours.inside(x).all()
    torch.testing.assert_close(ours.to_free(x), free, rtol=0, atol=1e-12)


def test_columns_have_names():
    table = pd.DataFrame({"mass": [1.0], "phase": [0.1], "rate": [0.2]})
    support = as_support({"rate": "unit", "phase": circular(24.0)}, (3,), list(table.columns))
    chart = chart_of(support, (3,))
    assert chart.from_free(torch.tensor([-40.0, -40.0, -40.0]))[0] == -40.0
    assert (chart.from_free(torch.full((3,), 3.0))[1:] > torch.tensor([11.9, 0.9])).all()


BAD = {
    "no such word": ("spere", r"one of the names real, positive, .* got 'spere'"),
    "no bijection": (constraints.positive_definite, "expects one of the torch constraints .* got .*PositiveDefinite"),
    "discrete": (dist.Poisson(1.0).support, "is discrete; .* add uniform noise of one unit"),
    "boolean": (constraints.boolean, "is discrete"),
    "the class": (constraints.interval, r"the class interval itself"),
    "of a class": (dist.Uniform.support, r"pass the \.support of an instance"),
    "a distribution": (dist.Gamma(1.0, 1.0), r"the distribution Gamma.*pass its \.support"),
    "turned round": (constraints.interval(2, 1), "lower bound below the upper one, got Interval"),
    "empty": (constraints.interval(1.0, torch.tensor([2.0, 1.0, 2.0])), "lower bound below the upper one"),
    "beyond infinity": (constraints.greater_than(INF), "lower bound below the upper one"),
    "NaN": (constraints.interval(0, math.nan), "upper_bound expects numbers, got NaN"),
    "text": (constraints.greater_than("0"), "lower_bound expects a number"),
    "bounds of another event": (constraints.interval(0, torch.ones(4)), r"events of shape \(3,\), got .* \(4,\)"),
    "bounds that do not fit": (constraints.interval(torch.zeros(2), torch.ones(3)), "bounds that broadcast"),
    "too few columns": (["positive"], "3 of them, got 1"),
    "no such column": ({"mass": "unit"}, r"column indices 0 to 2 \(the data have no names\) as keys, got 'mass'"),
    "no such index": ({3: "unit"}, "as keys, got 3"),
    "lengths": (constraints.cat([constraints.simplex, constraints.positive]), "3 entries in the sum .* got 2"),
    "too many": (constraints.stack([constraints.real] * 4), "3 entries along axis -1 .* got 4"),
    "no such axis": (constraints.stack([constraints.real] * 3, 1), r"dim among the 1 axes of one event .* got 1"),
    "a simplex of one": (constraints.cat([constraints.simplex, constraints.real], lengths=[1, 2]), "two entries"),
    "a number": (3, "got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_supports_that_cannot_be(name):
    support, message = BAD[name]
    with pytest.raises(ValueError, match=f"(?s)support.*{message}"):
        as_support(support, (3,))


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match=r"the columns \['a', 'b'\] as keys, got 'c'"):
        as_support({"c": "unit"}, (2,), ["a", "b"])


CHARTS = {
    "positive": (constraints.positive, (2, 3)),
    "interval": (constraints.interval(-1.0, 3.0), (3,)),
    "less than": (constraints.less_than(-2.0), (3,)),
    "by column": (["positive", "unit", "real", constraints.less_than(1.0)], (4,)),
    "simplex": ("simplex", (4,)),
    "rows of simplices": ("simplex", (2, 3)),
    "circle": ("circular", (2,)),
    "mixed": ([circular(24.0, 3.0), "positive", "real", circular(1.0)], (4,)),
    "rows of columns": (["circular", "unit"], (3, 2)),
    "simplex and more": (SIMPLEX_FIRST, (3,)),
    "simplex below a row": (constraints.cat([constraints.simplex, constraints.real], -2, [1, 1]), (2, 3)),
    "stacked simplices": (constraints.stack([constraints.simplex, constraints.simplex], 0), (2, 3)),
    "stacked side by side": (constraints.stack([constraints.simplex, constraints.simplex], -1), (3, 2)),
    "simplex beside positives": (constraints.stack([constraints.simplex, constraints.positive], 0), (2, 3)),
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_bijections_with_the_log_determinant_of_autograd(name):
    given, event = CHARTS[name]
    chart = chart_of(as_support(given, event), event).double()
    dim = chart.free_shape.numel()
    free = torch.randn(5, 2, dim, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x, log_det = chart.constrain(free, True)
    assert x.shape == (5, 2, *event)
    assert log_det.shape == (5, 2)
    assert chart.inside(x).all()
    again, same = chart.unconstrain(x, True)
    torch.testing.assert_close(again, free, rtol=0, atol=1e-10)
    torch.testing.assert_close(same, log_det, rtol=0, atol=1e-10)
    jacobian = torch.func.jacrev(lambda f: chart.constrain(f, False)[0].flatten())(free[0, 0])
    if dim < math.prod(event):  # of a simplex all but the last coordinate count
        jacobian = jacobian[[i for i in range(len(jacobian)) if not _last_of_a_simplex(name, i, event)]]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0, 0], rtol=0, atol=1e-9)
    batched = torch.func.vmap(lambda f: chart.constrain(f, False)[0])(free)
    torch.testing.assert_close(batched, x, rtol=0, atol=1e-14)


def _last_of_a_simplex(name, index, event):
    place = [int(i) for i in np.unravel_index(index, event)]
    return {
        "simplex": place == [3],
        "rows of simplices": place[-1] == 2,
        "simplex and more": place == [1],
        "simplex below a row": place == [0, 2],
        "stacked simplices": place[-1] == 2,
        "stacked side by side": place[0] == 2,
        "simplex beside positives": place == [0, 2],
    }[name]


@pytest.mark.parametrize("name", ["positive", "interval", "less than", "simplex", "rows of simplices"])
def test_charts_of_torchs_constraints_are_torchs_bijections(name):
    given, event = CHARTS[name]
    support = as_support(given, event)
    chart = chart_of(support, event).double()
    free = torch.randn(7, *chart.free_shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    torch.testing.assert_close(chart.from_free(free), biject_to(support)(free), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHARTS)
def test_values_that_rounding_takes_to_a_bound_stay_inside(name, dtype):
    given, event = CHARTS[name]
    chart = chart_of(as_support(given, event), event).to(dtype)
    free = 60 * torch.randn(200, *chart.free_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert chart.inside(chart.from_free(free)).all()


def test_a_support_for_pyro_has_its_transform():
    support = as_support(["positive", "circular", "unit"], (3,))
    constraint = Inside(chart_of(support, (3,)).float())
    transform = biject_to(constraint)
    free = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x = transform(free)
    assert constraint.check(x).tolist() == [True] * 4
    assert constraint.check(-x.abs()).tolist() == [False] * 4
    assert constraint.event_dim == 1
    assert transform.log_abs_det_jacobian(free, x).shape == (4,)
    torch.testing.assert_close(transform.inv(x), free, rtol=0, atol=1e-4)
    assert "circular" in str(constraint)


# -- exact bounds ---------------------------------------------------------------------------------------------------

SECONDS = [1126259462.3, 1126259462.5]  # of which single precision keeps ...456 alone


def test_bounds_are_exact_whatever_the_dtype_in_between():
    exact = chart_of(as_support(constraints.interval(np.array(SECONDS[:1]), np.array(SECONDS[1:])), (1,)), (1,))
    assert exact.float().lower.dtype == torch.float32
    assert exact.double().lower.tolist() == SECONDS[:1]
    assert exact.double().upper.tolist() == SECONDS[1:]
    assert copy.deepcopy(exact).float().double().upper.tolist() == SECONDS[1:]
    assert not exact.state_dict()


@pytest.mark.parametrize("name", CHARTS)
def test_the_plain_form_is_exact_and_strict_json(name):
    given, event = CHARTS[name]
    support = as_support(given, event)
    plain = json.loads(json.dumps(support_to_dict(support), allow_nan=False))
    again = support_from_dict(plain)
    assert support_to_dict(again) == plain
    ours, theirs = chart_of(support, event).double(), chart_of(again, event).double()
    free = torch.randn(4, *ours.free_shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert torch.equal(ours.from_free(free), theirs.from_free(free))


def test_infinite_bounds_by_column_have_a_plain_form():
    support = as_support(constraints.interval(torch.tensor([0.0, -INF]), torch.tensor([INF, 0.1])), (2,))
    plain = json.loads(json.dumps(support_to_dict(support), allow_nan=False))
    again = support_from_dict(plain)
    assert torch.equal(again.lower_bound, support.lower_bound)
    assert torch.equal(again.upper_bound, support.upper_bound)


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "sphere"},
        {"kind": "interval", "lower_bound": 0.0},
        {"kind": "interval", "lower_bound": [0.0, "x"], "upper_bound": 1.0},
        {"kind": "interval", "lower_bound": None, "upper_bound": 1.0},
        {"kind": "stack", "dim": 0, "parts": 3},
        {"kind": "cat", "dim": 0, "parts": [{"kind": "real"}], "lengths": ["a"]},
        {"kind": ["real"]},
        ["real"],
        7,
    ],
    ids=str,
)
def test_damaged_plain_forms_are_refused(data):
    with pytest.raises(ValueError, match="support"):
        support_from_dict(data)
