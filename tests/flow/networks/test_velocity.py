import pytest
import torch

from flows_zoo import SCHEDULES, mixture_density, mixture_flow, mlp_flow, random_mlp, samples
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.images import build_velocity
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.networks.velocity import Velocity

TIMES = torch.tensor([0.0, 0.05, 0.3, 0.7, 0.98], dtype=torch.double)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_mixture_velocity_is_tan_theta_times_state_plus_score(name, dim):
    """``E[n_j | y] = -sin(theta_j) score_j`` (Tweedie), so ``F_j = tan(theta_j) (y_j + score_j)``."""
    flow = mixture_flow(dim, torch.double, SCHEDULES[name](dim))
    exact = flow.velocity
    y = 1.5 * torch.randn(40, dim, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for t in TIMES:
        theta = flow.angles(t)
        cos, sin = theta.cos(), theta.sin()
        noised = mixture_density(
            exact.weights,
            exact.means * cos,
            cos[:, None] * exact.covariances * cos + torch.diag(sin**2),
        )
        score = torch.func.grad(lambda v, p=noised: p.log_prob(v).sum())(y)
        found = exact(y, exact.embed(t[None])[0])
        # near pi/2 the right-hand side is a difference of numbers of order tan(theta)
        torch.testing.assert_close(found, theta.tan() * (y + score), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_mixture_velocity_at_one_time_or_at_one_each(dtype):
    flow = mixture_flow(3, dtype)
    exact = flow.velocity
    y = 1.5 * torch.randn(len(TIMES), 3, generator=torch.Generator().manual_seed(0), dtype=torch.double).to(dtype)
    embedding = exact.embed(TIMES)
    together = exact(y, embedding)
    assert embedding.dtype == together.dtype == dtype
    assert together.abs().min() > 1e-4
    for row in range(len(TIMES)):
        torch.testing.assert_close(exact(y[row : row + 1], embedding[row])[0], together[row], rtol=1e-5, atol=1e-6)


def test_mixture_velocity_is_the_regression_of_the_target():
    """``F`` is the conditional mean of the training target: residuals are uncorrelated with functions of ``y``."""
    flow = mixture_flow(2, torch.double)
    exact = flow.velocity
    generator = torch.Generator().manual_seed(1)
    num = 200_000
    k = torch.multinomial(exact.weights, num, True, generator=generator)
    white = torch.randn(num, 2, 1, generator=generator, dtype=torch.double)
    x0 = exact.means[k] + (torch.linalg.cholesky(exact.covariances)[k] @ white)[..., 0]
    n = torch.randn(num, 2, generator=generator, dtype=torch.double)
    for t in (0.2, 0.6):
        theta = flow.angles(torch.tensor(t))
        y = theta.cos() * x0 + theta.sin() * n
        target = theta.sin() * x0 - theta.cos() * n
        residual = target - exact(y, exact.embed(torch.tensor([t], dtype=torch.double))[0])
        explained = target.square() - residual.square()
        assert explained.mean() > 4 * explained.std() / explained.numel() ** 0.5, "nothing is predicted"
        for weight in (torch.ones_like(y), y, y.flip(1), torch.sin(3 * y), torch.tanh(y.flip(1) - 1)):
            moment = residual * weight
            error = moment.std(0) / num**0.5
            assert (moment.mean(0).abs() < 4 * error).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_velocity_of_a_gaussian_is_zero(name):
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    flow = InflationaryFlow.from_gaussian_mixture(
        torch.ones(1).double(),
        torch.tensor([[1.0, 2.0, -3.0, 0.5]]).double(),
        (a @ a.T + torch.eye(4))[None],
        schedule=SCHEDULES[name](4),
    )
    y = torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    for t in TIMES:
        assert flow.velocity(y, flow.velocity.embed(t[None])[0]).abs().max() < 1e-12


def test_velocity_of_a_mixture_vanishes_in_the_mean():
    """Standardised data: the velocity has mean zero and no linear part, or the basis would be wrong."""
    flow = mixture_flow(3, torch.double)
    exact = flow.velocity
    second = torch.einsum(
        "k,kij->ij", exact.weights, exact.covariances + exact.means[:, :, None] * exact.means[:, None]
    )
    torch.testing.assert_close(exact.weights @ exact.means, torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(second, torch.eye(3).double(), rtol=0, atol=1e-12)


def test_untrained_network_is_zero_and_its_flow_the_gaussian_of_the_samples():
    x = samples(3, torch.double)
    flow = InflationaryFlow(Basis.from_samples(x), Schedule.details_first(), MLP(3).double())
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T))
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.decode(torch.zeros(3).double()), x.mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("waves", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_network_rows_and_embeddings(dtype, waves):
    network = random_mlp(3, dtype, waves=waves).eval()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.double)
    y = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double).to(dtype)
    embedding = network.embed(t)
    assert embedding.dtype == dtype
    assert embedding.isfinite().all()
    together = network(y, embedding)
    for row in range(3):
        torch.testing.assert_close(network(y[row : row + 1], embedding[row])[0], together[row], rtol=1e-5, atol=1e-6)
    assert (embedding[0] - embedding[1]).abs().max() > 1e-3
    assert together.abs().max() > 1e-2


@pytest.mark.parametrize("waves", [0, 3])
@pytest.mark.parametrize("per_row", [False, True])
def test_products_written_out_are_those_of_forward_mode(per_row, waves):
    network = random_mlp(3, torch.double, waves=waves).eval()
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5, 3, generator=generator, dtype=torch.double, requires_grad=True)
    directions = torch.randn(4, 5, 3, generator=generator, dtype=torch.double)
    times = torch.linspace(0.1, 0.9, 5, dtype=torch.double)
    embedding = network.embed(times) if per_row else network.embed(times[:1])[0]
    value, products = network.with_products(y, embedding, directions)
    right_value, right_products = Velocity.with_products(network, y, embedding, directions)
    torch.testing.assert_close(value, right_value)
    torch.testing.assert_close(products, right_products)
    gradient, right = (torch.autograd.grad((p**2).sum(), y, retain_graph=True)[0] for p in (products, right_products))
    torch.testing.assert_close(gradient, right)
    assert right.abs().max() > 1e-3


def test_network_is_rebuilt_from_its_spec():
    network = MLP(3, width=8, blocks=3, dropout=0.25, frequencies=5, waves=2)
    again = build_velocity(network.spec())
    again.load_state_dict(network.state_dict())
    assert again.spec() == network.spec()


def test_a_spec_written_before_there_were_waves_means_none():
    network = random_mlp(3)
    old = {name: value for name, value in network.spec().items() if name != "waves"}
    again = build_velocity(old)
    again.load_state_dict(network.state_dict())
    y, embedding = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), network.embed(TIMES)
    assert torch.equal(again(y, again.embed(TIMES)), network(y, embedding))


def test_the_inlet_sees_octaves_of_waves_of_every_coordinate():
    """With an inlet that picks one input, hidden units are that input: the velocity repeats with its period."""
    network = random_mlp(2, torch.double, waves=3)
    inputs = ["y0", "y1", *(f"{wave}({2**k} y{j})" for wave in ("sin", "cos") for j in range(2) for k in range(3))]
    assert network.inlet.weight.shape[1] == len(inputs)
    with torch.no_grad():
        network.inlet.weight.zero_()[:, inputs.index("cos(4 y1)")] = 1
    y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    embedding = network.embed(TIMES[2:3])[0]
    value = network(y, embedding)
    period = torch.tensor([0.0, torch.pi / 2], dtype=torch.double)
    for same in (y * torch.tensor([-3.0, 1.0]), y * torch.tensor([1.0, -1.0]), y + period):
        torch.testing.assert_close(network(same, embedding), value)
    assert (network(y + period / 2, embedding) - value).abs().max() > 1e-3


def test_dropout_is_off_inside_a_flow():
    network = MLP(2, width=16, dropout=0.5)
    torch.nn.init.normal_(network.outlet.weight)
    flow = InflationaryFlow(Basis.from_samples(samples(2)), Schedule.details_first(), network)
    z = torch.ones(5, 2)
    assert torch.equal(flow.decode(z), flow.decode(z))
    assert mlp_flow(2, torch.float32).training is False
