"""What a user can get wrong, and the error that says so: type, and the part of the message that helps."""

import numpy as np
import pyro
import pyro.distributions as dist
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
from ifpyro.training import Recipe

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


def mixture(**parts):
    whole = {"weights": torch.ones(2), "means": torch.eye(2), "covariances": torch.eye(2).expand(2, 2, 2), **parts}
    return lambda: InflationaryFlow.from_gaussian_mixture(**whole)


def model(y):
    x = pyro.sample("x", FLOW.prior())
    pyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=y)


def smc(**options):
    return ifpyro.SMC(model, **{"num_particles": 8, "progress": False, **options})


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
    # options of fit, and what they are instead
    "a schedule by name": (fit(schedule="preserving"), TypeError, r"schedule expects a Schedule, such as .* got str"),
    "a schedule's class": (fit(schedule=Schedule), TypeError, "got the class Schedule, no instance of it"),
    "a recipe of options": (fit(recipe={"rate": 1e-3}), TypeError, r"recipe expects a Recipe, .* got dict"),
    "a recipe's class": (fit(recipe=Recipe), TypeError, "got the class Recipe, no instance"),
    "a pool by name": (fit(pool="world"), TypeError, r"pool expects a Pool, such as Pool.join\(\), .* got str"),
    "units by name": (fit(own_units="yes"), TypeError, "own_units expects True, False or None, got str"),
    "a seed of text": (fit(seed="a"), ValueError, r"seed expects an integer from 0 to 2\*\*63 - 1, got 'a'"),
    "a fractional seed": (fit(seed=1.5), ValueError, "seed expects an integer .* got 1.5"),
    "a large seed": (fit(seed=2**70), ValueError, "seed expects .* got 1180591620717411303424"),
    "a negative seed": (fit(seed=-1), ValueError, "seed expects an integer .* got -1"),
    "a seed of True": (fit(seed=True), ValueError, "seed expects an integer .* got True"),
    "an unknown device": (
        fit(device="gpu"),
        ValueError,
        "a device that is here, .* got 'gpu': Expected",
    ),
    "a device of no data": (fit(device="meta"), ValueError, "device expects .* got 'meta': it holds no data"),
    "a device of a number": (fit(device=7.5), ValueError, "device expects .* got '7.5': it is neither a name"),
    "a checkpoint of a number": (fit(checkpoint=3), TypeError, "expects a path, got int"),
    "seconds of True": (fit(max_seconds=True), ValueError, "max_seconds expects a positive number .* got True"),
    "tolerance without end": (fit(tolerance=np.inf), ValueError, "tolerance expects a positive number, got inf"),
    "a basis of a number": (fit(basis=3), ValueError, "basis expects 'auto', .* got 3"),
    "validation of text": (fit(validation="a"), TypeError, "expected validation to be an array of real numbers"),
    "no batch": (lambda: Recipe(batch=0), ValueError, "Recipe: batch expects an integer >= shared=8 .* got 0"),
    "a batch below what shares a time": (lambda: Recipe(batch=4), ValueError, "batch expects .* >= shared=8 .* got 4"),
    "no validation": (lambda: Recipe(check_every=0), ValueError, "check_every expects an integer >= 1, got 0"),
    "none share": (lambda: Recipe(shared=0), ValueError, "shared expects an integer >= 1, got 0"),
    "no patience": (lambda: Recipe(patience=-1), ValueError, "patience expects an integer >= 0, got -1"),
    "steps of text": (lambda: Recipe(max_steps="a"), ValueError, "max_steps expects an integer >= 0, got 'a'"),
    "a negative rate": (lambda: Recipe(rate=-1.0), ValueError, "rate expects a number > 0, got -1.0"),
    "a rate of NaN": (lambda: Recipe(rate=float("nan")), ValueError, "rate expects a number > 0, got nan"),
    "negative decay": (lambda: Recipe(weight_decay=-1), ValueError, "weight_decay expects a number >= 0, got -1"),
    "an average of all": (lambda: Recipe(average=1.0), ValueError, "average expects a number >= 0 and < 1, got 1.0"),
    "one time": (lambda: Recipe(time_power=0), ValueError, "time_power expects a number > 0, got 0"),
    "a width of text": (fit(network={"width": "a"}), ValueError, "MLP expects integers .* width='a'"),
    "a fractional width": (fit(network={"width": 1.5}), ValueError, "MLP expects integers .* width=1.5"),
    "a dropout of text": (fit(network={"dropout": "a"}), ValueError, "MLP expects .* dropout='a'"),
    "a list of widths": (fit(network=[64]), TypeError, "Velocity or options for MLP, got list"),
    "a start of text": (lambda: Schedule.preserving(start="a"), ValueError, r"0 < start .* start='a'"),
    # a flow, and what is made of one
    "no basis": (
        lambda: InflationaryFlow(None, Schedule.preserving(), MLP(3)),
        TypeError,
        "expects a Basis, got NoneType",
    ),
    "a flow of a module": (
        lambda: InflationaryFlow(FLOW.basis, Schedule.preserving(), torch.nn.Linear(3, 3)),
        TypeError,
        r"velocity expects a Velocity, such as MLP\(dim\), got Linear",
    ),
    "a flow of a schedule's name": (
        lambda: InflationaryFlow(FLOW.basis, "preserving", MLP(3)),
        TypeError,
        "schedule expects a Schedule, .* got str",
    ),
    "a flow of a number of steps": (
        lambda: InflationaryFlow(FLOW.basis, Schedule.preserving(), MLP(3), grid=8),
        TypeError,
        r"grid expects a Grid, such as Grid\(8\), or None, got int",
    ),
    "a velocity on other axes": (
        lambda: InflationaryFlow(FLOW.basis, Schedule.preserving(), MLP(4)),
        ValueError,
        "a velocity on the 3 axes of the basis, got one on 4",
    ),
    "an event shape of text": (
        lambda: InflationaryFlow(FLOW.basis, Schedule.preserving(), MLP(3), event_shape="a"),
        ValueError,
        "event_shape expects a shape of integers .* got 'a'",
    ),
    "a transform of nothing": (
        lambda: ifpyro.FlowTransform(None),
        TypeError,
        "FlowTransform expects a flow, got NoneType",
    ),
    "a transform of a class": (
        lambda: ifpyro.FlowTransform(InflationaryFlow),
        TypeError,
        "FlowTransform expects a flow, got InflationaryFlow",
    ),
    "a check of nothing": (lambda: ifpyro.check(None, X), TypeError, "check expects a flow and then .* got NoneType"),
    "a check turned round": (lambda: ifpyro.check(X, FLOW), TypeError, "check expects a flow and then .* got Tensor"),
    "a check's seed": (lambda: ifpyro.check(FLOW, X, seed="a"), ValueError, "seed expects an integer .* got 'a'"),
    "times of text": (lambda: FLOW.participation_ratio("a"), TypeError, "expected t to be an array of real numbers"),
    "times beyond the end": (lambda: FLOW.participation_ratio(2.0), ValueError, r"times in \[0, 1\], got 2.0"),
    "compiled for no rows": (lambda: FLOW.compile(rows=0), ValueError, "compile: rows expects an integer .* got 0"),
    "x sparse": (lambda: FLOW.log_prob(X.to_sparse()), TypeError, r"a dense tensor, got layout .* use x.to_dense\(\)"),
    "rows at once of text": (lambda: FLOW.log_prob(X, batch_size="a"), ValueError, "batch_size expects .* got 'a'"),
    # files
    "a flow saved nowhere": (lambda: FLOW.save(None), TypeError, "expects a path, got NoneType"),
    "a flow saved as a folder": (lambda: FLOW.save("/tmp"), ValueError, "a file to write, but /tmp is a folder"),
    "a flow loaded from nothing": (lambda: ifpyro.load(None), TypeError, "load expects a path, got NoneType"),
    "loaded to an unknown device": (
        lambda: ifpyro.load("flow", device="gpu"),
        ValueError,
        "device expects .* got 'gpu'",
    ),
    # mixtures
    "a singular mixture": (mixture(covariances=torch.ones(2, 2, 2)), ValueError, r"components \[0, 1\] are not; add"),
    "a negative mixture": (mixture(covariances=-torch.eye(2).expand(2, 2, 2)), ValueError, r"components \[0, 1\] are"),
    "one singular component": (
        mixture(covariances=torch.stack([torch.eye(2), torch.ones(2, 2)])),
        ValueError,
        r"symmetric and positive definite, but those of components \[1\] are not",
    ),
    "a mixture that is not symmetric": (
        mixture(covariances=torch.tensor([[1.0, 0.5], [0.0, 1.0]]).expand(2, 2, 2)),
        ValueError,
        r"symmetric .* components \[0, 1\]",
    ),
    "negative weights": (
        mixture(weights=torch.tensor([1.0, -0.5])),
        ValueError,
        r"weights, got \[1.0, -0.5\]",
    ),
    "weights of NaN": (mixture(weights=torch.tensor([1.0, np.nan])), ValueError, "positive weights"),
    "means of NaN": (mixture(means=torch.full((2, 2), torch.nan)), ValueError, "finite means"),
    # samplers
    "SMC of a flow": (
        lambda: ifpyro.SMC(FLOW),
        TypeError,
        "SMC expects a Pyro .* got InflationaryFlow, which",
    ),
    "HMC of a prior": (
        lambda: ifpyro.HMC(FLOW.prior()),
        TypeError,
        r"a prior: .* pyro.sample\(\"x\", flow.prior",
    ),
    "slices of a flow": (lambda: ifpyro.EllipticalSlice(FLOW), TypeError, "got InflationaryFlow, which is a prior"),
    "a flow reparameterised": (lambda: ifpyro.reparam(FLOW), TypeError, "a Pyro model .* got InflationaryFlow"),
    "SMC without data": (
        lambda: smc().run(None),
        ValueError,
        "observes nothing, and argument 1 of it is None",
    ),
    "HMC without data": (
        lambda: ifpyro.MCMC(ifpyro.HMC(model), num_samples=2, progress=False).run(y=None),
        ValueError,
        "observes nothing, and y of it is None",
    ),
    "a sampler's seed": (lambda: smc(seed="a"), ValueError, "seed expects an integer .* got 'a'"),
    "a sampler's large seed": (
        lambda: smc(seed=2**70),
        ValueError,
        "seed expects .* got 1180591620717411303424",
    ),
    "particles of a fraction": (
        lambda: smc(num_particles=2.5),
        ValueError,
        "num_particles must be .* got 2.5",
    ),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_here(tmp_path):
    with pytest.raises(ValueError, match="device expects a device that is here, such as 'cpu', got 'cuda'"):
        fit(device="cuda")()
    FLOW.save(tmp_path / "flow")
    with pytest.raises(ValueError, match=r"device expects .* got 'cuda'"):
        ifpyro.load(tmp_path / "flow", device="cuda")


@pytest.mark.parametrize("network", [Scalar, Scalar(2, 2), MLP])
def test_a_network_to_load_that_is_none(network, tmp_path):
    FLOW.save(tmp_path / "flow")
    with pytest.raises(TypeError, match="load: network expects an instance of the Velocity"):
        ifpyro.load(tmp_path / "flow", network=network)


def test_mixtures_of_arrays_and_lists():
    flow = InflationaryFlow.from_gaussian_mixture([1, 1], np.array([[0, 0], [3, 3]]), [np.eye(2), 2 * np.eye(2)])
    assert flow.dtype == torch.float32
    assert flow.log_prob([0.0, 0.0]).isfinite()


def test_integers_of_numpy_are_integers():
    flow = fit(seed=np.int64(3), max_steps=np.int32(2), validation=np.float32(0.2), network={"width": np.int64(8)})()
    assert flow.report["training"]["validation_rows"] == 12
    assert flow.sample(np.int64(2), seed=np.uint8(1)).shape == (2, 3)
    assert flow.decoder(np.int16(1)).k == 1
