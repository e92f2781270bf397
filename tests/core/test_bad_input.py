"""What a user can get wrong, and the error that says so: type, and the part of the message that helps."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributions import constraints

import ifpyro
from flows_zoo import mlp_flow
from ifpyro import InflationaryFlow, Schedule
from ifpyro.core.files import write_tensors
from ifpyro.data.support import support_from_dict
from ifpyro.flow.axes.schedule import Schedule as AnySchedule
from ifpyro.flow.networks.images import build_velocity
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.grid import Grid

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
FLOW = mlp_flow(3, torch.float32)
POSITIVE = constraints.positive


def spoilt(row, column, value, x=X):
    x = x.clone()
    x[row, column] = value
    return x


def fit(x=X, **options):
    return lambda: ifpyro.fit(x, progress=False, max_steps=options.pop("max_steps", 1), **options)


def columns(*extra):
    return torch.cat([X, *extra], -1)


class Scalar(torch.nn.Linear):
    """A module that is no velocity."""


class Narrow(MLP):
    def forward(self, y, embedding):
        return super().forward(y, embedding)[:, :1]


CASES = {
    # samples
    "NaN row": (fit(spoilt(7, 1, torch.nan)), ValueError, r"1 of 60 rows .* rows \[7\]; drop or impute"),
    "infinite row": (fit(spoilt(59, 0, torch.inf)), ValueError, r"rows \[59\]"),
    "many NaN rows": (
        fit(torch.full((30, 2), torch.nan)),
        ValueError,
        r"30 of 30 rows .*\[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\]",
    ),
    "overflow in single precision": (
        lambda: FLOW.log_prob(torch.full((2, 3), 1.0, dtype=torch.double)),
        TypeError,
        "float32 on cpu, got torch.float64",
    ),
    "one axis": (fit(X[:, 0]), ValueError, r"\(N, \*event\), got \(60,\); for N scalars pass x\[:, None\]"),
    "a number": (fit(1.0), ValueError, r"\(N, \*event\), got \(\)"),
    "no columns": (fit(X[:, :0]), ValueError, r"at least one column, got shape \(60, 0\)"),
    "no rows": (fit(X[:0]), ValueError, "at least 16 training rows"),
    "too few rows": (fit(X[:15]), ValueError, r"at least 16 training rows for 3 columns .* got 1\d"),
    "fewer rows than columns": (
        fit(torch.randn(30, 40, generator=torch.Generator().manual_seed(0))),
        ValueError,
        "at least 42 training rows for 40 columns",
    ),
    "constant columns": (
        fit(columns(torch.full((60, 1), 5.0), torch.zeros(60, 1))),
        ValueError,
        r"columns \[3, 4\] .* constant; drop them, or dequantise",
    ),
    "collinear columns": (fit(columns(X[:, :1] - 2 * X[:, 1:2])), ValueError, r"columns \[0, 1, 3\] .* collinear"),
    "the same column twice": (fit(columns(X[:, 2:])), ValueError, r"columns \[2, 3\] .* collinear"),
    "strings": (fit(np.array([["a", "b"]] * 60)), TypeError, "real numbers, got dtype <U1; encode categories"),
    "objects": (fit(np.array([[1.0, None]] * 60)), TypeError, "real numbers, got dtype object"),
    "complex array": (fit(X.numpy().astype(complex)), TypeError, "real numbers, got dtype complex"),
    "complex tensor": (fit(X.to(torch.complex64)), TypeError, "to be real, got torch.complex64; stack"),
    "none": (fit(None), TypeError, "array of real numbers, got dtype object"),
    # validation rows and limits
    "validation of nothing": (fit(validation=0.0), ValueError, r"fraction in \(0, 1\)"),
    "validation of everything": (fit(validation=1.0), ValueError, r"fraction in \(0, 1\)"),
    "validation NaN": (fit(validation=float("nan")), ValueError, r"fraction in \(0, 1\)"),
    "validation rows of another shape": (
        fit(validation=X[:, :2]),
        ValueError,
        r"validation rows of event shape \(3,\), got an array of shape \(60, 2\)",
    ),
    "validation rows with NaN": (fit(validation=spoilt(4, 2, torch.nan)), ValueError, r"validation .* rows \[4\]"),
    "validation without rows": (fit(validation=X[:0]), ValueError, "validation rows of event shape"),
    "negative max_steps": (fit(max_steps=-1), ValueError, "max_steps expects an integer >= 0 .* got -1"),
    "fractional max_steps": (fit(max_steps=2.5), ValueError, "max_steps expects an integer .* got 2.5"),
    "boolean max_steps": (fit(max_steps=True), ValueError, "max_steps expects an integer .* got True"),
    "no seconds": (fit(max_seconds=0), ValueError, "max_seconds expects a positive number .* got 0"),
    "seconds NaN": (fit(max_seconds=float("nan")), ValueError, "max_seconds expects a positive number"),
    "seconds as text": (fit(max_seconds="60"), ValueError, "max_seconds expects a positive number .* got .60."),
    "no tolerance": (fit(tolerance=0.0), ValueError, "tolerance expects a positive number, got 0.0"),
    "an option that does not exist": (fit(epochs=3), TypeError, "epochs"),
    # supports
    "zero outside positive": (
        fit(spoilt(5, 0, 0.0, X.exp()), support=POSITIVE),
        ValueError,
        r"inside the support .* rows \[5\]",
    ),
    "negative outside positive": (
        fit(support=POSITIVE),
        ValueError,
        "strictly inside the support .* shrink them inwards",
    ),
    "one is no interior": (
        fit(spoilt(9, 1, 1.0, X.sigmoid()), support=constraints.unit_interval),
        ValueError,
        r"on its boundary: rows \[9\]",
    ),
    "rows that do not sum to one": (
        fit(X.exp(), support=constraints.simplex),
        ValueError,
        "inside the support Simplex",
    ),
    "validation outside the support": (
        fit(X.exp(), validation=spoilt(2, 0, -1.0, X.exp()), support=POSITIVE),
        ValueError,
        r"every row of validation .* rows \[2\]",
    ),
    "a support without a bijection": (fit(support=constraints.positive_definite), ValueError, "support expects one of"),
    "a support of no name": (fit(support="spere"), ValueError, "names real, positive, .* got 'spere'"),
    "a support of a foreign file": (lambda: support_from_dict({"kind": "sphere"}), ValueError, "got 'sphere'"),
    # schedules
    "start after end": (lambda: Schedule.preserving(start=1.0, end=0.5), ValueError, "0 < start < end < pi/2"),
    "no noise floor": (lambda: Schedule.preserving(start=0.0), ValueError, "0 < start"),
    "end beyond pi/2": (lambda: Schedule.details_first(end=1.6), ValueError, "end < pi/2"),
    "start NaN": (lambda: Schedule.details_first(start=float("nan")), ValueError, "0 < start"),
    "negative power": (lambda: Schedule.details_first(power=-1.0), ValueError, "finite power >= 0, got -1.0"),
    "infinite power": (lambda: Schedule.details_first(power=float("inf")), ValueError, "finite power"),
    "keep nothing": (lambda: Schedule.reducing(keep=0), ValueError, "keep to be an integer >= 1, got 0"),
    "keep a fraction": (lambda: Schedule.reducing(keep=1.5), ValueError, "keep to be an integer >= 1, got 1.5"),
    "keep too much": (fit(schedule=Schedule.reducing(keep=4, gap=0.5)), ValueError, "keep <= 3 axes .* got keep=4"),
    "gap of two": (lambda: Schedule.reducing(keep=1, gap=2.0), ValueError, "0 < gap < 2"),
    "g of another length": (
        fit(schedule=Schedule.exponential(1e-4, 1.0, [1.0, 1.0], 10.0)),
        ValueError,
        "one g an axis: 3 axes, got 2",
    ),
    "no gamma0": (lambda: Schedule.exponential(0.0, 1.0, [1.0], 1.0), ValueError, "gamma0, rho, T > 0"),
    "shrinking noise": (
        fit(schedule=Schedule.exponential(1e-4, 1.0, [1.0, -1.5, 1.0], 10.0)),
        ValueError,
        "never decrease",
    ),
    "negative scales": (lambda: Schedule.preserving().angles(torch.tensor([1.0, -1.0])), ValueError, "positive finite"),
    "unknown schedule": (lambda: AnySchedule.from_dict({"kind": "cosine"}), ValueError, "kind .* got 'cosine'"),
    # networks
    "unknown network option": (fit(network={"depth": 3}), ValueError, "options of MLP .*depth"),
    "no width": (fit(network={"width": 0}), ValueError, "width, blocks, frequencies >= 1"),
    "waves below none": (fit(network={"waves": -1}), ValueError, "waves >= 0 .* waves=-1"),
    "dropout of everything": (fit(network={"dropout": 1.0}), ValueError, "0 <= dropout < 1"),
    "a module that is no velocity": (
        fit(network=Scalar(3, 3)),
        TypeError,
        "velocity.Velocity or options for MLP, got Scalar",
    ),
    "a network of the wrong output": (fit(network=Narrow(3, 8)), ValueError, r"map \(n, 3\) to \(n, 3\), got \(2, 1\)"),
    "unknown network in a file": (lambda: build_velocity({"kind": "hat"}), ValueError, "got 'hat'"),
    # grids and fidelity
    "no steps": (lambda: Grid(0), ValueError, "steps to be a positive integer, got 0"),
    "fractional steps": (lambda: Grid(2.5), ValueError, "positive integer, got 2.5"),
    "no grid power": (lambda: Grid(4, power=0.0), ValueError, "power > 0, got 0.0"),
    "knots that start late": (lambda: Grid(4, knots=(0.1, 1.0)), ValueError, "knots from 0 to 1, got 0.1 to 1.0"),
    "knots that stand still": (lambda: Grid(4, knots=(0.0, 0.5, 0.5, 1.0)), ValueError, "knots that increase"),
    "unknown method": (lambda: Grid(4, method="rk45"), ValueError, "among .*'rk4'.*, got 'rk45'"),
    "fidelity of nothing": (lambda: ifpyro.fidelity().__enter__(), ValueError, "exactly one of them"),
    "fidelity of both": (lambda: ifpyro.fidelity("fine", steps=3).__enter__(), ValueError, "exactly one of them"),
    "unknown fidelity": (lambda: ifpyro.fidelity("rough").__enter__(), ValueError, "'fine' or 'coarse' .* got 'rough'"),
    "fidelity of no steps": (lambda: ifpyro.fidelity(steps=0).__enter__(), ValueError, "positive integer, got 0"),
    "fidelity of no evaluations": (lambda: ifpyro.fidelity(evaluations=0).__enter__(), ValueError, "integer, got 0"),
    "two fidelities": (lambda: ifpyro.fidelity(steps=3, evaluations=3).__enter__(), ValueError, "exactly one of them"),
    "fidelity True": (lambda: ifpyro.fidelity(steps=True).__enter__(), ValueError, "positive integer, got True"),
    # arguments of a flow
    "x of another event shape": (
        lambda: FLOW.encode(torch.zeros(5, 4)),
        ValueError,
        r"x of shape \(\*batch, 3\), got \(5, 4\)",
    ),
    "x without an event": (lambda: FLOW.log_prob(torch.tensor(1.0)), ValueError, r"x of shape .* got \(\)"),
    "z of another length": (lambda: FLOW.decode(torch.zeros(2)), ValueError, r"z of shape \(\*batch, 3\), got \(2,\)"),
    "x of another dtype": (
        lambda: FLOW.log_prob(torch.zeros(3).double()),
        TypeError,
        r"got torch.float64 .* x\.to\(flow",
    ),
    "x of integers": (lambda: FLOW.log_prob(torch.zeros(3, dtype=torch.long)), TypeError, "got torch.int64"),
    "x on another device": (lambda: FLOW.log_prob(torch.zeros(3, device="meta")), TypeError, "on cpu, got .* on meta"),
    "x of text": (
        lambda: FLOW.encode(["a"] * 3),
        TypeError,
        "x to be an array of real numbers, got dtype <U1",
    ),
    "x masked": (lambda: FLOW.encode(np.ma.masked_less(np.zeros(3), 1)), ValueError, "no masked entries"),
    "decoder of no latents": (lambda: FLOW.decoder(0), ValueError, "from 1 to 3 latents, got 0"),
    "decoder of too many": (lambda: FLOW.decoder(4), ValueError, "from 1 to 3 latents, got 4"),
    "decoder of a fraction": (lambda: FLOW.decoder(1.5), ValueError, "decoder expects an integer .* got 1.5"),
    "decoder of True": (lambda: FLOW.decoder(True), ValueError, "decoder expects an integer .* got True"),
    "a fraction of a draw": (lambda: FLOW.sample(2.5), ValueError, "sample expects a shape of integers .* got 2.5"),
    "fewer draws than none": (lambda: FLOW.sample(-1), ValueError, "sample expects a shape of integers .* got -1"),
    "draws of a shape of text": (lambda: FLOW.sample("12"), ValueError, "sample expects a shape .* got '12'"),
    "draws of True": (lambda: FLOW.sample((2, True)), ValueError, r"sample expects a shape .* got \(2, True\)"),
    "a sampling seed of text": (lambda: FLOW.sample(2, seed="a"), ValueError, "seed expects an integer .* got 'a'"),
    "an estimate of no rows at once": (
        lambda: FLOW.log_prob_estimate(X, batch_size=0),
        ValueError,
        "batch_size expects a positive integer, or None .* got 0",
    ),
    "decoder fed too much": (lambda: FLOW.decoder(2)(torch.zeros(5, 3)), ValueError, r"\(\*batch, 2\), got \(5, 3\)"),
    "mixture of mismatched shapes": (
        lambda: InflationaryFlow.from_gaussian_mixture(torch.ones(2), torch.zeros(2, 3), torch.zeros(2, 2, 2)),
        ValueError,
        r"weights \(K,\), means \(K, D\)",
    ),
    "cache of two": (lambda: FLOW.transform(cache_size=2), ValueError, "cache_size must be 0 or 1"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    attempt, kind, message = CASES[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        attempt()


def missing(path):
    return None


def directory(path):
    path.mkdir()


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("Not a flow, but a long enough text to be read as the head of a file.")


def foreign(path):
    save_file({"weight": torch.zeros(2)}, path)


def checkpoint(path):
    write_tensors(path, {"weight": torch.zeros(2)}, "checkpoint", {})


def truncated(path):
    FLOW.save(path)
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    FLOW.save(path)
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def edited(path):
    FLOW.save(path)
    path.write_bytes(path.read_bytes().replace(b'power\\": 1.0', b'power\\": 2.0'))


def newer(path):
    FLOW.save(path)
    path.write_bytes(path.read_bytes().replace(b'"format_version":"2"', b'"format_version":"9"'))


FILES = {
    missing: (FileNotFoundError, "found none"),
    directory: (FileNotFoundError, "found none"),
    empty: (ValueError, "damaged or was not written by ifpyro"),
    text: (ValueError, "damaged or was not written by ifpyro"),
    foreign: (ValueError, "format 'ifpyro-flow', but .* says None"),
    checkpoint: (ValueError, "says 'ifpyro-checkpoint'"),
    truncated: (ValueError, "damaged or was not written by ifpyro"),
    flipped: (ValueError, "does not match the checksum"),
    edited: (ValueError, "does not match the checksum"),
    newer: (ValueError, "format version 9, newer than the 2 .* upgrade ifpyro"),
}


@pytest.mark.parametrize("spoil", FILES)
def test_bad_files(spoil, tmp_path):
    path = tmp_path / "flow.safetensors"
    spoil(path)
    kind, message = FILES[spoil]
    with pytest.raises(kind, match=f"(?s){message}"):
        ifpyro.load(path)
