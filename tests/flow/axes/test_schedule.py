import math

import pytest
import torch

from flows_zoo import SCALES, SCHEDULES
from ifpyro import Schedule
from ifpyro.flow.axes.schedule import Angles

TIMES = torch.linspace(0, 1, 101, dtype=torch.double)
SHARED_CLOCK = [name for name in SCHEDULES if name != "exponential"]


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param](len(SCALES))


def test_angles_increase_inside_the_quadrant(schedule):
    theta = schedule.angles(SCALES)(TIMES)
    assert theta.shape == (101, len(SCALES))
    assert theta.dtype == torch.double
    assert (theta.diff(dim=0) > 0).all()
    assert theta.min() > 0
    assert theta.max() < math.pi / 2


def test_speed_is_the_derivative_of_the_angle(schedule):
    angles = schedule.angles(SCALES)
    inner, h = TIMES[1:-1], 1e-5
    slope = (angles(inner + h) - angles(inner - h)) / (2 * h)
    torch.testing.assert_close(angles.speed(inner), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", SHARED_CLOCK)
def test_mean_angular_speed_is_constant(name):
    angles = SCHEDULES[name](len(SCALES)).angles(SCALES)
    ends = angles(torch.tensor([0.0, 1.0]))
    expected = (ends[1] - ends[0]).mean()
    torch.testing.assert_close(angles.speed(TIMES).mean(-1), expected.expand(101), rtol=1e-12, atol=0)
    line = ends[0].mean() + TIMES * expected
    torch.testing.assert_close(angles(TIMES).mean(-1), line, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SHARED_CLOCK)
def test_noise_floor_and_end_are_what_was_asked_for(name):
    schedule = SCHEDULES[name](len(SCALES))
    ends = schedule.angles(SCALES)(torch.tensor([0.0, 1.0]))
    assert float(ends[0].max()) == pytest.approx(schedule.start, rel=1e-12)
    assert float(ends[1].min()) == pytest.approx(schedule.end, rel=1e-12)


def test_any_shape_of_times(schedule):
    angles = schedule.angles(SCALES)
    t = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    for function in (angles, angles.speed):
        assert function(t).shape == (2, 3, len(SCALES))
        assert torch.equal(function(t)[1, 2], function(t[1, 2]))


def test_the_papers_formula_in_the_papers_time():
    gamma0, rho, g, T = 2e-3, 0.7, (1.0, 1.0, 0.3, -0.2, 0.0, 0.5), 5.0
    angles = Schedule.exponential(gamma0, rho, g, T).angles(SCALES)
    noise = SCALES**2 * angles(TIMES).tan() ** 2  # C_jj = eta_j^2
    expected = gamma0 * torch.exp(rho * (1 + torch.tensor(g, dtype=torch.double)) * (TIMES * T)[:, None])
    torch.testing.assert_close(noise, expected, rtol=1e-12, atol=0)
    rate = rho * (1 + torch.tensor(g, dtype=torch.double)) * expected  # dC/dt'
    slope = 2 * SCALES**2 * angles(TIMES).tan() / angles(TIMES).cos() ** 2 * angles.speed(TIMES) / T
    torch.testing.assert_close(slope, rate, rtol=1e-11, atol=0)


def test_preserving_noise_is_proportional_to_the_data():
    angles = Schedule.preserving(start=0.02).angles(SCALES)
    eta = SCALES * angles(TIMES).tan()
    torch.testing.assert_close(eta / SCALES, eta[:, :1] / SCALES[:1] * torch.ones_like(eta), rtol=1e-12, atol=0)
    gamma0 = math.tan(0.02) ** 2  # the paper's noise floor
    torch.testing.assert_close(eta[0] ** 2, gamma0 * SCALES**2, rtol=1e-12, atol=0)


def test_reducing_is_the_papers_exponential():
    """Equal noise at the start, and growth rates ``rho (1 + g_j)`` in a common time."""
    eta2 = (SCALES * Schedule.reducing(keep=2, gap=0.6).angles(SCALES)(TIMES).tan()) ** 2
    torch.testing.assert_close(eta2[0], eta2[0, 0].expand(6), rtol=1e-12, atol=0)
    growth = torch.log(eta2[1:] / eta2[0])
    g = torch.tensor([1.0, 1.0, 0.4, 0.4, 0.4, 0.4], dtype=torch.double)
    torch.testing.assert_close(growth / growth[:, :1], ((1 + g) / 2).expand(100, 6), rtol=1e-9, atol=0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_details_first_formula(power):
    tan = Schedule.details_first(power=power).angles(SCALES)(TIMES).tan()
    ratio = (SCALES[0] / SCALES) ** power
    torch.testing.assert_close(tan / tan[:, :1], ratio.expand(101, 6), rtol=1e-11, atol=0)


def test_details_first_limits():
    preserving = Schedule.preserving().angles(SCALES)(TIMES)
    assert torch.allclose(Schedule.details_first(power=0.0).angles(SCALES)(TIMES), preserving, rtol=1e-14)
    eta = SCALES * Schedule.details_first(power=1.0).angles(SCALES)(TIMES).tan()
    torch.testing.assert_close(eta, eta[:, :1].expand(101, 6), rtol=1e-11, atol=0)


def test_plain_data_round_trip(schedule):
    assert Schedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("slope", "span"), [([1.0, -0.1], (-1.0, 1.0)), ([1.0, 1.0], (1.0, -1.0)), ([0.0, 0.0], (-1.0, 1.0))]
)
def test_decreasing_angles_are_refused(slope, span):
    with pytest.raises(ValueError, match="never decrease"):
        Angles(torch.zeros(2), torch.tensor(slope), span, linear_clock=True)


def test_angles_out_of_range_are_refused():
    with pytest.raises(ValueError, match="in \\[0, pi/2\\)"):
        Angles(torch.zeros(2), torch.ones(2), (0.0, 60.0), linear_clock=True)
    with pytest.raises(ValueError, match="earlier end or a smaller gap"):
        Schedule.reducing(keep=1, gap=1.9).angles(SCALES)
    with pytest.raises(ValueError, match="never decrease"):
        Schedule.exponential(1e-3, 1.0, [1.0, -1.5], 5.0).angles(SCALES[:2])
