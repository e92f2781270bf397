"""Many data sets of one model in one batch: rows come in equal consecutive runs, one run per data set.

    log p(q_i, data_s(i)) = log_prior(q_i) + log_likelihood(q_i; data_s(i)),        s(i) = i // (n / S)

so that simulation-based calibration pays for one large batch instead of hundreds of small ones. As for one data set
(`ifpyro.infer.model.batched`), a batched evaluation is believed only after it has agreed with single draws: here, each
with its own data, values and gradients, at two sizes, and in every size met later.

Engines that pool anything over rows (metric, jumps, temperatures) look at `families` and pool within one data set
only.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from ...core.errors import BatchingError
from ...core.precision import full_precision
from ...core.randomness import alone, seeded
from .batched import BatchedModel
from .handlers import Evaluate
from .probe import Probes
from .runner import Batching, InChunks, Runner, Totals, gradient
from .simulate import with_data
from .verify import check_density, check_isolation, close_enough

_Model = Callable[..., Any]


class _RowRunner(Runner):
    """A runner whose rows have data of their own, ``(n, *shape)`` per observed site."""

    def __init__(
        self, base: Runner, model: _Model, prepare: Callable[[_Model], _Model], data: Mapping[str, Tensor]
    ) -> None:
        super().__init__(prepare(model), base.args, base.kwargs, base.layout)
        self._plain, self._prepare, self._data = model, prepare, dict(data)
        self.flows = base.flows

    def row(self, i: int) -> Runner:
        """The runner of one row."""
        return self._over({name: value[i] for name, value in self._data.items()})

    def terms(self, batching: Batching, q: Tensor) -> Evaluate:
        """See `Runner.terms`."""
        if batching == "plate":
            return self._over(self._data, self.layout.depth).terms("plate", q)

        def one(
            row: Tensor, data: dict[str, Tensor], decoded: dict[str, Tensor]
        ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            run = self._over(data).single(row, decoded)
            return run.log_prior, run.log_likelihood

        result = Evaluate(self.layout, len(q))
        result.log_prior, result.log_likelihood = torch.func.vmap(one)(q, self._data, self.decode(q))
        return result

    def totals(self, batching: Batching, q: Tensor) -> Totals:
        """See `Runner.totals`."""
        try:
            if len(q) > 1 and batching != "loop":
                return self.terms(batching, q).totals()
        except torch.linalg.LinAlgError:
            pass  # one draw spoils the batch: find out which
        rows = [self.row(i).safe_single(point) for i, point in enumerate(q)]
        return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])

    def _over(self, data: Mapping[str, Tensor], depth: int | None = None) -> Runner:
        runner = Runner(self._prepare(with_data(self._plain, data, depth)), self.args, self.kwargs, self.layout)
        runner.flows = self.flows
        return runner


class ManyDataSets:
    """A Pyro model with many data sets as one batched density, for the engines (`BatchedDensity`).

    Args:
        model: any Pyro model that `BatchedModel` accepts.
        args: its positional arguments; the data among them give shapes and are otherwise replaced.
        kwargs: its keyword arguments.
        data: observed site to the values of all data sets, ``(S, *shape)``.
        batch_size: at most this many draws are evaluated at once; None evaluates all.
        seed: of the draws on which the batching is verified.

    Raises:
        ValueError: if the data do not fit the model; whatever `BatchedModel` raises.

    Attributes:
        base: the same model with the first data set.
        data: as given.
        families: number of data sets ``S``.
        batching: ``"plate"``, ``"vmap"`` or ``"loop"``.
    """

    @alone()
    @full_precision()
    def __init__(
        self,
        model: _Model,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        data: Mapping[str, Tensor],
        *,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        counts = {len(value) for value in data.values()}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"data must hold the same number of data sets for every site, got {sorted(counts)}")
        self.families: int = counts.pop()
        self._batch_size = batch_size
        first = {name: value[0] for name, value in data.items()}
        self.base = BatchedModel(with_data(model, first), args, kwargs, seed=seed)
        self.dim, self.gaussian_prior = self.base.dim, self.base.gaussian_prior
        self.device, self.dtype = self.base.device, self.base.dtype
        self._model = model
        self.data = {name: value.to(self.device) for name, value in data.items()}
        self._trusted: set[int] = set()
        self._objections: list[str] = []
        with seeded(seed), pyro.validation_enabled(False):
            self.batching = self._choose(("plate", "vmap", "loop"))

    def __call__(self, q: Tensor) -> Totals:
        """Differentiable ``(log_prior, log_likelihood)``, each ``(n,)``, for ``n / S`` rows of every data set.

        Raises:
            ValueError: if ``n`` is not a multiple of ``S``: which data set a row belongs to would be a guess.
        """
        if len(q) % self.families:
            raise ValueError(
                f"expected the same number of rows for each of {self.families} data sets, got {len(q)} rows"
            )
        return self.at(q, torch.arange(self.families, device=q.device).repeat_interleave(len(q) // self.families))

    @alone()
    @full_precision()
    def at(self, q: Tensor, index: Tensor) -> Totals:
        """The two terms for rows ``q``, ``(n, dim)``, of the data sets ``index``, ``(n,)``."""
        with pyro.validation_enabled(False):
            if self._batch_size is None or len(q) <= self._batch_size:
                return self._totals(q, index)
            # The data set travels with its row, so that no chunking can part them.
            labelled = torch.cat([q, index[:, None].to(q.dtype)], 1)
            totals: Totals = InChunks.apply(
                labelled, lambda rows: self._totals(rows[:, :-1], rows[:, -1].detach().long()), self._batch_size
            )
            return totals

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """See `BatchedDensity.sample_prior`."""
        return self.base.sample_prior(num, generator)

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """Latent sites and what flows make of them; other computed sites may depend on data and are left out."""
        values, latents = self.base.sites(q), self.base.latents
        return {name: value for name, value in values.items() if name in latents or f"{name}_base" in latents}

    def _totals(self, q: Tensor, index: Tensor) -> Totals:
        runner = self._runner(index)
        if self.batching == "plate" and len(q) not in self._trusted:
            self._trusted.add(len(q))
            with torch.no_grad():
                if not _same_rows(runner, q.detach()):
                    self.batching = self._choose(("vmap", "loop"))
        return runner.totals(self.batching, q)

    def _runner(self, index: Tensor) -> _RowRunner:
        data = {name: value[index] for name, value in self.data.items()}
        return _RowRunner(self.base.runner, self._model, self.base.prepare, data)

    def _choose(self, order: tuple[Batching, ...]) -> Batching:
        """The first way of batching that gives what single draws, each with its own data, give."""
        start = ("plate", "vmap", "loop").index(self.base.batching)
        for batching in order:
            if batching == "loop":
                return batching
            if ("plate", "vmap", "loop").index(batching) < start:
                continue
            reason = self._objection(batching)
            if reason is None:
                return batching
            self._objections.append(f"{batching}: {reason}")
        raise AssertionError("unreachable: the loop is always right")

    def _objection(self, batching: Batching) -> str | None:
        sizes = self._probe_sizes()
        num = sum(sizes)
        index = torch.arange(num, device=self.device) % self.families
        seed = int(torch.randint(2**31, ()))
        q = self.base.sample_prior(num, torch.Generator(device=self.device).manual_seed(seed))
        try:
            for rows in (slice(0, sizes[0]), slice(sizes[0], num)):
                runner = self._runner(index[rows])
                check_density(runner, batching, _probes(runner, q[rows], sizes))
                check_isolation(partial(_log_terms, runner, batching), q[rows])
        except BatchingError as error:
            return str(error)
        except Exception as error:  # whatever a model may raise when it meets a batch it was not written for
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return None

    def _probe_sizes(self) -> tuple[int, int]:
        taken = {size for value in self.data.values() for size in (*value.shape[1:], value[0].numel())}
        small, large = self.base.probe_sizes
        while small in taken or large in taken or small == large:
            small, large = small + 1, large + 2
        return small, large


def _log_terms(runner: _RowRunner, batching: Batching, q: Tensor) -> dict[str, Tensor]:
    return runner.terms(batching, q).log_terms()


def _probes(runner: _RowRunner, q: Tensor, sizes: tuple[int, int]) -> Probes:
    """Single-draw results, every row with its own data."""
    singles, gradients = [], []
    for i, point in enumerate(q):
        leaf = point.detach().requires_grad_(True)
        with torch.enable_grad():
            run = runner.row(i).single(leaf)
            terms = run.totals()
        gradients.append((gradient(terms[0], leaf), gradient(terms[1], leaf)))
        singles.append(run)
    prior, likelihood = (torch.stack(list(column)) for column in zip(*gradients, strict=True))
    return Probes(q, singles, (prior, likelihood), sizes, False)


def _same_rows(runner: _RowRunner, q: Tensor) -> bool:
    rows = sorted({0, len(q) // 3, len(q) // 2, len(q) - 1})
    try:
        batched = runner.totals("plate", q)
    except BatchingError:
        return False
    singles = [runner.row(i).safe_single(q[i]) for i in rows]
    pairs = zip(batched, zip(*singles, strict=True), strict=True)
    return all(close_enough(many[rows], torch.stack(list(few))) for many, few in pairs)
