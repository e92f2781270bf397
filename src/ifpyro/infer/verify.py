"""Whether a batched density may be trusted: comparison with the single-draw density, site by site, row by row.

A batched evaluation ``f`` of ``n`` draws is right if row ``i`` is the single-draw result of ``q_i`` and depends on nothing
else. Checked at two different ``n``, neither of which is 1 nor a size that occurs in the model (a coincidence of sizes lets
misaligned shapes broadcast), for

* the value of every site and the log-probability of every site, row by row;
* gradients of both terms, with random weights per row;
* leakage: the gradient of one row's density with respect to all other rows must be exactly zero;
* control flow: no latent value may steer a Python branch, which a batch would take for all rows at once.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ifpyro.infer.handlers import BatchingError, Evaluate

Run = Callable[[Tensor], Evaluate]
"""From ``q`` of shape ``(dim,)`` (single draw) or ``(n, dim)`` (batched) to a finished evaluation."""


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


def branches_on_latents(single: Run, q: Tensor) -> bool:
    """Whether any Python control flow of the model depends on latent values.

    Such a model may agree with its single-draw density on every probe and still be wrong elsewhere, when rows of one batch
    would take different branches.
    """

    def terms(row: Tensor) -> tuple[Tensor, Tensor]:
        return single(row).totals()

    try:
        with torch.no_grad():
            torch.func.vmap(terms)(q)
        return False
    except RuntimeError as error:
        text = str(error)
        if "data-dependent" in text or ".item()" in text:
            return True
    except Exception:  # any failure of vmap itself: ask the second witness
        pass
    try:
        with torch.no_grad():
            single(q[0].as_subclass(_Watched))  # type: ignore[arg-type]
        return False
    except BranchError:
        return True
    except Exception:  # the subclass cannot pass through this model: nothing was learned
        return False


def probe_sizes(sizes: Iterable[int]) -> tuple[int, int]:
    """Two batch sizes that occur nowhere among ``sizes``."""
    taken = set(sizes)
    free = [n for n in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37) if n not in taken][:2]
    if len(free) < 2:
        free = [n for n in range(2, len(taken) + 5) if n not in taken][:2]
    return free[0], free[1]


def sizes_in(*things: Any) -> set[int]:
    """Every dimension of every tensor (and shape) found in nested containers."""
    found: set[int] = set()
    for thing in things:
        if isinstance(thing, torch.Size):
            found |= set(thing)
        elif hasattr(thing, "shape"):
            found |= {int(n) for n in thing.shape} | {int(torch.Size(thing.shape).numel())}
        elif isinstance(thing, dict):
            found |= sizes_in(*thing.values())
        elif isinstance(thing, (list, tuple, set)):
            found |= {len(thing)} | sizes_in(*thing)
        elif isinstance(thing, int):
            found.add(thing)
    return found


def check_density(batched: Run, singles: list[Evaluate], q: Tensor, gradients: tuple[Tensor, Tensor]) -> None:
    """Raise `BatchingError`, naming the site, unless the batched density is right at ``q``.

    Args:
        batched: the evaluation under test.
        singles: single-draw evaluations of the rows of ``q``.
        q: probe draws, ``(n, dim)``, all different and with finite density.
        gradients: of the single-draw log-prior and log-likelihood, each ``(n, dim)``.
    """
    n = len(q)
    q = q.detach().requires_grad_(True)
    with torch.enable_grad():
        run = batched(q)
        terms = run.totals()
    for part in ("log_prior", "log_likelihood"):
        ours = getattr(run, part)
        if set(ours) != set(getattr(singles[0], part)):
            raise BatchingError("the sites of the model differ between one draw and many")
        for name, value in ours.items():
            expected = torch.stack([getattr(single, part)[name].detach() for single in singles])
            if not _agree(value.detach().expand(n), expected):
                raise BatchingError(
                    f"the log-probability of site {name!r} differs from that of single draws", name
                )
    weights = torch.linspace(0.5, 1.5, n, dtype=q.dtype, device=q.device)
    for term, expected, part in zip(terms, gradients, ("log-prior", "log-likelihood"), strict=True):
        if term.shape != (n,):
            raise BatchingError(f"the {part} has shape {tuple(term.shape)} for {n} draws")
        if not term.requires_grad:
            if bool((expected != 0).any()):
                raise BatchingError(f"the {part} lost its gradient")
            continue
        (gradient,) = torch.autograd.grad((weights * term).sum(), q, retain_graph=True)
        size = expected.abs().amax(-1, keepdim=True)
        tolerance = 10 * _tolerance(q.dtype)
        if not bool(((gradient / weights[:, None] - expected).abs() <= tolerance * (1 + size)).all()):
            raise BatchingError(f"the gradient of the {part} differs from that of single draws")
        for row in (0, n - 1):
            (gradient,) = torch.autograd.grad(term[row], q, retain_graph=True)
            gradient[row] = 0
            if bool((gradient != 0).any()):
                raise BatchingError(f"the {part} of one draw depends on the other draws")


def check_values(values: dict[str, Tensor], singles: list[Evaluate]) -> None:
    """Raise `BatchingError`, naming the site, unless batched site values ``(n, *shape)`` equal single draws'."""
    for name, expected in singles[0].values.items():
        stacked = torch.stack([single.values[name].detach() for single in singles])
        if name not in values:
            raise BatchingError(f"site {name!r} is missing from a batch of draws", name)
        if values[name].shape != (len(singles), *expected.shape) or not _agree(values[name], stacked):
            raise BatchingError(f"the value of site {name!r} differs from that of single draws", name)


def _tolerance(dtype: torch.dtype) -> float:
    """Relative: rounding differs between batch sizes, and an ODE inside amplifies it; a leak is of order one."""
    return float(torch.finfo(dtype).eps) ** 0.5 if dtype.is_floating_point else 0.0


def _agree(value: Tensor, expected: Tensor) -> bool:
    if expected.numel() == 0:
        return value.shape == expected.shape
    if not expected.dtype.is_floating_point:
        return torch.equal(value, expected)
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(value)):
        return False
    magnitude = torch.where(finite, expected.abs(), expected.new_zeros(()))
    size = (
        magnitude.flatten(1).amax(1).reshape(-1, *(1,) * (expected.dim() - 1))
        if expected.dim() > 1
        else magnitude
    )
    close = (value - expected).abs() <= _tolerance(expected.dtype) * (1 + size)
    return bool((close | (value == expected) | (torch.isnan(value) & torch.isnan(expected))).all())


def close_totals(batched: tuple[Tensor, Tensor], row: int, single: tuple[Tensor, Tensor]) -> bool:
    """Whether one row of batched ``(log_prior, log_likelihood)`` equals the single-draw pair."""
    return all(_agree(many[row : row + 1], one[None]) for many, one in zip(batched, single, strict=True))
