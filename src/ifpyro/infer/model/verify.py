"""Whether a batched density may be trusted: compared with the single-draw density, site by site, row by row.

A batched evaluation of ``n`` draws is right if row ``i`` is the single-draw result of ``q_i`` and depends on
nothing else. Checked at two different ``n``, neither of which is 1 nor a size that occurs in the model (a
coincidence of sizes lets misaligned shapes broadcast), for

* the value of every site and the log-probability of every site, row by row;
* gradients of both terms, with a different weight for every row;
* leakage: the gradient of one row's density with respect to all other rows must be exactly zero, and its
  value must stay the same to the last bits when the other rows move far away;
* control flow: no latent value may steer a Python branch, which a batch would take for all rows at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.errors import BatchingError
from ...core.messages import users_line
from .handlers import Evaluate, FromPrior
from .probe import Probes
from .runner import Batching, Runner


class BranchError(BatchingError):
    """The model turned a latent value into a Python number or a truth value."""


class _Watched(torch.Tensor):
    """A tensor that passes itself on through every operation and refuses to become a Python number."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__bool__", "item", "tolist", "__int__", "__float__", "__index__", "numpy", "__array__"):
            raise BranchError("a latent value was turned into a Python number or truth value")
        return super().__torch_function__(func, types, args, kwargs or {})


class Verifier:
    """Holds a model's batched evaluations against its probes.

    Args:
        runner: the model.
        probes: single-draw results.
    """

    def __init__(self, runner: Runner, probes: Probes):
        self.runner, self.probes = runner, probes
        self.branch = branch_on_latents(runner, probes.q[:2])

    def objection(self, what: str, batching: Batching, size: int | None = None) -> str | None:
        """Why a way of batching is wrong for density, values or prior draws, or None if it is right."""
        if self.branch is not None:
            return f"the model branches on latent values (if, while, .item() or bool() of a tensor){self.branch}"
        try:
            for part in self.probes.groups():
                if what == "density":
                    check_density(self.runner, batching, part)
                    check_isolation(lambda q: self.runner.terms(batching, q).log_terms(), part.q)
                elif what == "values":
                    with torch.no_grad():
                        check_values(self.runner.values(batching, part.q), part.singles)
                    check_isolation(lambda q: self.runner.values(batching, q), part.q)
                else:
                    self._check_prior_draws(batching, size or len(part.q))
        except BatchingError as error:
            return str(error)
        except Exception as error:  # whatever a model may raise when it meets a batch it was not written for
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}{_where(error)}"
        return None

    def check_some_values(self, batching: Batching, q: Tensor) -> None:
        """Raise `BatchingError` unless first, middle and last row equal single draws."""
        rows = _some_rows(len(q))
        values = self.runner.values(batching, q)
        check_values({name: value[rows] for name, value in values.items()}, [self.runner.single(q[i]) for i in rows])

    def _check_prior_draws(self, batching: Batching, n: int) -> None:
        runner = self.runner
        with torch.no_grad():
            if batching == "vmap":
                q = runner.draw("vmap", n, self.probes.q)
            else:
                run = runner.run(FromPrior(runner.layout, n, score=True))
                q = run.vector()
                # Draws follow the densities that the same run reports; are those the right ones?
                for i in _some_rows(n):
                    expected = runner.single(q[i]).totals()[0]
                    if not close_enough(run.totals()[0][i : i + 1], expected[None]):
                        raise BatchingError("prior draws do not follow the model's prior")
        if q.shape != (n, runner.layout.dim):
            raise BatchingError("prior draws have the wrong shape")
        for name, site in runner.layout.latents.items():
            if site.stop > site.start and len(torch.unique(q[:, site.start : site.stop], dim=0)) < n:
                raise BatchingError(f"prior draws of site {name!r} repeat", name)


def branch_on_latents(runner: Runner, q: Tensor) -> str | None:
    """Where the model's Python control flow depends on latent values, or None if it does not.

    Such a model may agree with its single-draw density on every probe and still be wrong elsewhere, when rows
    of one batch would take different branches.
    """
    single = runner.single

    def terms(row: Tensor) -> tuple[Tensor, Tensor]:
        return single(row).totals()

    try:
        with torch.no_grad():
            torch.func.vmap(terms)(q)
        return None
    except RuntimeError as error:
        text = str(error)
        if "data-dependent" in text or ".item()" in text:
            return _where(error)
    except Exception:  # any failure of vmap itself: ask the second witness
        pass
    try:
        with torch.no_grad():
            single(q[0].as_subclass(_Watched))
        return None
    except BranchError as error:
        return _where(error)
    except Exception:  # the subclass cannot pass through this model: nothing was learned
        return None


def _where(error: Exception) -> str:
    line = users_line(error.__traceback__)
    return "" if line is None else f" at {line}"


def check_density(runner: Runner, batching: Batching, probes: Probes) -> None:
    """Raise `BatchingError`, naming the site, unless the batched density is right at all probes."""
    n, singles = len(probes.q), probes.singles
    q = probes.q.detach().requires_grad_(True)
    with torch.enable_grad():
        run = runner.terms(batching, q)
        terms = run.totals()
    for part in ("log_prior", "log_likelihood"):
        ours = getattr(run, part)
        if set(ours) != set(getattr(singles[0], part)):
            raise BatchingError("the sites of the model differ between one draw and many")
        for name, value in ours.items():
            expected = torch.stack([getattr(single, part)[name].detach() for single in singles])
            if not close_enough(value.detach().expand(n), expected):
                raise BatchingError(f"the log-probability of site {name!r} differs from that of single draws", name)
    weights = torch.linspace(0.5, 1.5, n, dtype=q.dtype, device=q.device)
    for term, expected, part in zip(terms, probes.gradients, ("log-prior", "log-likelihood"), strict=True):
        if term.shape != (n,):
            raise BatchingError(f"the {part} has shape {tuple(term.shape)} for {n} draws")
        if not term.requires_grad:
            if bool((expected != 0).any()):
                raise BatchingError(f"the {part} lost its gradient")
            continue
        (gradient,) = torch.autograd.grad((weights * term).sum(), q, retain_graph=True)
        size = expected.abs().amax(-1, keepdim=True)
        tolerance = 10 * _tolerance(q.dtype)
        close = (gradient / weights[:, None] - expected).abs() <= tolerance * (1 + size)
        # A probe with an infinite gradient proves nothing either way.
        if not bool((close | ~torch.isfinite(expected).all(-1, keepdim=True)).all()):
            raise BatchingError(f"the gradient of the {part} differs from that of single draws")
        for row in (0, n - 1):
            (gradient,) = torch.autograd.grad(term[row], q, retain_graph=True)
            others = torch.arange(n, device=q.device) != row
            if bool((gradient[others] != 0).any()):
                raise BatchingError(f"the {part} of one draw depends on the other draws")


def check_values(values: dict[str, Tensor], singles: list[Evaluate]) -> None:
    """Raise `BatchingError`, naming the site, unless batched values ``(n, *shape)`` equal single draws'."""
    for name, expected in singles[0].values.items():
        stacked = torch.stack([single.values[name].detach() for single in singles])
        if name not in values:
            raise BatchingError(f"site {name!r} is missing from a batch of draws", name)
        if values[name].shape != (len(singles), *expected.shape) or not close_enough(values[name], stacked):
            raise BatchingError(f"the value of site {name!r} differs from that of single draws", name)


def check_isolation(evaluate: Callable[[Tensor], dict[str, Tensor]], q: Tensor) -> None:
    """Raise `BatchingError` if one row's results move when the others do.

    Finds leaks that gradients do not see (rounding, detached statistics, a maximum over all draws), also
    those that wake up far from the probes only. With the same row in the same place of the same shapes,
    arithmetic repeats itself exactly; only a few last bits are allowed for.
    """
    row = len(q) // 2
    with torch.no_grad():
        before = evaluate(q)
        for factor in (10.0, 1000.0):
            moved = factor * q
            moved[row] = q[row]
            try:
                after = evaluate(moved)
            except Exception:  # the model refuses such values: nothing was learned
                continue
            for name, value in before.items():
                few, many = value.expand(len(q), *value.shape[1:])[row], after[name]
                many = many.expand(len(q), *many.shape[1:])[row]
                bits = 32 * torch.finfo(few.dtype).eps if few.is_floating_point() else 0.0
                if not torch.allclose(few, many, rtol=bits, atol=bits, equal_nan=True):
                    raise BatchingError(f"site {name!r} of one draw depends on the other draws", name)


def _tolerance(dtype: torch.dtype) -> float:
    """Relative: rounding differs between batch sizes and an ODE amplifies it; a leak is of order one."""
    return float(torch.finfo(dtype).eps) ** 0.5 if dtype.is_floating_point else 0.0


def close_enough(value: Tensor, expected: Tensor) -> bool:
    """Whether two results for the same rows differ by rounding alone."""
    if expected.numel() == 0:
        return value.shape == expected.shape
    if not expected.dtype.is_floating_point:
        return torch.equal(value, expected)
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(value)):
        return False
    magnitude = torch.where(finite, expected.abs(), expected.new_zeros(()))
    size = magnitude.flatten(1).amax(1).reshape(-1, *(1,) * (expected.dim() - 1)) if expected.dim() > 1 else magnitude
    # Single draws may be of higher precision: a scalar of float32 gives way to one of float64, a batch does not.
    tolerance = max(_tolerance(value.dtype), _tolerance(expected.dtype))
    close = (value - expected).abs() <= tolerance * (1 + size)
    return bool((close | (value == expected) | (torch.isnan(value) & torch.isnan(expected))).all())


def same_rows(runner: Runner, q: Tensor) -> bool:
    """Whether the first, middle and last row of the density under a plate equal those of single draws."""
    q = q.detach()
    rows = _some_rows(len(q))
    batched = runner.totals("plate", q)
    singles = [runner.safe_single(q[i]) for i in rows]
    pairs = zip(batched, zip(*singles, strict=True), strict=True)
    return all(close_enough(many[rows], torch.stack(list(few))) for many, few in pairs)


def _some_rows(n: int) -> list[int]:
    return sorted({0, n // 2, n - 1})
