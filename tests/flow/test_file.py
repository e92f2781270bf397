import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import constraints

import ifpyro
from flows_zoo import FLOWS, STACK, latents, mlp_flow, random_mlp
from ifpyro import InflationaryFlow, Schedule
from ifpyro.core.files import read_tensors, write_tensors
from ifpyro.data.support import support_from_dict, support_to_dict
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.networks.velocity import Velocity
from ifpyro.flow.solver.grid import Grid

SAVED = ["network 2", "network 8", "image", "positive image"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
@pytest.mark.parametrize("name", SAVED)
def test_round_trip_is_bitwise(name, dtype, path):
    flow = FLOWS[name](dtype)
    flow.save(path)
    again = ifpyro.load(path)
    assert again.dtype == dtype
    assert again.event_shape == flow.event_shape
    assert not any(p.requires_grad for p in again.parameters())
    z = latents(flow, 5)
    x = flow.decode(z)
    assert torch.equal(again.decode(z), x)
    assert torch.equal(again.encode(x), flow.encode(x))
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    for key, value in flow.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        assert again.state_dict()[key].dtype == value.dtype


def test_every_option_is_kept(path):
    report = {"training": {"rows": 10, "history": [[0, 1.0]], "stopped": "patience"}, "note": "é"}
    flow = mlp_flow(
        3,
        torch.float32,
        Schedule.reducing(keep=2, gap=0.5, start=0.02, end=1.5),
        support=constraints.interval(-1.0, 2.5),
        grid=Grid(7, 1.25, "heun3"),
        coarse_steps=3,
        refinements=5,
        report=report,
    )
    flow.save(path)
    again = ifpyro.load(path)
    for attribute in ("schedule", "grid", "coarse_steps", "refinements", "report"):
        assert getattr(again, attribute) == getattr(flow, attribute)
    assert (again.support.lower_bound, again.support.upper_bound) == (-1.0, 2.5)


SUPPORTS = [
    constraints.real,
    constraints.positive,
    constraints.nonnegative,
    constraints.unit_interval,
    constraints.simplex,
    constraints.interval(-1.0, 2.0),
    constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])),
    constraints.greater_than(1.5),
    constraints.greater_than_eq(-1.5),
    constraints.less_than(0.5),
    STACK,
    constraints.cat([constraints.positive, constraints.stack([constraints.real] * 2, -1)], -1, [1, 2]),
]


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_supports_have_a_plain_form(support):
    plain = json.loads(json.dumps(support_to_dict(support)))
    again = support_from_dict(plain)
    assert type(again) is type(support)
    assert support_to_dict(again) == plain
    for bound in ("lower_bound", "upper_bound"):
        if hasattr(support, bound):
            assert torch.equal(torch.as_tensor(getattr(again, bound)), torch.as_tensor(getattr(support, bound)))


class Rotation(Velocity):
    """A network of a user's own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.0, 0.3], [-0.3, 0.1]]))

    def embed(self, t):
        return t[:, None].to(self.weight.dtype)

    def forward(self, y, embedding):
        return torch.tanh(y @ self.weight) * embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_network_of_the_users_own(path, dtype):
    network = Rotation()
    with torch.no_grad():
        network.weight.mul_(1.7)
    flow = InflationaryFlow(mlp_flow(2, dtype).basis, Schedule.preserving(), network.to(dtype))
    flow.save(path)
    with pytest.raises(ValueError, match="network="):
        ifpyro.load(path)
    again = ifpyro.load(path, network=Rotation())
    z = latents(flow, 5)
    assert torch.equal(again.decode(z), flow.decode(z))
    with pytest.raises(ValueError, match="do not fit the network"):
        ifpyro.load(path, network=MLP(2, width=8))


def test_load_onto_a_device(path):
    mlp_flow(2, torch.float32).save(path)
    assert ifpyro.load(path, device="meta").device.type == "meta"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(path, monkeypatch, broken):
    old = mlp_flow(2, torch.float32)
    old.save(path)
    content = path.read_bytes()

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, broken, crash)
    with pytest.raises(OSError, match="no space left"):
        mlp_flow(3, torch.float32).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    mlp_flow(3, torch.float32).save(path)  # and the next attempt works
    assert ifpyro.load(path).latent_dim == 3


def test_saving_overwrites(path):
    mlp_flow(2, torch.float32).save(path)
    mlp_flow(3, torch.float32).save(str(path))
    assert ifpyro.load(str(path)).latent_dim == 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_pickle_inside(path):
    mlp_flow(2, torch.float32).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "ifpyro-flow"
    assert json.loads(metadata["header"])["schedule"]["kind"] == "details_first"


@pytest.fixture
def small(tmp_path):
    """A flow whose file is short enough to damage everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(2, width=4, blocks=1, frequencies=1)
    basis = Basis(torch.zeros(2), torch.eye(2), torch.tensor([2.0, 1.0]))
    flow = InflationaryFlow(basis, Schedule.details_first(), network, report={"rows": 7})
    flow.save(tmp_path / "small.safetensors")
    return flow, tmp_path / "small.safetensors"


def same(a, b):
    plain = all(getattr(a, name) == getattr(b, name) for name in ("schedule", "grid", "report", "event_shape"))
    tensors = all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    return plain and tensors and (a.refinements, a.coarse_steps) == (b.refinements, b.coarse_steps)


def test_a_flipped_byte_is_noticed_wherever_it_is(small):
    flow, path = small
    content = path.read_bytes()
    unnoticed = 0
    for position in [*range(0, 1600), *range(1600, len(content), 7)]:
        for bit in (1, 4):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = ifpyro.load(path)
            except ValueError:
                continue
            unnoticed += 1
            assert same(found, flow), f"bit {bit} of byte {position} changed the flow silently"
    assert unnoticed < 40  # padding, and names that nobody reads


def test_a_truncated_file_is_noticed_wherever_it_ends(small):
    path = small[1]
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 4, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            ifpyro.load(path)


def test_tensors_of_any_kind(tmp_path):
    tensors = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.double),
        "integers": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "twice": torch.ones(2).expand(3, 2),
    }
    write_tensors(tmp_path / "file", tensors, "test", {"a": [1, None]})
    found, header = read_tensors(tmp_path / "file", "test")
    assert header == {"a": [1, None]}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


def test_files_of_others_are_refused(path):
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="says None"):
        ifpyro.load(path)
    write_tensors(path, {"a": torch.zeros(2)}, "checkpoint", {})
    with pytest.raises(ValueError, match="ifpyro-checkpoint"):
        ifpyro.load(path)


def test_random_networks_differ():
    """Guards the tests above: a saved zero network would make every comparison trivial."""
    assert random_mlp(2).outlet.weight.abs().max() > 0.1
