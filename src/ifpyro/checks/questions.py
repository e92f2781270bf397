r"""The questions that :func:`ifpyro.check` asks, each answered by rows of pass, warn or fail.

Two kinds of rows. *Measurements* of the numerics (round trip, log-determinant, solver) are compared with two limits.
*Tests* of the distribution ask two things apart, because with enough rows every trained flow differs from its data:

* is a deviation there? Its p-value, exact or by permutation, is compared with a level;
* does it matter? Its estimated size is compared with a limit that does not depend on the number of rows.

Both make a fail, evidence alone a warning.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..flow.axes.basis import Basis
from ..flow.axes.schedule import Schedule
from ..flow.flow import InflationaryFlow
from ..flow.networks.mlp import MLP
from ..flow.solver.fidelity import fidelity
from ..flow.solver.grid import Grid
from ..flow.tuning import doubling_error, round_trip
from .rows import Row, by_evidence, by_size
from .two_sample import (
    Array,
    Outcome,
    axes_normal,
    axes_power,
    classifier,
    energy,
    mean_above,
    radial_normal,
    sliced_wasserstein,
    total_power,
)

LIMITS: dict[str, tuple[float, float | None]] = {
    "finite": (0.0, 0.01),  # share of rows whose latent is not a number
    "round trip": (1e-4, 1e-2),  # standard deviations of the data
    "log-determinant": (1e-3, 0.05),  # nats
    "solver, map": (5e-3, 0.05),  # standard deviations, against half the step
    "solver, log-density": (0.05, 0.5),  # nats, against half the step
    "detectable shift": (0.5, None),  # standard deviations; with more, the tests see little
    "seen in training": (0.0, 0.01),  # share of held-out rows that are also in train
}
"""Measurements: above the first a row warns, above the second it fails."""

MATTERS = {
    "latent axes, shape": 0.05,  # probability: some quantile of an axis is off by five percentage points
    "latent axes, width": 0.3,  # variance of an axis: at 1.3 a nominal 90% interval covers 85%
    "latent width": 0.2,  # variance over all axes: at 1.2 a nominal 90% interval covers 87%
    "latent radius": 0.1,  # probability: a ball meant for some share of the data is off by ten percentage points
    "latent energy": 0.01,  # of the mean distance: as Gaussians a fifth of a standard deviation apart on every axis
    "latent classifier": 0.6,  # accuracy
    "over-fitting": 0.25,  # variance of held-out latents over that of training latents, less one
    "generated energy": 0.01,
    "generated, sliced": 0.1,  # standard deviations
    "generated classifier": 0.6,
    "below a Gaussian": 0.01,  # nats an axis
}
"""Tests: the size above which a significant deviation fails. Each takes its share of the level."""

PAIRS = 1000  # rows a sample in tests on pairs, and in training a classifier
MEASURED_ROWS = 256  # rows for the numerics
_CHUNK = 2048


@dataclass(frozen=True)
class Level:
    """How much evidence a test needs.

    Attributes:
        each: p-value below which one test is significant.
        permutations: enough for the smallest permutation p-value to be half of that.
    """

    each: float
    permutations: int

    @classmethod
    def of(cls, level: float) -> "Level":
        """The level shared among all tests (Bonferroni)."""
        each = level / len(MATTERS)
        return cls(each, int(np.ceil(2 / each)) - 1)


@dataclass(frozen=True)
class Solved:
    """Rows whose log-density has been computed, which costs a Jacobian an evaluation and is done once."""

    x: Tensor
    z: Tensor
    log_det: Tensor

    @classmethod
    def of(cls, flow: InflationaryFlow, x: Tensor) -> "Solved":
        """The first few rows of ``x``: fewer in more dimensions."""
        few = x[: _affordable(8192, MEASURED_ROWS, flow)]
        return cls(few, *flow.encode_and_log_det(few))

    def first(self, rows: int) -> "Solved":
        """The first of them."""
        return Solved(self.x[:rows], self.z[:rows], self.log_det[:rows])

    def log_prob(self) -> Tensor:
        """Log-densities, ``(n,)``."""
        return -0.5 * (self.z.square().sum(-1) + self.z.shape[-1] * math.log(2 * math.pi)) + self.log_det


def not_finite(latents: Tensor, samples: Tensor) -> Row:
    """Which share of held-out latents, or of samples, is NaN or infinite? Takes a mask of the finite rows of each."""
    worst = max(float((~rows).double().mean()) for rows in (latents, samples))
    return _measured(
        "finite", worst, "", f"share of {len(latents)} latents or {len(samples)} samples that are NaN or infinite"
    )


def numerical(flow: InflationaryFlow, x: Tensor, solved: Solved) -> list[Row]:
    """Is the map what it claims to be: inverse, log-determinant, and solution of its ODE?"""
    few = x[:MEASURED_ROWS]
    fewer, fewest = solved.first(_affordable(2048, 64, flow)), solved.first(_affordable(256, 16, flow))
    with fidelity(steps=2 * flow.grid.steps):
        density = float((flow.log_prob(fewer.x) - fewer.log_prob()).abs().mean())
    steps = f"{flow.grid.steps} steps against {2 * flow.grid.steps}"
    rmse, mean = f"RMSE over {len(few)} rows", "mean absolute error over"
    return [
        _measured("round trip", round_trip(flow, few)[0], "sd", f"{rmse} of decode(encode(x))"),
        _measured(
            "log-determinant", log_det_error(flow, fewest), "nat", f"{mean} {len(fewest.x)} rows, against autograd"
        ),
        _measured("solver, map", doubling_error(flow, flow.encode(few), flow.grid), "sd", f"{rmse}, {steps}"),
        _measured("solver, log-density", density, "nat", f"{mean} {len(fewer.x)} rows, {steps}"),
    ]


def log_det_error(flow: InflationaryFlow, solved: Solved) -> float:
    """Mean absolute difference of the log-determinant to that of the Jacobian by autograd.

    Where the event has more entries than the latent (a simplex), the Jacobian is of the map to unconstrained space.
    """
    x, log_det, dim = solved.x, solved.log_det, flow.latent_dim
    bijection = flow.bijection()
    decode: Callable[[Tensor], Tensor] = flow.decode
    if bijection is not None and flow.event_shape.numel() != dim:
        free = bijection.inv(x)
        log_det = log_det + bijection.log_abs_det_jacobian(free, x).reshape(len(x), -1).sum(-1)

        def decode(z: Tensor) -> Tensor:
            return bijection.inv(flow.decode(z))

    # One copy of each row for every output: rows do not mix, so one backward pass gives all rows of all Jacobians.
    with torch.enable_grad():
        copies = solved.z.repeat_interleave(dim, 0).requires_grad_()
        outputs = decode(copies).reshape(len(x), dim, dim).diagonal(dim1=1, dim2=2)
        jacobian = torch.autograd.grad(outputs.sum(), copies)[0].reshape(len(x), dim, dim)
    return float((log_det + torch.linalg.slogdet(jacobian)[1]).abs().mean())


def power_of_tests(rows: int, dim: int, level: Level) -> Row:
    """How large a shift of one latent axis would be found in four of five cases (a z test at the same level)."""
    from scipy.stats import norm

    shift = float((norm.isf(level.each / (2 * dim)) + norm.isf(0.2)) / np.sqrt(rows))
    return _measured(
        "detectable shift", shift, "sd", f"of one latent axis, with {rows} rows; more rows see smaller ones"
    )


def latent(z: Array, rng: np.random.Generator, level: Level) -> list[Row]:
    """Are held-out latents ``(n, D)`` standard normal?"""
    reference = rng.standard_normal((PAIRS, z.shape[1]))
    few = z[:PAIRS]
    shape, axis, total = axes_normal(z), axes_power(z), total_power(z)
    return [
        _tested("latent axes, shape", shape, level, "", f"largest CDF error, axis {shape.worst} of {z.shape[1]}"),
        _width("latent axes, width", axis, level, f"axis {axis.worst} of {z.shape[1]}"),
        _width("latent width", total, level, "all axes"),
        _tested("latent radius", radial_normal(z), level, "", "largest CDF error of |z|^2, chi-square"),
        _tested("latent energy", energy(few, reference, rng, level.permutations), level, "", "against N(0, I)"),
        _tested("latent classifier", classifier(few, reference, rng), level, "accuracy", "of telling from N(0, I)"),
    ]


def over_fitting(z: Array, train: dict[str, Any], level: Level) -> Row:
    """Are held-out latents wider than the latents of training rows?

    Args:
        z: held-out latents.
        train: figures of :func:`ifpyro.flow.tuning.latent_power` on training rows.
        level: of the tests.
    """
    per_row = np.square(z).mean(1)
    found = mean_above(per_row, train["mean"], train["standard_error"])
    held_out = float(per_row.mean())
    ratio = replace(found, effect=held_out / train["mean"] - 1)
    note = f"variance of latents {held_out:.3f} held out, {train['mean']:.3f} on {train['rows']} training rows"
    return _tested("over-fitting", ratio, level, "", note)


def seen_in_training(x: Tensor, train: Tensor) -> Row:
    """Which share of held-out rows is also among the training rows?"""
    known = {row.tobytes() for row in train.flatten(1).cpu().numpy()}
    share = float(np.mean([row.tobytes() in known for row in x.flatten(1).cpu().numpy()]))
    return _measured("seen in training", share, "", f"share of {len(x)} held-out rows that are equal to training rows")


def generated(x: Array, drawn: Array, rng: np.random.Generator, level: Level) -> list[Row]:
    """Do samples of the flow look like held-out rows? Columns in units of their pooled standard deviation."""
    x, drawn = x[:PAIRS], drawn[:PAIRS]
    spread = np.concatenate([x, drawn]).std(0)
    x, drawn = (rows / np.where(spread > 0, spread, 1.0) for rows in (x, drawn))
    on = f"{len(drawn)} samples against {len(x)} rows"
    return [
        _tested("generated energy", energy(x, drawn, rng, level.permutations), level, "", on),
        _tested("generated, sliced", sliced_wasserstein(x, drawn, rng, level.permutations), level, "sd", on),
        _tested("generated classifier", classifier(x, drawn, rng), level, "accuracy", "of telling samples from rows"),
    ]


def below_gaussian(solved: Solved, rival: InflationaryFlow, level: Level) -> Row:
    """Is the mean log-density of held-out rows below that of a Gaussian?"""
    own, other = _numbers(solved.log_prob()), _numbers(rival.log_prob(solved.x))
    deficit = mean_above(other - own)
    note = f"mean log-density {own.mean():.2f}, Gaussian {other.mean():.2f}, {len(own)} rows"
    each = replace(deficit, effect=deficit.effect / rival.latent_dim)
    return _tested("below a Gaussian", each, level, "nat/axis", note)


def gaussian(flow: InflationaryFlow, train: Tensor | None) -> InflationaryFlow:
    """The Gaussian with the moments of the unconstrained training rows ``(n, D)``, or else the flow's own."""
    # A velocity of zero makes a flow its own Gaussian; with it the schedule and the grid have no effect.
    basis = flow.basis
    if train is not None and basis.kind == "pca":  # otherwise there are too many columns for a covariance
        basis = Basis.from_samples(train, own_units=True)
    with torch.random.fork_rng(devices=[]):  # its layers draw weights that nothing uses
        velocity = MLP(flow.latent_dim, width=1, blocks=1).to(flow.basis.scale)
    return InflationaryFlow(
        basis, Schedule.preserving(), velocity, event_shape=flow.event_shape, support=flow.support, grid=Grid(1)
    )


def encoded(flow: InflationaryFlow, x: Tensor) -> Tensor:
    """Latents of any number of rows in bounded memory."""
    return torch.cat([flow.encode(part) for part in x.split(_CHUNK)])


def _affordable(entries: int, most: int, flow: InflationaryFlow) -> int:
    """Rows for work that takes a Jacobian a row: few where they are large."""
    return max(4, min(most, entries // flow.latent_dim))


def _measured(name: str, value: float, unit: str, note: str) -> Row:
    return by_size(name, value, unit, *LIMITS[name], note)


def _width(name: str, found: Outcome, level: Level, where: str) -> Row:
    # Too narrow is as wrong as too wide.
    size = replace(found, effect=abs(found.effect))
    return _tested(name, size, level, "", f"variance off 1, it is {1 + found.effect:.3f}, {where}")


def _tested(name: str, found: Outcome, level: Level, unit: str, note: str) -> Row:
    return by_evidence(name, found.effect, MATTERS[name], found.p, level.each, unit, note)


def _numbers(values: Tensor) -> Array:
    return values.double().cpu().numpy()
