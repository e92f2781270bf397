"""What a posterior is judged by in peers_posterior.py: long references, and distances to them over time."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import ifpyro
import posterior
from ifpyro.infer.engines.guided_density import Target
from ifpyro.infer.engines.jumps import IndependenceProposal
from ifpyro.infer.model.batched import BatchedModel
from ifpyro.infer.results.diagnostics import convergence
from results import CACHE

LEVELS = torch.linspace(0.05, 0.95, 19, dtype=torch.double)
OBSERVED: dict[str, tuple[list[int], float]] = {
    "moons": ([1], 0.2),
    "scurve": ([0, 1], 0.1),
    "digits": (list(range(32)), 0.1),
}
ERRORS = (0.05, 0.02)

# -- references --------------------------------------------------------------------------------------------------------


def reference(name: str) -> tuple[Tensor, Tensor]:
    """Draws ``(n, E)`` and weights ``(n,)`` of a long run, kept in the cache; its two halves are independent.

    In the plane and in space: importance sampling from a mixture fitted to SMC's draws, a tenth of it the prior. For
    digits: two long runs of HMC, 64 chains each, started by SMC.
    """
    path = CACHE / f"reference-{name}.npz"
    if not path.exists():
        problem = posterior.PROBLEMS[name](False)
        x, w = (_two_long_chains if name == "digits" else _fitted_mixture)(problem)
        np.savez(path, x=x.numpy(), w=w.double().numpy())
    found = np.load(path)
    return torch.from_numpy(found["x"]), torch.from_numpy(found["w"])


def _two_long_chains(problem: posterior.Problem, draws: int = 500) -> tuple[Tensor, Tensor]:
    runs = []
    for seed in (100, 101):
        mcmc = ifpyro.MCMC(ifpyro.HMC(problem.model), draws, 100, num_chains=64, seed=seed, progress=False)
        runs.append(mcmc.run(problem.y).get_samples()["x"].flatten(1))
    x = torch.cat(runs)
    return x, torch.full((len(x),), 1 / len(x), dtype=torch.double)


def _fitted_mixture(problem: posterior.Problem, num: int = 80_000, rows: int = 4000) -> tuple[Tensor, Tensor]:
    smc = ifpyro.SMC(problem.model, 4096, seed=100, progress=False).run(problem.y)
    target = Target(BatchedModel(problem.model, (problem.y,)))
    proposal = IndependenceProposal(smc.positions().flatten(0, 1), target)
    generator = torch.Generator().manual_seed(101)
    xs, weights = [], []
    for _ in range(num // rows):
        q = proposal.sample(rows, generator)
        fine = target.fine(q)
        weights.append(fine.tempered(1.0) - proposal.log_density(q, fine.log_prior))
        with torch.no_grad():
            xs.append(problem.flow.decode(q).flatten(1))
    return torch.cat(xs), torch.softmax(torch.cat(weights).double(), 0)


def training_rows(name: str) -> Tensor:
    """The rows on which posterior.py trains its flows."""
    from sklearn.datasets import make_moons, make_s_curve

    if name == "digits":
        return posterior.demo.digits(0)[0].flatten(1)
    x = (make_moons if name == "moons" else make_s_curve)(20_000, noise=0.05, random_state=0)[0]
    return torch.as_tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)


# -- distances ---------------------------------------------------------------------------------------------------------


class Yardstick:
    """Distance of weighted draws to a reference: the larger of

    * the mean, over the coordinates of ``x`` that were not observed, of the largest gap between distribution functions
      at the reference's 19 quantiles from 5% to 95%;
    * for digits, the largest gap between the shares of a class.

    The largest gap over all pixels as well would measure luck: for ``n`` independent draws it is about 1.35 / sqrt(n),
    the mean 0.8 / sqrt(n).

    Args:
        name: of the problem.
        x: draws of the reference, ``(n, E)``.
        w: their weights, ``(n,)``.
    """

    def __init__(self, name: str, x: Tensor, w: Tensor) -> None:
        w = w / w.sum()
        seen = OBSERVED[name][0]
        self.columns = [k for k in range(x.shape[1]) if k not in seen and x[:, k].std() > 1e-3]
        self.cuts, self.exact = [], []
        for k in self.columns:
            value, order = x[:, k].sort()
            below = w[order].cumsum(0)
            cut = value[torch.searchsorted(below, LEVELS).clamp(max=len(below) - 1)]
            self.cuts.append(cut)
            self.exact.append(below[torch.searchsorted(value.contiguous(), cut, right=True) - 1])
        self.shares = class_shares(x, w) if name == "digits" else None

    def __call__(self, x: Tensor, log_weight: Tensor | None = None) -> float:
        """Of draws ``(n, E)`` with weights ``(n,)``."""
        w = torch.softmax(x.new_zeros(len(x)).double() if log_weight is None else log_weight.double(), 0)
        gaps = []
        for k, cut, exact in zip(self.columns, self.cuts, self.exact, strict=True):
            value, order = x[:, k].sort()
            below = torch.nn.functional.pad(w[order].cumsum(0), (1, 0))
            ours = below[torch.searchsorted(value.contiguous(), cut, right=True)]
            gaps.append(float((ours - exact).abs().max()))
        error = sum(gaps) / len(gaps)
        return error if self.shares is None else max(error, float((class_shares(x, w) - self.shares).abs().max()))


_CLASSIFIER: list[Any] = []


def class_shares(x: Tensor, w: Tensor) -> Tensor:
    """Weighted share of images in each class of digits, by a logistic regression."""
    if not _CLASSIFIER:
        data = posterior.load_digits()
        _CLASSIFIER.append(posterior.LogisticRegression(max_iter=1000).fit(data.data / 17, data.target))
    labels = torch.as_tensor(_CLASSIFIER[0].predict(x.numpy()))
    return torch.zeros(10, dtype=torch.double).index_add(0, labels, w.double())


def reference_error(name: str) -> float:
    """Error of the reference itself, from its halves: both are as far from the truth, so half of their distance."""
    x, w = reference(name)
    half = len(x) // 2
    return Yardstick(name, x[:half], w[:half])(x[half:], w[half:].log()) / 2


# -- judgement ---------------------------------------------------------------------------------------------------------


class Reports(NamedTuple):
    """What a sampler reported, block by block."""

    seconds: list[float]
    x: list[Tensor]  # (chains, draws, E)
    log_weight: list[Tensor | None]  # (chains, draws)
    alone: bool  # every block is a run of its own


def judge(name: str, blocks: list[dict[str, Any]], right: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """Errors over time, the seconds from which they stay within 5% and 2%, and ESS and R-hat at the end.

    Args:
        name: of the problem.
        blocks: what a sampler reported.
        right: draws and weights of its posterior; :func:`reference` if None.
    """
    if not blocks:
        return {"blocks": 0, "errors": []}
    reports = _decoded(name, blocks)
    errors = _errors(Yardstick(name, *(right or reference(name))), reports)
    found: dict[str, Any] = {"blocks": len(blocks), "errors": errors, "seconds": errors[-1][0]}
    for level in ERRORS:
        soon_enough = (s for k, (s, _) in enumerate(errors) if all(e <= level for _, e in errors[k:]))
        found[f"right {level}"] = next(soon_enough, None)
    return found | _mixing(reports)


def _decoded(name: str, blocks: list[dict[str, Any]]) -> Reports:
    flow = posterior.PROBLEMS[name](False).flow
    xs = []
    for block in blocks:
        values = torch.from_numpy(block["values"])
        if not block["in_x"]:
            flat = values.flatten(0, 1)
            with torch.no_grad():
                x = torch.cat([flow.decode(v).flatten(1) for v in flat.split(4096)])
            values = x.reshape(*values.shape[:2], -1)
        xs.append(values)
    weights = [None if b["log_weight"] is None else torch.from_numpy(b["log_weight"]).double() for b in blocks]
    return Reports([b["seconds"] for b in blocks], xs, weights, blocks[0]["fresh"])


def _errors(yardstick: Yardstick, reports: Reports, most: int = 30) -> list[tuple[float, float]]:
    """``(seconds, error)`` of every run, or of all draws so far."""
    if reports.alone:
        spans = [(k, k + 1) for k in range(len(reports.x))]
    else:
        spans = [(0, end) for end in sorted({round(v) for v in np.geomspace(1, len(reports.x), most)})]
    found = []
    for first, last in spans:
        x = torch.cat([v.flatten(0, 1) for v in reports.x[first:last]])
        weights = [w.flatten() for w in reports.log_weight[first:last] if w is not None]
        found.append((reports.seconds[last - 1], yardstick(x, torch.cat(weights) if weights else None)))
    return found


def _mixing(reports: Reports) -> dict[str, Any]:
    """ESS of the last run, or of all draws, and R-hat; a lone chain is split for it."""
    weights = [w.flatten() for w in reports.log_weight if w is not None]
    if weights:
        share = torch.softmax(torch.cat(weights), 0)
        return {"ess": None if reports.alone else float(1 / share.square().sum()), "r_hat": None}
    x = reports.x[-1] if reports.alone else torch.cat(reports.x, 1)
    chains, draws = x.shape[:2]
    if draws < 8:
        return {}
    halves = x[:, : draws - draws % 2].reshape(2, draws // 2, -1) if chains == 1 else x
    return {
        "ess": float(np.nanmin(convergence({"x": x})["x"]["n_eff"])),
        "r_hat": float(np.nanmax(convergence({"x": halves})["x"]["r_hat"])),
    }
