import copy

import pytest
import torch

import ifpyro
from flows_zoo import latents, mlp_flow
from ifpyro.ode import Grid


def test_compiled_steps_agree():
    """By a backend that needs no C++ compiler; benchmarks/throughput.py checks the default one."""
    grid = Grid(6, method="midpoint")
    flow, plain = (mlp_flow(3, torch.double, grid=grid) for _ in range(2))
    assert flow.compile(backend="aot_eager") > 0
    step, calls = flow.compiled_take, []
    flow.compiled_take = lambda *args: calls.append(1) or step(*args)
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
    assert copy.deepcopy(flow).compiled_take is None


def test_a_failed_compilation_leaves_the_flow_as_it_was():
    flow = mlp_flow(2, torch.double)
    z = latents(flow, 3)
    before = flow.decode(z)
    with pytest.raises(Exception, match="no-such-backend"):
        flow.compile(backend="no-such-backend")
    assert torch.equal(flow.decode(z), before)
