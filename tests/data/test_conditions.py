"""Conditions: their features, and what is refused."""

import warnings

import numpy as np
import pytest
import torch

from ifpyro.data.conditions import Conditions, as_conditions


def numbers(count=200):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1]) + 5


def test_columns_are_standardised():
    c = numbers()
    features = Conditions.of(c)(c)
    torch.testing.assert_close(features.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(3), atol=1e-5, rtol=0)


def test_missing_entries_become_zero_and_are_told():
    c = numbers()
    c[::4, 1] = torch.nan
    conditions = Conditions.of(c)
    features = conditions(c)
    assert conditions.width == features.shape[1] == 4
    assert features.isfinite().all()
    assert (features[::4, 1] == 0).all()
    assert len(features[:, 3].unique()) == 2
    assert float(features[:, 3].mean()) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(conditions.inputs(c)[:, [0, 2]], features[:, [0, 2]])
    again = Conditions.from_spec(conditions.spec())
    again.load_state_dict(conditions.state_dict())
    torch.testing.assert_close(again(c), features)
    with pytest.raises(ValueError, match=r"missing entries \(NaN\) in columns \[0\]"):
        conditions.check(torch.tensor([torch.nan, 1.0, 1.0]), torch.float, torch.device("cpu"))


def test_labels_become_one_column_each():
    c = as_conditions(np.array([3, 7, 7, 9] * 10), 40, True, torch.float)
    conditions = Conditions.of(c, labels=True)
    assert conditions.shape == ()
    features = conditions(c)
    assert features.shape == (40, 3)
    torch.testing.assert_close(features.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    assert (features.argmax(1) == torch.tensor([0, 1, 1, 2] * 10)).all()
    check = conditions.check
    assert check(torch.tensor(7), torch.float, torch.device("cpu")).shape == ()
    with pytest.raises(ValueError, match=r"labels that training has seen, \[3, 7, 9\], got \[8.0\]"):
        check(torch.tensor([3, 8]), torch.float, torch.device("cpu"))
    with pytest.raises(TypeError, match="labels as integers"):
        check(torch.tensor([3.0]), torch.float, torch.device("cpu"))


def test_some_columns_may_be_labels():
    c = numbers()
    c[:, 1] = torch.arange(200) % 4
    conditions = Conditions.of(c, labels=[1])
    assert conditions.width == 2 + 4
    assert conditions.inputs(c).shape == c.shape
    with pytest.raises(TypeError, match="whole numbers"):
        Conditions.of(c, labels=[0])
    with pytest.raises(ValueError, match="columns of the condition"):
        Conditions.of(c, labels=[5])


def test_sets_do_not_know_order_or_absent_elements():
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(100, 6, 2, generator=generator)
    c[:50, 4:] = torch.nan
    conditions = Conditions.of(c, sets=True)
    features = conditions(c)
    assert features.shape == (100, 5)
    assert features.isfinite().all()
    order = torch.randperm(6, generator=generator)
    torch.testing.assert_close(conditions(c[:, order]), features, atol=1e-5, rtol=0)


def test_far_conditions_warn_with_their_distance():
    c = numbers()
    conditions = Conditions.of(c)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditions.check(c, torch.float, torch.device("cpu"))
    far = c[:3].clone()
    far[1, 2] = conditions.high[2] + 2 * (conditions.high[2] - conditions.low[2])
    with pytest.warns(UserWarning, match="condition 1 is far outside .* column 2 lies 2 widths"):
        conditions.check(far, torch.float, torch.device("cpu"))


def test_what_is_no_condition_is_refused():
    c = numbers()
    c[:, 1] = 2.0
    with pytest.raises(ValueError, match=r"columns \[1\] are constant"):
        Conditions.of(c)
    with pytest.raises(ValueError, match=r"columns \[0\] are constant"):
        Conditions.of(torch.zeros(10, 1), labels=True)
    infinite = numbers()
    infinite[5, 0] = torch.inf
    with pytest.raises(ValueError, match=r"rows \[5\]"):
        Conditions.of(infinite)
    with pytest.raises(ValueError, match="one row for each of the 10 samples, got 9"):
        as_conditions(np.zeros((9, 2)), 10, None, torch.float)
    with pytest.raises(TypeError, match="labels or counts"):
        as_conditions(np.arange(10), 10, None, torch.float)
    with pytest.raises(TypeError, match="labels=True expects integers"):
        as_conditions(np.zeros(10), 10, True, torch.float)
    with pytest.raises(TypeError, match="array of numbers"):
        as_conditions(["a"] * 10, 10, None, torch.float)
