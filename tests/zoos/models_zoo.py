"""Pyro models that stress batching, each with the way in which it is expected to be batched."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_transform import TransformModule
from pyro.nn import PyroModule
from torch.distributions import constraints


class TanhFlow(TransformModule):
    """z -> z + 0.4 tanh(W z + b), a smooth bijection."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    is_ifpyro_flow: ClassVar[bool] = True

    def __init__(self, dim: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(dim, dim, generator=generator)
        self.weight = torch.nn.Parameter(weight / torch.linalg.matrix_norm(weight, 2))
        self.bias = torch.nn.Parameter(torch.randn(dim, generator=generator))

    def _call(self, z):
        return z + 0.4 * torch.tanh(z @ self.weight.T + self.bias)

    def _inverse(self, x):
        z = x
        for _ in range(40):
            z = x - 0.4 * torch.tanh(z @ self.weight.T + self.bias)
        return z

    def log_abs_det_jacobian(self, z, x):
        slope = 0.4 * (1 - torch.tanh(z @ self.weight.T + self.bias) ** 2)
        return torch.linalg.slogdet(torch.eye(z.shape[-1]) + slope.unsqueeze(-1) * self.weight)[1]


FLOW = TanhFlow(3)


def flow_prior(flow: Any = FLOW) -> Any:
    base = dist.Normal(torch.zeros(()), 1.0).expand([flow.bias.shape[0]]).to_event(1)
    return dist.TransformedDistribution(base, [flow])


def one_flow(y):
    x = pyro.sample("x", flow_prior())
    pyro.sample("y", dist.Normal(x[..., 1], 0.5), obs=y)


def flows_in_a_plate(y):
    shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
    with pyro.plate("objects", len(y)):
        x = pyro.sample("x", flow_prior())
        pyro.deterministic("first", x[..., 0] + shift)
        pyro.sample("y", dist.Normal(x[..., 1] + shift, 0.5), obs=y)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def nested_plates(y):
    rows = pyro.plate("rows", y.shape[0], dim=-3)
    columns = pyro.plate("columns", y.shape[-1], dim=-1)
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, scale))
    with columns:
        b = pyro.sample("b", dist.StudentT(5.0, 0.0, 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def shape_changing(y):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    chol = pyro.sample("chol", dist.LKJCholesky(3, 2.0))
    scales = pyro.sample("scales", dist.LogNormal(0.0, 0.5).expand([3]).to_event(1))
    factor = scales.unsqueeze(-1) * chol
    pyro.deterministic("covariance", factor @ factor.transpose(-1, -2), event_dim=2)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(p, scale_tril=factor), obs=y)


def ordered(y):
    cuts = dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([3]).to_event(1), [dist.transforms.OrderedTransform()]
    )
    c = pyro.sample("c", cuts)
    pyro.sample("y", dist.Normal(c[..., 2] - c[..., 0], 1.0), obs=y)


def double_precision(y):
    x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    s = pyro.sample("s", dist.Exponential(torch.ones((), dtype=torch.float64)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, s), obs=y)


def undeclared_batch(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def undeclared_likelihood(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def masks_and_scales(y, mask):
    with poutine.scale(scale=2.5):
        x = pyro.sample("x", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(x, 1.0).mask(torch.tensor([True, True, False, True])))
        with poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def factors(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.factor("f", -0.5 * (x.square().sum(-1) - y) ** 2)
    pyro.factor("constant", torch.tensor(3.0))


def constant_likelihood(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("free", dist.Normal(0.0, 1.0), obs=y)
    pyro.sample("y", dist.Normal(x, 1.0), obs=y.mean())


def loop_plate(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(y)):
        z = pyro.sample(f"z_{i}", dist.Normal(x, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 0.5), obs=y[i])


def from_the_left(y):
    x = pyro.sample("x", flow_prior())
    pyro.sample("y", dist.Normal(x[1], 0.5), obs=y)


def mean_over_everything(y):
    x = pyro.sample("x", flow_prior())
    pyro.deterministic("average", x.mean())
    pyro.sample("y", dist.Normal(x.mean(), 0.5), obs=y)


def weak_leak(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + 1e-9 * x.sum(), 0.5), obs=y)


def centred_by_the_batch(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    centred = x - x.mean(0, keepdim=True)
    pyro.sample("y", dist.Normal(centred.sum(-1), 0.5), obs=y)


def rounded_leak(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + 1e-3 * torch.round(x.sum() / 30), 0.5), obs=y)


def leak_from_far_draws(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(50 * x / x.abs().max().clamp(min=50.0), 0.5), obs=y)


def detached_leak(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + 1e-4 * (x.detach().max() > 20), 0.5), obs=y)


def square_matrix(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    matrix = torch.linspace(-1, 1, 25).reshape(5, 5)
    pyro.sample("y", dist.Normal(matrix @ x, 0.5).to_event(1), obs=y)


def branching(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    slope = 2.0 if x.sum() > 3.0 else 1.0  # prior draws hardly ever take the first branch
    pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def missing_entries(y, seen):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, 0.5), obs=y, obs_mask=seen)


class _Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(1, 2, generator=generator))
            self.linear.bias.zero_()

    def forward(self, y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(self.linear(x).squeeze(-1), 0.5), obs=y)


def parameters(y):
    loc = pyro.param("loc", lambda: torch.randn(()))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
    x = pyro.sample("x", dist.Normal(loc, scale))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


@dataclass
class Case:
    """A model, its arguments, and the way in which it is expected to be batched."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    batching: str = "plate"
    kwargs: dict[str, Any] = field(default_factory=dict)
    pyro_agrees: bool = True


def _data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


_y = torch.tensor(0.3)
CASES: dict[str, Case] = {
    "one flow": Case(one_flow, (_y,)),
    "one flow, many data": Case(one_flow, (_data(4),)),
    "one flow, a datum in float64": Case(one_flow, (_y.double(),)),
    "flows in a plate": Case(flows_in_a_plate, (_data(4),)),
    "schools": Case(schools, (_data(5),), kwargs={"sigma": torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3])}),
    "data in float64": Case(schools, (_data(5).double(), torch.ones(5).double())),
    "latents in float64": Case(double_precision, (_data(4).double(),)),
    "nested plates": Case(nested_plates, (_data(3, 1, 5),)),
    "shape changing": Case(shape_changing, (_data(4, 3),)),
    "ordered": Case(ordered, (_y,)),
    "undeclared batch": Case(undeclared_batch, (_data(4),)),
    "undeclared likelihood": Case(undeclared_likelihood, (_data(4),)),
    "masks and scales": Case(masks_and_scales, (_data(4), torch.tensor([True, False, True, True]))),
    "factors": Case(factors, (_y,)),
    "constant likelihood": Case(constant_likelihood, (_data(4),)),
    "loop plate": Case(loop_plate, (_data(3),)),
    "from the left": Case(from_the_left, (_y,), batching="vmap"),
    "mean over everything": Case(mean_over_everything, (_y,), batching="vmap"),
    "weak leak": Case(weak_leak, (_y,), batching="vmap"),
    "rounded leak": Case(rounded_leak, (_y,), batching="vmap"),
    "leak from far draws": Case(leak_from_far_draws, (_y,), batching="vmap"),
    "detached leak": Case(detached_leak, (_y,), batching="vmap"),
    "centred by the batch": Case(centred_by_the_batch, (_y,), batching="vmap"),
    "square matrix": Case(square_matrix, (_data(5),), batching="vmap"),
    "branching": Case(branching, (_y,), batching="loop"),
    # the masked-out entries, which matter to nothing, keep a prior that Pyro's density lacks
    "missing entries": Case(missing_entries, (_data(4), torch.tensor([True, False, True, True])), pyro_agrees=False),
    "network": Case(_Net(), (_y,)),
    "parameters": Case(parameters, (_y,), pyro_agrees=False),  # Pyro would draw the initial value anew
    "conditioned": Case(pyro.condition(flows_in_a_plate, data={"shift": torch.tensor(0.2)}), (_data(4),)),
}
