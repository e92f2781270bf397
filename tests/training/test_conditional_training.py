"""Training on pairs: regression before the first step, and what follows."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import ifpyro
from conditional_zoo import log_conditional, pairs
from ifpyro.flow.axes.regression import ridge
from ifpyro.training.conditional import noise_floor


def linear_pairs(count, seed=0, features=3):
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(count, features, generator=generator)
    matrix = torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]])[:features]
    noise = torch.randn(count, 2, generator=generator) @ torch.tensor([[0.5, 0.2], [0.0, 0.3]])
    return c @ matrix + noise + 4, c


def fit(x, c, **options):
    return ifpyro.fit(x, condition=c, **{"seed": 0, "progress": False, "max_steps": 0, **options})


def test_ridge_leaves_rows_out_as_refitting_would():
    x, c = linear_pairs(40)
    c = torch.cat([c, torch.randn(40, 20, generator=torch.Generator().manual_seed(1))], 1)
    fitted = ridge(c, x)
    assert fitted.penalty > 0
    f, y = c.double(), x.double()
    for row in (0, 17):
        keep = torch.arange(40) != row
        # The penalised fit of all rows but one, with the same penalty and its own intercept.
        centre, mean = f[keep].mean(0), y[keep].mean(0)
        a = f[keep] - centre
        b = torch.linalg.solve(a.T @ a + 40 * fitted.penalty * torch.eye(23).double(), a.T @ (y[keep] - mean))
        left_out = y[row] - mean - (f[row] - centre) @ b
        torch.testing.assert_close(fitted.residuals[row].double(), left_out, rtol=1e-4, atol=1e-5)


def test_ridge_drops_features_that_say_nothing():
    generator = torch.Generator().manual_seed(0)
    fitted = ridge(torch.randn(30, 25, generator=generator), torch.randn(30, 2, generator=generator))
    assert fitted.penalty >= 1.0
    assert float(fitted.residuals.std()) < 1.3


def test_untrained_is_regression_with_the_covariance_of_its_residuals():
    x, c = linear_pairs(10_000)
    held_x, held_c = linear_pairs(2_000, seed=5)
    matrix = torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]]).double()
    factor = torch.tensor([[0.5, 0.2], [0.0, 0.3]]).double()
    exact = torch.distributions.MultivariateNormal(held_c.double() @ matrix + 4, factor.T @ factor)
    gap = exact.log_prob(held_x.double()) - fit(x, c).log_prob(held_x, held_c).double()
    assert abs(float(gap.mean())) < 0.01


def test_residuals_are_as_wide_as_those_of_new_rows_where_features_are_many():
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(90, 40, generator=generator)
    x = c @ (torch.randn(40, 2, generator=generator) / 3) + 0.5 * torch.randn(90, 2, generator=generator)
    flow = fit(x[:60], c[:60])
    power = flow.encode(x[60:], c[60:]).square().mean()
    assert 0.6 < float(power) < 1.6  # fitted residuals would give 3 and more


def test_training_approaches_the_exact_conditional_density():
    x, c = pairs(6_000)
    held_x, held_c = pairs(500, seed=9)
    exact = log_conditional(held_x, held_c)
    untrained = fit(x, c)
    trained = fit(x, c, max_steps=150, network={"width": 48, "blocks": 2})
    gaps = [float((exact - flow.log_prob(held_x, held_c)).mean()) for flow in (untrained, trained)]
    assert gaps[0] > 0.5
    assert -0.02 < gaps[1] < 0.25
    report = trained.report["training"]
    assert report["validation_loss"] < report["validation_loss_gaussian"]
    assert 0.2 < report["explained"] < 0.5


def test_same_seed_same_flow_and_resumed_training(tmp_path):
    x, c = pairs(600)
    flows = [fit(x, c, max_steps=30) for _ in range(2)]
    assert torch.equal(*(flow.log_prob(x, c) for flow in flows))
    file = tmp_path / "checkpoint"
    fit(x, c, max_steps=30, checkpoint=file)
    assert torch.equal(fit(x, c, max_steps=30, checkpoint=file).log_prob(x, c), flows[0].log_prob(x, c))


def test_labels_are_learnt_apart(tmp_path):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 3, (1_500,), generator=generator) * 10
    x = 0.3 * torch.randn(1_500, 2, generator=generator)
    x = x + torch.stack([torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])])[classes // 10]
    flow = fit(x, classes, labels=True)
    draws = flow.sample(torch.tensor([0, 20]), 400, seed=0)
    torch.testing.assert_close(draws.mean(0), torch.tensor([[-2.0, 0.0], [0.0, 3.0]]), atol=0.1, rtol=0)
    flow.save(tmp_path / "flow.safetensors")
    loaded = ifpyro.load(tmp_path / "flow.safetensors")
    assert torch.equal(loaded.sample(torch.tensor(10), 5, seed=0), flow.sample(torch.tensor(10), 5, seed=0))
    with pytest.raises(ValueError, match="labels that training has seen"):
        flow.given(torch.tensor(5))


def test_missing_entries_widen_what_is_known():
    x, c = linear_pairs(5_000)
    c[::2, 2] = torch.nan
    flow = fit(x, c, max_steps=200, network={"width": 32, "blocks": 2})
    seen, missing = (flow.given(torch.tensor([0.0, 0.0, v])).sample(500, seed=0) for v in (0.0, torch.nan))
    assert float(missing[:, 1].std()) > 2 * float(seen[:, 1].std())


def test_sets_are_read_element_by_element(tmp_path):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2_000, 1, generator=generator)
    c = theta[:, None] + torch.randn(2_000, 8, 1, generator=generator)
    c[::2, 4:] = torch.nan
    flow = fit(theta, c, sets=True, max_steps=80, network={"width": 32})
    mean, count = c[:, :, 0].nanmean(1), (~c[:, :, 0].isnan()).sum(1)
    exact = torch.distributions.Normal(mean * count / (1 + count), (1 / (1 + count)).sqrt()).log_prob(theta[:, 0])
    assert float((exact - flow.log_prob(theta, c)).mean()) < 0.06
    flow.save(tmp_path / "flow.safetensors")
    loaded = ifpyro.load(tmp_path / "flow.safetensors")
    turned = c[:5, [3, 2, 1, 0, 4, 5, 6, 7]]
    torch.testing.assert_close(loaded.log_prob(theta[:5], turned), flow.log_prob(theta[:5], c[:5]), atol=1e-4, rtol=0)


def test_any_module_reads_conditions(tmp_path):
    x, c = pairs(500)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, c):
            return torch.tanh(self.layer(c.flatten(1)))

    c = torch.stack([c, c**2], 1)
    flow = fit(x, c, condition_network=Network(), max_steps=20)
    assert flow.condition_shape == (2, 2)
    flow.save(tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match="module of its user"):
        ifpyro.load(tmp_path / "flow.safetensors")
    loaded = ifpyro.load(tmp_path / "flow.safetensors", condition_network=Network())
    assert torch.equal(loaded.log_prob(x[:9], c[:9]), flow.log_prob(x[:9], c[:9]))
    with pytest.raises(ValueError, match=r"condition_network expects to map conditions \(n, 2, 2\)"):
        fit(x, c, condition_network=nn.Identity())
    with pytest.raises(TypeError, match="torch module"):
        fit(x, c, condition_network=3)


def test_support_and_images():
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(400, generator=generator)
    x = torch.rand(400, 1, 3, 3, generator=generator) * 0.2 + 0.7 * c[:, None, None, None] + 0.05
    flow = fit(x, c, support=constraints.unit_interval)
    draws = flow.given(torch.tensor([0.1, 0.9])).sample(50, seed=0)
    assert draws.shape == (50, 2, 1, 3, 3)
    assert bool(((draws > 0) & (draws < 1)).all())
    assert float(draws[:, 1].mean() - draws[:, 0].mean()) == pytest.approx(0.56, abs=0.06)


def test_whole_conditions_are_held_out_where_few_are_distinct():
    x, _ = pairs(1_000)
    patients = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))[torch.arange(1_000) % 20]
    flow = fit(x, patients)
    assert flow.report["training"]["validation_rows"] == 100  # two patients of fifty rows
    rows = fit(x, torch.arange(1_000) % 3, labels=True)
    assert rows.report["training"]["validation_rows"] == 100


def test_held_out_pairs_may_be_given():
    x, c = pairs(500)
    flow = fit(x[:400], c[:400], validation=(x[400:], c[400:]))
    assert flow.report["training"]["validation_rows"] == 100
    with pytest.raises(ValueError, match="pair"):
        fit(x[:400], c[:400], validation=x[400:])
    with pytest.raises(ValueError, match="one row for each of the 100 samples"):
        fit(x[:400], c[:400], validation=(x[400:], c[:300]))


def test_narrow_conditionals_get_a_lower_noise_floor():
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(4_000, 1, generator=generator) * 6
    wide = torch.randn(4_000, 1, generator=generator)
    assert noise_floor(wide, c) == 0.01
    narrow = torch.sin(3 * c) + 0.017 * wide
    assert 0.002 < noise_floor(narrow / narrow.std(), c) < 0.01
    assert fit(narrow, c).schedule.start < 0.01
    assert fit(narrow, c, schedule=ifpyro.Schedule.details_first()).schedule.start == 0.01


def test_bad_pairs_are_refused():
    x, c = pairs(100)
    with pytest.raises(ValueError, match="one row for each of the 100 samples, got 99"):
        fit(x, c[:99])
    with pytest.raises(ValueError, match="constant"):
        fit(x, torch.ones(100, 1))
    with pytest.raises(TypeError, match="labels or counts"):
        fit(x, torch.arange(100))
    with pytest.raises(ValueError, match="sets=True expects"):
        fit(x, c, sets=True)
    with pytest.raises(ValueError, match="none was given"):
        ifpyro.fit(x, labels=True)
    with pytest.raises(TypeError, match="samples in memory"):
        fit(torch.utils.data.TensorDataset(x), c)
    assert np.isfinite(math.log(fit(x, c.numpy()).report["training"]["rows"]))
