"""The three kinds of basis: orthonormal axes without a D x D matrix, and flows that are exact Gaussians in each."""

import copy
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import ifpyro
from flows_zoo import random_mlp
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis, kind_for
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.grid import Grid

DOUBLE = torch.double


def spiked(rows: int, dim: int, sd, tail: float, seed: int = 0, dtype=DOUBLE):
    """Rows of a Gaussian with the given standard deviations on random leading axes and ``tail`` on all others."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, len(sd), generator=generator, dtype=DOUBLE))[0]
    white = tail * torch.randn(rows, dim, generator=generator, dtype=DOUBLE)
    leading = torch.randn(rows, len(sd), generator=generator, dtype=DOUBLE) * torch.as_tensor(sd, dtype=DOUBLE)
    return (white - (white @ axes) @ axes.T + leading @ axes.T + 0.3).to(dtype), axes


@pytest.fixture(scope="module")
def rows():
    return spiked(400, 30, [9.0, 6.0, 4.0, 2.0], 0.5)[0]


BASES = {
    "pca": lambda x: Basis.choose(x, "pca"),
    "low rank": lambda x: Basis.choose(x, "low_rank", rank=4),
    "one axis": lambda x: Basis.low_rank(x, 1),
    "all but one": lambda x: Basis.low_rank(x, x.shape[1] - 1),
    "identity": lambda x: Basis.choose(x, "identity"),
    "identity, own units": lambda x: Basis.choose(x, "identity", own_units=True),
    "low rank, own units": lambda x: Basis.choose(x, "low_rank", rank=4, own_units=True),
}


@pytest.mark.parametrize("name", BASES)
def test_axes_are_orthonormal_and_the_map_is_its_inverse(rows, name):
    basis = BASES[name](rows)
    axes = basis.rotate(torch.eye(30, dtype=DOUBLE))
    torch.testing.assert_close(axes.T @ axes, torch.eye(30, dtype=DOUBLE), rtol=0, atol=1e-12)
    torch.testing.assert_close(axes[:, : basis.principal], basis.rotation, rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.rotate_back(torch.eye(30, dtype=DOUBLE)), axes.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.from_standard(basis.to_standard(rows)), rows, rtol=0, atol=1e-11)
    jacobian = torch.func.jacrev(basis.from_standard)(torch.zeros(30, dtype=DOUBLE))
    torch.testing.assert_close(basis.log_det(), torch.linalg.slogdet(jacobian)[1], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", BASES)
def test_standardised_rows_have_mean_zero_and_total_variance_of_one_an_axis(rows, name):
    basis = BASES[name](rows)
    v = basis.to_standard(rows)
    assert v.mean(0).abs().max() < 1e-12
    r = basis.principal
    if r:
        torch.testing.assert_close(v[:, :r].var(0), torch.ones(r, dtype=DOUBLE), rtol=1e-6, atol=0)
    assert float(v.var(0).mean()) == pytest.approx(1, abs=1e-6)
    assert (basis.scale.diff() <= 1e-12).all()


def test_low_rank_finds_the_leading_eigenvectors(rows):
    """The spikes are far apart, so subspace iteration converges to the axes of the full covariance."""
    full, low = Basis.from_samples(rows), Basis.low_rank(rows, 4, sweeps=12)
    torch.testing.assert_close(low.rotation, full.rotation[:, :4], rtol=0, atol=1e-6)
    torch.testing.assert_close(low.scale[:4], full.scale[:4], rtol=1e-8, atol=0)
    torch.testing.assert_close(low.scale[4:], full.scale[4:].square().mean().sqrt().expand(26), rtol=1e-8, atol=0)
    assert torch.equal(Basis.low_rank(rows, 4, sweeps=12).rotation, low.rotation)


def test_chunks_do_not_matter(rows, monkeypatch):
    whole = Basis.low_rank(rows, 4), Basis.one_scale(rows)
    monkeypatch.setattr("ifpyro.flow.axes.low_rank.CHUNK", 37)
    monkeypatch.setattr("ifpyro.data.moments.CHUNK", 37)
    for before, after in zip(whole, (Basis.low_rank(rows, 4), Basis.one_scale(rows)), strict=True):
        torch.testing.assert_close(after.rotation, before.rotation, rtol=0, atol=1e-10)
        torch.testing.assert_close(after.scale, before.scale)
        torch.testing.assert_close(after.mean, before.mean)


def test_auto_chooses_by_size():
    assert [kind_for("auto", d) for d in (2, 1024, 1025, 3072, 16_384, 16_385)] == [
        "pca",
        "pca",
        "low_rank",
        "low_rank",
        "low_rank",
        "identity",
    ]
    assert kind_for("identity", 2) == "identity"


def gaussian_flow(basis, schedule, event_shape=None):
    return InflationaryFlow(
        basis, schedule, MLP(basis.dim, width=1, blocks=1).to(basis.scale), event_shape=event_shape, grid=Grid(2)
    )


@pytest.mark.parametrize("kind", ["low_rank", "identity"])
def test_untrained_flow_of_1200_dimensions_is_the_exact_gaussian(kind):
    """Against the density with the covariance written out, which the flow never makes."""
    dim, sd, tail = 1200, [30.0, 12.0, 5.0], 0.7
    x, axes = spiked(64, dim, sd, tail, dtype=torch.float32)
    # The population's moments, in place of a sample's.
    if kind == "low_rank":
        scale = torch.cat([torch.tensor(sd), torch.full((dim - 3,), tail)])
        basis = Basis(torch.full((dim,), 0.3), axes.float(), scale)
        variance = axes @ torch.diag(torch.tensor(sd).double() ** 2 - tail**2) @ axes.T
    else:
        basis = Basis(torch.full((dim,), 0.3), torch.zeros(dim, 0), torch.full((dim,), tail))
        variance = torch.zeros(dim, dim, dtype=DOUBLE)
    exact = MultivariateNormal(torch.full((dim,), 0.3, dtype=DOUBLE), variance + tail**2 * torch.eye(dim, dtype=DOUBLE))
    flow = gaussian_flow(basis, Schedule.details_first(), (3, 20, 20)).double()
    images = x.double().reshape(-1, 3, 20, 20)
    # Axes that came in single precision are orthonormal to it, and the density cannot agree further.
    torch.testing.assert_close(flow.log_prob(images), exact.log_prob(x.double()), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(flow.decode(flow.encode(images)), images, rtol=0, atol=1e-10)
    drawn = flow.sample(500, seed=0).reshape(500, dim)
    share = (drawn - 0.3) @ axes  # the variance along the leading axes, to Monte Carlo error
    expected = torch.tensor(sd if kind == "low_rank" else [tail] * 3, dtype=DOUBLE)
    assert (share.std(0) / expected - 1).abs().max() < 4 / math.sqrt(2 * 500)


SCHEDULES = {
    "preserving": Schedule.preserving(),
    "details first": Schedule.details_first(),
    "details first, p = 2": Schedule.details_first(power=2.0),
    "octaves": Schedule.details_first(octaves=0.5),
    "reducing": Schedule.reducing(keep=3, gap=0.4),
    "exponential": Schedule.exponential(1e-4, 1.0, [1.0] * 4 + [0.8] * 26, 14.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["pca", "low_rank"])
def test_schedules_in_bases_with_principal_axes(rows, name, kind):
    basis = Basis.choose(rows, kind, rank=4)
    flow = InflationaryFlow(basis, SCHEDULES[name], random_mlp(30, DOUBLE, size=0.05), grid=Grid(32))
    z, log_det = flow.encode_and_log_det(rows[:8])
    torch.testing.assert_close(flow.decode(z), rows[:8], rtol=0, atol=1e-7)
    jacobian = torch.func.jacrev(flow.decode)(z[0])
    assert float(log_det[0]) == pytest.approx(-float(torch.linalg.slogdet(jacobian)[1]), abs=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_in_a_basis_of_one_scale(rows, name):
    basis = Basis.choose(rows, "identity")
    if name in ("reducing", "exponential"):
        with pytest.raises(ValueError, match="principal axes"):
            gaussian_flow(basis, SCHEDULES[name])
        return
    theta = gaussian_flow(basis, SCHEDULES[name]).angles(torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(theta, theta[:, :1].expand(2, 30))
    same_g = Schedule.exponential(1e-4, 1.0, [0.9] * 30, 14.0)
    assert gaussian_flow(basis, same_g).latent_dim == 30


def test_reducing_keeps_principal_axes_alone(rows):
    basis = Basis.low_rank(rows, 4)
    gaussian_flow(basis, Schedule.reducing(keep=4, gap=0.4))
    with pytest.raises(ValueError, match="at least 5 principal axes, got 4 among 30"):
        gaussian_flow(basis, Schedule.reducing(keep=5, gap=0.4))
    with pytest.raises(ValueError, match="from entry 4 on"):
        gaussian_flow(basis, Schedule.exponential(1e-4, 1.0, [1.0] * 5 + [0.8] * 25, 14.0))


@pytest.mark.parametrize("name", BASES)
def test_files_keep_the_basis(rows, name, tmp_path):
    flow = InflationaryFlow(BASES[name](rows.float()), Schedule.preserving(), random_mlp(30), grid=Grid(4))
    flow.save(tmp_path / "flow.safetensors")
    again = ifpyro.load(tmp_path / "flow.safetensors")
    assert again.basis.principal == flow.basis.principal
    z = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.decode(z), flow.decode(z))
    other = copy.deepcopy(flow)
    other.basis.rotation.zero_()
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.decode(z), flow.decode(z))


def test_a_flow_moved_to_double_precision_has_axes_orthonormal_to_it(rows):
    basis = Basis.low_rank(rows.float(), 4).double()
    axes = basis.rotate(torch.eye(30, dtype=DOUBLE))
    torch.testing.assert_close(axes.T @ axes, torch.eye(30, dtype=DOUBLE), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["low_rank", "identity", "basis"])
def test_fit_takes_a_basis(rows, kind):
    basis = Basis.low_rank(rows, 2) if kind == "basis" else kind
    flow = ifpyro.fit(rows.reshape(-1, 3, 10), basis=basis, max_steps=0, seed=0, progress=False)
    assert flow.basis.principal == {"low_rank": 4, "identity": 0, "basis": 2}[kind]
    assert ("reconstruction" in flow.report) == (kind != "identity")
    torch.testing.assert_close(flow.decode(flow.encode(rows.view(-1, 3, 10))), rows.view(-1, 3, 10))
    if kind == "basis":  # the caller's own stays the caller's
        assert flow.basis is not basis


def test_fewer_rows_than_columns_need_no_covariance():
    x = spiked(40, 60, [5.0, 3.0], 0.5)[0]
    with pytest.raises(ValueError, match="low_rank"):
        ifpyro.fit(x, max_steps=0, progress=False)
    flow = ifpyro.fit(x, basis="low_rank", max_steps=0, seed=0, progress=False)
    assert flow.basis.principal == 2  # as many as there are: by held-out likelihood
    assert flow.log_prob(x).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: Basis.choose(x, "ica"), "got 'ica'"),
        (lambda x: Basis.low_rank(x, 30), "between 1 and 29 principal axes"),
        (lambda x: Basis.low_rank(x[:10], 9), "between 1 and 8 principal axes for 10 rows"),
        (lambda x: Basis.low_rank(x @ torch.eye(30, 4, dtype=DOUBLE) @ torch.eye(4, 30, dtype=DOUBLE), 4), "beyond"),
        (lambda x: Basis.choose(x.new_zeros(2, 5000), "pca"), "at most 4096 columns"),
        (lambda x: ifpyro.fit(x, basis="ica", progress=False), "got 'ica'"),
        (lambda x: ifpyro.fit(x, basis=Basis.one_scale(x[:, :5]), progress=False), "30 axes.* got 5"),
        (lambda x: Schedule.details_first(octaves=1.5), "octaves in"),
    ],
)
def test_bad_input(rows, call, message):
    with pytest.raises(ValueError, match=message):
        call(rows)


def test_set_up_makes_no_square_matrix():
    """12,288 columns: a square matrix of them would hold 1.2 GB in double precision."""
    x = torch.randn(64, 12_288, generator=torch.Generator().manual_seed(0))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        basis = Basis.choose(x)
        basis.from_standard(basis.to_standard(x))
    assert basis.principal == 1  # noise alone has no leading axes
    assert largest <= x.numel()


def test_clock_by_octaves_gives_a_large_scale_its_time():
    """Of 200 axes one is large: by axes it turns in the last moments, by octaves in about half of the time."""
    scale = torch.cat([torch.tensor([100.0]), torch.full((199,), 0.1)])
    time_of_turning = []
    for octaves in (0.0, 1.0):
        angles = Schedule.details_first(octaves=octaves).angles(scale)
        t = torch.linspace(0, 1, 2001, dtype=DOUBLE)
        theta = angles(t)[:, 0]
        time_of_turning.append(float(((theta > 0.2) & (theta < 1.4)).double().mean()))
        finite = (angles(t[1:]) - angles(t[:-1])) / (t[1:] - t[:-1]).unsqueeze(-1)
        torch.testing.assert_close(finite, angles.speed((t[1:] + t[:-1]) / 2), rtol=0.02, atol=0.02)
    assert time_of_turning[0] < 0.02
    assert time_of_turning[1] > 0.3
