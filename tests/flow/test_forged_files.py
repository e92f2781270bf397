"""Flows in files whose checksum is right and whose content is not: refused with the reason, or harmless."""

import copy
import json
from itertools import product

import pytest
import torch
from torch.distributions import constraints

import ifpyro
from flows_zoo import FLOWS, mlp_flow
from ifpyro import InflationaryFlow, Schedule
from ifpyro.core.files import read_tensors, write_tensors
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.grid import Grid

JUNK = [None, True, -1, 0, 1e308, float("nan"), "x", [], {}, [3, "x"], {"kind": "mlp"}, 10**30, [[[]]]]


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(2, width=4, blocks=1, frequencies=1)
    basis = Basis(torch.zeros(2), torch.eye(2), torch.tensor([2.0, 1.0]))
    options = {"support": constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])), "report": {"a": 1}}
    return InflationaryFlow(basis, Schedule.details_first(), network, grid=Grid(2, knots=(0.0, 0.5, 1.0)), **options)


def leaves(value, at=()):
    """Paths to everything in nested plain data, from the whole to its entries."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*at, key))


def changed(header, at, junk):
    header = copy.deepcopy(header)
    place = header
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = junk
    return header


def loads_or_says_why(path):
    """Whether a file loads; then the flow must work."""
    try:
        flow = ifpyro.load(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return False
    x = flow.sample(3, seed=0)
    assert x.isfinite().all()
    assert flow.log_prob(x).isfinite().all()
    return True


def test_junk_anywhere_in_the_header(tmp_path):
    path = tmp_path / "flow"
    tiny().save(path)
    tensors, header = read_tensors(path, "flow")
    places = [at for at in leaves(header) if at and at[0] != "report"]
    assert len(places) > 25
    pairs = [*product(places, JUNK)][::3]  # all of them take too long
    refused = 0
    for at, junk in pairs:
        write_tensors(path, tensors, "flow", changed(header, at, junk))
        refused += not loads_or_says_why(path)
    assert refused > 0.7 * len(pairs)


def test_anything_missing_from_the_header(tmp_path):
    path = tmp_path / "flow"
    tiny().save(path)
    tensors, header = read_tensors(path, "flow")
    for name in header:
        write_tensors(path, tensors, "flow", {k: v for k, v in header.items() if k != name})
        assert loads_or_says_why(path) == (name in ("exact_up_to", "autocast"))  # older files lack them
    deep = json.loads("[" * 400 + "]" * 400)
    for name in ("support", "schedule", "network", "grid"):
        write_tensors(path, tensors, "flow", {**header, name: {"kind": "stack", "dim": -1, "parts": deep}})
        assert not loads_or_says_why(path)


SPOILS = {
    "NaN": lambda x: torch.full_like(x, torch.nan),
    "infinity": lambda x: torch.full_like(x, torch.inf),
    "zero": torch.zeros_like,
    "negative": lambda x: -x.abs(),
    "longer": lambda x: torch.cat([x, x]),
    "flat": lambda x: x.reshape(-1),
    "scalar": lambda x: x.sum(),
    "empty": lambda x: x[:0],
    "integers": lambda x: x.long(),
    "half": lambda x: x.half(),
    "missing": lambda x: None,
}


@pytest.mark.parametrize("make", [tiny, lambda: FLOWS["image"](torch.float32)], ids=["table", "image"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_tensors_that_do_not_fit(tmp_path, make, spoil):
    path = tmp_path / "flow"
    make().save(path)
    tensors, header = read_tensors(path, "flow")
    names = [name for name in tensors if name.startswith("basis.")] + [next(n for n in tensors if "velocity" in n)]
    loaded = set()
    for name in names:
        other = SPOILS[spoil](tensors[name]) if tensors[name].is_floating_point() else None
        rest = {k: v for k, v in tensors.items() if k != name}
        write_tensors(path, rest if other is None else {**rest, name: other}, "flow", header)
        if loads_or_says_why(path):
            loaded.add(name)
    if spoil in ("NaN", "infinity", "longer", "missing", "scalar"):
        assert not loaded
    if spoil == "zero":
        assert not loaded & {"basis.scale", "basis.unit"}


def test_every_setting_that_changes_numbers_is_kept(tmp_path):
    flow = mlp_flow(3, torch.float32)
    flow.exact_up_to, flow.refinements, flow.autocast = 2, 4, torch.bfloat16
    flow.save(tmp_path / "flow")
    again = ifpyro.load(tmp_path / "flow")
    assert (again.exact_up_to, again.refinements, again.autocast) == (2, 4, torch.bfloat16)
    x = flow.sample(5, seed=0)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    flow.exact_up_to, flow.autocast = 128, None
    assert not torch.equal(again.log_prob(x), flow.log_prob(x))
