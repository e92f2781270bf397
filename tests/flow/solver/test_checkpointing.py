import pytest
import torch

from flows_zoo import FLOWS, Counting, latents, mlp_flow
from ifpyro.flow.solver.checkpointing import recompute
from ifpyro.flow.solver.grid import Grid

NAMES = ["mixture 2", "network 8", "positive image"]


def both(flow, function, *inputs):
    """A function's result without and with checkpointing."""
    found = []
    for flag in (False, True):
        flow.gradient_checkpointing = flag
        found.append(function(*inputs))
    return found


def gradient(function, x):
    leaf = x.clone().requires_grad_(True)
    return torch.autograd.grad(function(leaf), leaf)[0]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same(name):
    flow = FLOWS[name](torch.double)
    flow.grid = Grid(4)
    z = latents(flow, 6)
    x = flow.decode(z)
    functions = {
        "decode": (lambda z: flow.decode(z).sin().sum(), z),
        "decode with log-det": (lambda z: sum(v.sin().sum() for v in flow.decode_and_log_det(z)), z),
        "encode": (lambda x: flow.encode(x).sin().sum(), x),
        "log-density": (lambda x: flow.log_prob(x).sum(), x),
    }
    for label, (function, at) in functions.items():
        plain, again = both(flow, gradient, function, at)
        assert plain.abs().max() > 0, label
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-10, msg=label)


def test_second_derivatives_vmap_and_grad_of_torch_func():
    flow = mlp_flow(3, torch.double)
    z = latents(flow, 4)

    def energy(row):
        return flow.decode(row).sin().sum()

    for function in (torch.func.grad(energy), torch.func.jacrev(torch.func.grad(energy))):
        plain, again = both(flow, lambda f=function: torch.func.vmap(f)(z))
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-10)


def saved_numbers(work):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return sum(sizes.values()), result


def test_one_state_a_step_is_kept():
    flow = mlp_flow(5, torch.double)
    z = latents(flow, 100).requires_grad_(True)
    (everything, _), (states, _) = both(flow, lambda: saved_numbers(lambda: flow.decode(z)))
    basis = sum(v.numel() for v in flow.basis.buffers())
    assert flow.grid.steps * z.numel() <= states <= (flow.grid.steps + 3) * z.numel() + basis
    assert everything > 20 * states


def test_no_gradient_no_second_run():
    flow = mlp_flow(2, torch.double)
    flow.velocity = Counting(flow.velocity)
    flow.gradient_checkpointing = True
    z = latents(flow, 3)
    with torch.no_grad():
        flow.decode(z)
    assert flow.velocity.calls == flow.grid.evaluations
    gradient(lambda z: flow.decode(z).sum(), z)
    assert flow.velocity.calls == 4 * flow.grid.evaluations  # forwards, every step again, every evaluation in it again


def test_gradients_of_weights_are_refused():
    flow = mlp_flow(2, torch.double)
    flow.gradient_checkpointing = True
    flow.velocity.requires_grad_(True)
    with pytest.raises(ValueError, match=r"expects frozen weights.*requires_grad_\(False\)"):
        flow.decode(latents(flow, 3))
    with torch.no_grad():
        flow.decode(latents(flow, 3))


def test_recompute_passes_a_tuple_through():
    y = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    def function(y):
        return y.sin(), y.square().sum(-1)

    expected = gradient(lambda y: function(y)[0].sum() + 2 * function(y)[1].sum(), y)
    found = gradient(lambda y: (lambda a, b: a.sum() + 2 * b.sum())(*recompute(function, y)), y)
    torch.testing.assert_close(found, expected)
