import copy

import pytest
import torch

import ifpyro
from flows_zoo import latents, mlp_flow, samples
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.velocity import Velocity
from ifpyro.flow.solver.grid import Grid


def test_compiled_steps_agree():
    """By a backend that needs no C++ compiler; benchmarks/throughput.py checks the default one."""
    grid = Grid(6, method="midpoint")
    flow, plain = (mlp_flow(3, torch.double, grid=grid) for _ in range(2))
    assert flow.compile(backend="aot_eager") > 0
    step, calls = flow.map.compiled_take, []
    flow.map.compiled_take = lambda *args: calls.append(1) or step(*args)
    for rows, level in ((64, "fine"), (17, "fine"), (17, "coarse"), (1, "fine")):
        z = latents(flow, rows)
        with ifpyro.fidelity(level):
            leaf = z.clone().requires_grad_(True)
            (found,) = torch.autograd.grad(flow.decode(leaf).sin().sum(), leaf)
            leaf = z.clone().requires_grad_(True)
            (expected,) = torch.autograd.grad(plain.decode(leaf).sin().sum(), leaf)
            torch.testing.assert_close(flow.decode(z), plain.decode(z), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 6 * flow.grid.steps + 2 * flow.coarse_steps
    with torch.no_grad():  # other weights are seen
        for network in (flow.velocity, plain.velocity):
            network.outlet.weight.mul_(1.5)
    torch.testing.assert_close(flow.decode(z), plain.decode(z), rtol=1e-12, atol=1e-12)
    flow.autocast = torch.bfloat16  # was not when it was compiled
    count = len(calls)
    flow.decode(z)
    assert len(calls) == count
    flow.autocast = None
    jacobian = torch.func.vmap(torch.func.jacrev(flow.decode))(z)
    torch.testing.assert_close(jacobian, torch.func.vmap(torch.func.jacrev(plain.decode))(z), rtol=1e-12, atol=1e-12)
    assert copy.deepcopy(flow).map.compiled_take is None


def test_a_failed_compilation_leaves_the_flow_as_it_was():
    flow = mlp_flow(2, torch.double)
    z = latents(flow, 3)
    before = flow.decode(z)
    with pytest.raises(Exception, match="no-such-backend"):
        flow.compile(backend="no-such-backend")
    assert torch.equal(flow.decode(z), before)


class OneLayer(Velocity):
    """The least that there is to compile."""

    def __init__(self, dim):
        super().__init__()
        self.layer = torch.nn.Linear(dim, dim, dtype=torch.double)

    def embed(self, t):
        return t[:, None]

    def forward(self, y, embedding):
        return torch.tanh(self.layer(y)) * embedding


def one_layer_flow(dim):
    basis = Basis.from_samples(samples(dim, torch.double))
    velocity = OneLayer(dim)
    return ifpyro.InflationaryFlow(basis, ifpyro.Schedule.details_first(), velocity, grid=Grid(3, method="euler"))


def test_every_flow_of_a_process_is_compiled():
    """torch compiles a function eight times, whichever flow it serves: two or three flows' worth."""
    compilations, calls = [], []

    def backend(graph, _):
        compilations.append(graph)

        def run(*args):
            calls.append(graph)
            return graph(*args)

        return run

    for dim in (2, 3, 4):
        flow = one_layer_flow(dim)
        flow.compile(backend=backend)
        for rows in (5, 1):
            calls.clear()
            flow.decode(latents(flow, rows))
            assert len(calls) == flow.grid.steps, f"{dim} axes, {rows} rows"
    calls.clear()
    with ifpyro.fidelity(evaluations=8):
        flow.decode(latents(flow, 5))
    assert len(calls) == 4  # midpoint steps
    found = len(compilations)
    alike = one_layer_flow(dim)
    alike.compile(backend=backend)
    assert len(compilations) == found, "a network of the same kind has been compiled before"
    calls.clear()
    alike.decode(latents(alike, 5))
    assert len(calls) == alike.grid.steps
