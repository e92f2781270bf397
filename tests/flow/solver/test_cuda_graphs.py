"""When a decode is recorded, played, or run as it always is; with recordings that need no GPU.

The stand-in has a recording's memory: one place for rows, one for results, the activations of the last pass alone, and
these are spoilt by the way back. `test_accelerators.py` has the real ones.
"""

import copy

import pytest
import torch

from flows_zoo import latents, mlp_flow
from ifpyro.flow.solver import cuda_graphs as recorded
from ifpyro.flow.solver.cuda_graphs import MOST, Recordings
from ifpyro.flow.solver.grid import Grid

COUNTS = {"made": 0, "played": 0}


class StandIn(recorded._Recording):
    def __init__(self, solve, y, gradient, held):
        COUNTS["made"] += 1
        self.turn, self.solve, self._held, self._differentiable = 0, solve, held, gradient
        self._end = torch.full_like(solve(y.detach()), torch.nan)

    def forward(self, y):
        COUNTS["played"] += 1
        self._start = y.detach().clone().requires_grad_(self._differentiable)
        with torch.set_grad_enabled(self._differentiable):
            self._passed = self.solve(self._start)
        self._end.copy_(self._passed.detach())
        self.turn += 1
        return self._end

    def gradient(self, cotangent):
        (found,) = torch.autograd.grad(self._passed, self._start, cotangent)
        self._passed = None  # spoilt
        self.turn += 1
        return found


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    monkeypatch.setattr(recorded, "_Recording", StandIn)
    COUNTS.update(made=0, played=0)


def solve(y):
    return torch.sin(y) * y.sum(-1, keepdim=True)


def play(recordings, y, state=("map",), grid="grid", held=(), what=solve):
    return recordings.play(what, y, state, grid, lambda: held)


def test_the_third_call_is_recorded_and_results_are_ones_own():
    recordings = Recordings()
    rows = [torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    kept = [play(recordings, y) for y in rows]
    assert COUNTS == {"made": 1, "played": 4}
    for y, x in zip(rows, kept, strict=True):
        assert torch.equal(x, solve(y))
    play(recordings, rows[0][:2])  # another size
    play(recordings, rows[0], grid="another grid")
    assert COUNTS["made"] == len(recordings) == 1
    play(recordings, rows[0], state=("another map",))
    assert len(recordings) == 0


def test_gradients_in_any_order_and_more_than_once():
    recordings = Recordings()
    leaves = [torch.randn(4, 3, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in range(5)]
    ends = [play(recordings, leaf).square().sum() for leaf in leaves]
    for k in (4, 2, 3, 0, 2, 4):
        (found,) = torch.autograd.grad(ends[k], leaves[k], retain_graph=True)
        (expected,) = torch.autograd.grad(solve(leaves[k]).square().sum(), leaves[k])
        torch.testing.assert_close(found, expected)
    assert len(recordings) == 1
    with torch.no_grad():
        play(recordings, leaves[0])
    assert len(recordings) == 1  # without a gradient it is another decode


def test_second_derivatives_and_batches_of_cotangents():
    recordings, y = Recordings(), torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        play(recordings, y.requires_grad_())

    def of(decode):
        hessian = torch.autograd.functional.hessian(lambda v: decode(v).square().sum(), y)
        jacobian = torch.autograd.functional.jacobian(decode, y, vectorize=True)
        return hessian, jacobian

    for found, expected in zip(of(lambda v: play(recordings, v)), of(solve), strict=True):
        torch.testing.assert_close(found, expected)
    assert COUNTS["played"] > 2


def test_weights_changed_between_a_decode_and_its_gradient():
    recordings, weight = Recordings(), torch.tensor(2.0)
    leaf = torch.ones(2, 3).requires_grad_()
    for _ in range(3):
        end = play(recordings, leaf, held=("solver", weight), what=lambda y: weight * solve(y)).sum()
    weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(end, leaf)


def test_the_one_that_rested_longest_makes_way():
    recordings = Recordings()
    for rows in range(1, MOST + 1):
        for _ in range(3):
            play(recordings, torch.zeros(rows, 2))
    play(recordings, torch.zeros(1, 2))  # not the oldest any more
    for _ in range(3):
        play(recordings, torch.zeros(MOST + 1, 2))
    assert len(recordings) == MOST
    made = COUNTS["made"]
    play(recordings, torch.zeros(1, 2))
    assert COUNTS["made"] == made
    play(recordings, torch.zeros(2, 2))  # was seen often, and is recorded again at once
    assert COUNTS["made"] == made + 1


def test_copies_start_anew():
    flow = mlp_flow(3, torch.double, grid=Grid(2))
    for _ in range(3):
        play(flow.map.recordings, latents(flow, 2))
    assert len(flow.map.recordings) == 1
    assert len(copy.deepcopy(flow).map.recordings) == 0
    for change in (lambda: flow.to(torch.float32), lambda: flow.load_state_dict(flow.state_dict())):
        for _ in range(3):
            play(flow.map.recordings, latents(flow, 2))
        change()
        assert len(flow.map.recordings) == 0


def test_what_is_never_recorded(monkeypatch):
    """On a pretended GPU."""
    from ifpyro.flow.solver import discrete_map as solving

    flow = mlp_flow(3, torch.double, grid=Grid(2))
    z = latents(flow, 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class Pretended:
        is_cuda, requires_grad = True, True

        def __len__(self):
            return 2

    monkeypatch.setattr(solving, "unpack_dual", lambda y: torch.autograd.forward_ad.UnpackedDualTensor(y, None))
    pretended = Pretended()
    assert not flow.map._is_recorded(pretended)  # not asked for
    flow.cuda_graphs = True
    assert flow.map._is_recorded(pretended)
    assert not flow.map._is_recorded(z)  # not on a GPU
    flow.gradient_checkpointing = True
    assert not flow.map._is_recorded(pretended)
    flow.gradient_checkpointing = False
    flow.velocity.train()
    assert not flow.map._is_recorded(pretended)
    flow.eval().requires_grad_(True)
    assert not flow.map._is_recorded(pretended)
    flow.requires_grad_(False)
    seen = []
    torch.func.vmap(lambda v: seen.append(flow.map._is_recorded(pretended)) or v)(z)
    assert seen == [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not flow.map._is_recorded(pretended)
