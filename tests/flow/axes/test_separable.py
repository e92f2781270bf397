"""Separable axes: exact where the covariance is a Kronecker product, and as good as any others everywhere else."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import ifpyro
from flows_zoo import random_mlp
from ifpyro import InflationaryFlow, Schedule
from ifpyro.checks.questions import gaussian
from ifpyro.flow.axes.basis import Basis, kind_for
from ifpyro.flow.axes.separable import SeparableAxes
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.grid import Grid

DOUBLE = torch.double
SHAPE = (2, 3, 5)
DIM = math.prod(SHAPE)


def kronecker_gaussian(seed: int = 0):
    """Orthogonal factors, the variances along their columns, and the covariance written out."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))[0] for n in SHAPE]
    variances = [torch.exp(torch.linspace(1.3 * n, 0, n, dtype=DOUBLE) / n) for n in SHAPE]
    covariance = torch.ones(1, 1, dtype=DOUBLE)
    for factor, variance in zip(factors, variances, strict=True):
        covariance = torch.kron(covariance, (factor * variance) @ factor.T)
    return factors, covariance


def rows_with(covariance, rows: int = 400, seed: int = 1):
    """Rows whose sample covariance is the given one to rounding, and whose mean is 0.3."""
    x = torch.randn(rows, len(covariance), generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    x = torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(rows - 1)
    return x @ torch.linalg.cholesky(covariance).T + 0.3


def images(rows: int = 300, seed: int = 0):
    """Rows that are not Gaussian and whose covariance is no Kronecker product."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(rows, 2, 3, 1, generator=generator, dtype=DOUBLE).exp()
    return (smooth + 0.4 * torch.randn(rows, *SHAPE, generator=generator, dtype=DOUBLE)).flatten(1)


def gaussian_flow(basis, schedule=None, **options):
    schedule = schedule or Schedule.details_first()
    network = MLP(basis.dim, width=1, blocks=1).to(basis.scale)
    return InflationaryFlow(basis, schedule, network, event_shape=SHAPE, grid=Grid(2), **options)


BASES = {
    "separable": lambda: Basis.choose(images(), "separable", event_shape=SHAPE),
    "own units": lambda: Basis.separable(images(), SHAPE, own_units=True),
    "other shape": lambda: Basis.separable(images(), (5, 6)),
    "a dimension of one": lambda: Basis.separable(images(), (1, 10, 3)),
}


@pytest.mark.parametrize("name", BASES)
def test_axes_are_orthonormal_and_the_map_is_its_inverse(name):
    basis, x, identity = BASES[name](), images(), torch.eye(DIM, dtype=DOUBLE)
    axes = basis.rotate(identity)
    torch.testing.assert_close(axes.T @ axes, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(basis.rotate_back(identity), axes.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(basis.from_standard(basis.to_standard(x)), x, rtol=0, atol=1e-12)
    v = basis.to_standard(x)
    assert v.mean(0).abs().max() < 1e-12
    torch.testing.assert_close(v.var(0), torch.ones(DIM, dtype=DOUBLE), rtol=1e-10, atol=0)  # scales are exact
    assert (basis.scale.diff() <= 0).all()
    jacobian = torch.func.jacrev(basis.from_standard)(torch.zeros(DIM, dtype=DOUBLE))
    torch.testing.assert_close(basis.log_det(), torch.linalg.slogdet(jacobian)[1], rtol=1e-12, atol=1e-10)
    batch = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    torch.testing.assert_close(basis.rotate(batch), batch @ axes, rtol=0, atol=1e-13)
    assert basis.rotate_back(basis.rotate(batch[:, :0])).shape == (2, 0, DIM)
    assert (basis.kind, basis.principal) == ("separable", DIM)


def test_rotation_is_the_kronecker_product_in_its_order():
    factors, _ = kronecker_gaussian()
    order = torch.randperm(DIM, generator=torch.Generator().manual_seed(2))
    axes = SeparableAxes(factors, order)
    product = torch.kron(torch.kron(factors[0], factors[1]), factors[2])[:, order]
    torch.testing.assert_close(axes.rotate(torch.eye(DIM, dtype=DOUBLE)), product, rtol=0, atol=1e-14)


def test_kronecker_gaussian_is_exact():
    """Its axes are its eigenvectors, so that an untrained flow has its covariance and its density."""
    factors, covariance = kronecker_gaussian()
    x = rows_with(covariance)
    basis = Basis.separable(x, SHAPE)
    for found, factor in zip(basis.rotation.factors, factors, strict=True):
        torch.testing.assert_close((found.T @ factor).abs(), torch.eye(len(factor), dtype=DOUBLE), rtol=0, atol=1e-10)
    axes = basis.rotate(torch.eye(DIM, dtype=DOUBLE)) * basis.scale
    torch.testing.assert_close(axes @ axes.T, covariance, rtol=0, atol=1e-10)
    full = Basis.from_samples(x)
    torch.testing.assert_close(basis.scale, full.scale, rtol=1e-10, atol=0)
    exact = MultivariateNormal(torch.full((DIM,), 0.3, dtype=DOUBLE), covariance)
    flow = gaussian_flow(basis)
    torch.testing.assert_close(flow.log_prob(x.reshape(-1, *SHAPE)[:20]), exact.log_prob(x[:20]), rtol=0, atol=1e-5)


def test_gaussian_on_these_axes_is_nearly_that_of_all_eigenvectors():
    """Log-determinants: no orthogonal axes beat the eigenvectors; the columns as they are do worse by far."""
    x = images(2000)
    full, found = Basis.from_samples(x).log_det(), Basis.separable(x, SHAPE).log_det()
    columns = x.std(0).log().sum()
    assert 0 <= found - full < 0.05 * (columns - full)


def test_check_compares_with_the_gaussian_on_the_same_axes():
    """A covariance of all columns is not made where the flow did without."""
    flow = gaussian_flow(BASES["separable"]())
    assert gaussian(flow, images()).basis is flow.basis


SCHEDULES = {
    "preserving": Schedule.preserving(),
    "details first": Schedule.details_first(),
    "details first, p = 2": Schedule.details_first(power=2.0, octaves=0.5),
    "reducing": Schedule.reducing(keep=3, gap=0.4),
    "exponential": Schedule.exponential(1e-4, 1.0, [1.0] * 4 + [0.8] * 26, 14.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    x = images(8).reshape(-1, *SHAPE)
    network = random_mlp(DIM, DOUBLE, size=0.05)
    flow = InflationaryFlow(BASES["separable"](), SCHEDULES[name], network, event_shape=SHAPE, grid=Grid(32))
    z, log_det = flow.encode_and_log_det(x)
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-7)
    jacobian = torch.func.jacrev(lambda z: flow.decode(z).flatten())(z[0])
    assert float(log_det[0]) == pytest.approx(-float(torch.linalg.slogdet(jacobian)[1]), abs=1e-8)
    assert torch.autograd.gradcheck(flow.decode, (z[:1].requires_grad_(True),), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_files_keep_the_basis(tmp_path, dtype):
    path, network = tmp_path / "flow.safetensors", random_mlp(DIM, dtype, size=0.05)
    basis = BASES["separable"]().to(dtype)
    flow = InflationaryFlow(basis, Schedule.details_first(), network, event_shape=SHAPE, grid=Grid(4))
    flow.save(path)
    again, z = ifpyro.load(path), torch.randn(5, DIM, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert again.basis.kind == "separable"
    assert torch.equal(again.decode(z), flow.decode(z))
    other = copy.deepcopy(flow)
    other.basis.rotation.order.copy_(torch.arange(DIM))
    for factor in other.basis.rotation.factors:
        factor.zero_()
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.decode(z), flow.decode(z))
    assert torch.equal(other.encode(flow.decode(z)), flow.encode(flow.decode(z)))


def test_double_precision_and_autocast():
    basis = BASES["separable"]().float()
    axes = copy.deepcopy(basis).double().rotate(torch.eye(DIM, dtype=DOUBLE))
    torch.testing.assert_close(axes.T @ axes, torch.eye(DIM, dtype=DOUBLE), rtol=0, atol=1e-13)
    u = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for turn in (basis.rotate, basis.rotate_back):
            assert turn(u.bfloat16()).dtype == torch.float32
            torch.testing.assert_close(turn(u).double(), turn(u.double()).double(), rtol=0, atol=1e-5)


def test_auto_takes_it_for_large_events_that_are_no_vectors():
    kinds = [((3, 16, 16), "pca"), ((3, 32, 32), "separable"), ((3, 128, 128), "separable"), ((64, 64), "separable")]
    kinds += [((3072,), "low_rank"), ((1, 3072), "low_rank"), ((20_000,), "identity"), ((1, 20_000), "identity")]
    for shape, kind in kinds:
        assert kind_for("auto", math.prod(shape), shape) == kind
    assert Basis.choose(torch.randn(12, 1200), event_shape=(3, 20, 20)).kind == "separable"


def test_fit_takes_it_from_memory_from_a_data_set_and_by_itself():
    x = images().float().reshape(-1, *SHAPE)
    options = {"max_steps": 3, "seed": 0, "progress": False}
    flow = ifpyro.fit(x, basis="separable", **options)
    assert flow.basis.kind == "separable"
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-3)
    report = flow.report["reconstruction"]
    assert report["k"] == [1, 2, 4, 8, 16, 30]
    # Eight axes along the dimensions keep nearly what eight principal ones keep.
    assert report["error"][3] < 1.3 * report["pca"][3]
    streamed = ifpyro.fit(torch.utils.data.TensorDataset(x), basis="separable", validation=x[:30], **options)
    assert streamed.basis.kind == "separable"
    for given, shape in ((flow, SHAPE), (streamed, SHAPE)):
        assert given.basis.rotation.event_shape == torch.Size(shape)
    large = torch.randn(40, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert ifpyro.fit(large, network={"width": 8}, **options).basis.kind == "separable"


def test_fit_takes_it_in_unconstrained_space():
    """Rows of a simplex have an entry fewer there."""
    x = torch.randn(60, 2, 3, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    options = {"support": torch.distributions.constraints.simplex, "max_steps": 0, "seed": 0, "progress": False}
    flow = ifpyro.fit(x, basis="separable", **options)
    assert flow.basis.rotation.event_shape == torch.Size((2, 3, 5))
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-5)


def test_from_denoiser_takes_it():
    x = images().float().reshape(-1, *SHAPE)
    seen = 2 * x.flatten(1) - 1
    mean, (variance, axes) = seen.mean(0), torch.linalg.eigh(torch.cov(seen.T))

    class Wiener(nn.Module):
        def forward(self, image, sigma):
            kept = variance / (variance + sigma.unsqueeze(1) ** 2)
            return (mean + (((image.flatten(1) - mean) @ axes) * kept) @ axes.T).reshape(image.shape)

    options = {"noise": (0.01, 30.0), "samples": x, "rescale": (2.0, -1.0), "grid": Grid(8)}
    for kind, rows in (("separable", x), ("auto", x[:40])):  # too few rows for all eigenvectors
        flow = ifpyro.from_denoiser(Wiener(), basis=kind, **(options | {"samples": rows}))
        assert flow.basis.kind == "separable"
        torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: Basis.choose(x, "separable"), r"at least two dimensions.*got 30 columns of events \(30,\)"),
        (lambda x: Basis.separable(x, (5, 5)), r"30 columns of events \(5, 5\)"),
        (lambda x: Basis.separable(x[:, :15].repeat(1, 2), SHAPE), "combinations of others"),
        (lambda x: ifpyro.fit(x, basis="separable", progress=False), "at least two dimensions"),
        (lambda x: Basis.separable(x.new_zeros(3, 5000), (1, 5000)), "none longer than 4096"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(images())


def test_no_square_matrix_is_made():
    """12,288 columns: a square matrix of them would hold 1.2 GB in double precision."""
    x = torch.randn(48, 12_288, generator=torch.Generator().manual_seed(0))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        basis = Basis.choose(x, event_shape=(3, 64, 64))
        basis.from_standard(basis.to_standard(x))
    assert basis.kind == "separable"
    assert largest <= x.numel()
