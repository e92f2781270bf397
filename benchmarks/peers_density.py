"""Held-out log-likelihood at equal seconds of training: ifpyro beside zuko's and Pyro's flows, on eight data sets.

    python benchmarks/peers_density.py [--only moons ... digits] [--seconds 10 30] [--splits 3] [--quick] [--table]

Five toy sets whose density is known (`ifpyro.datasets.paper`, 20,000 rows, 10,000 held out) and three tables (see
density.py; split 60/20/20, means over splits). Ours goes first, with 0.85 of the budget for its steps; its limit is by
the clock on the wall, and is longer where other work shares the core. Every other model then gets as many processor
seconds as ours used in all, validation, set-up and the choice of our solver grid included; or the budget, where ours
stopped early.

Peers: zuko NSF, MAF and CNF (exact trace for scores, Hutchinson in training above 8 columns), Pyro spline coupling and
spline autoregressive flows, three layers with reversed order between them; AdamW, rate 1e-3 falling as a cosine over
the budget, clipped gradients, the best validated weights are scored; they stop early where validation has not improved
for a quarter of the budget. Their rows are standardised by column (and for tables also whitened: the better space
counts).

Results are kept in ``benchmarks/.cache`` and the table in RESULTS.md is made from all that are there.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pyro.distributions as pd
import pyro.distributions.transforms as pt
import torch
import zuko
from torch import Tensor, nn
from torch.distributions import constraints

import ifpyro
from density import TABLES, split
from ifpyro.flow.axes.basis import Basis
from results import CACHE, RESULTS, machine, write_section

TOYS = ("moons", "circles", "sine", "S-curve", "swirl")
NAMES = (*TOYS, *TABLES)
SINE = """
The sine is one smooth Gaussian conditional under a uniform first coordinate: an affine autoregressive layer (MAF) has
the right form of it from the start, the likely reason why it learns it sooner. The other toys fold over themselves."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--seconds", nargs="*", type=float, default=[10.0, 30.0])
    parser.add_argument("--splits", type=int, default=3, help="seeds of the tables (toys have one)")
    parser.add_argument("--quick", action="store_true", help="2 seconds, one split, nothing kept")
    parser.add_argument("--table", action="store_true", help="only make the table again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    CACHE.mkdir(exist_ok=True)
    if options.quick:
        options.seconds, options.splits = [2.0], 1
    for name in [] if options.table else options.only:
        for seconds in options.seconds:
            for seed in range(1 if name in TOYS else options.splits):
                found = compare(name, seconds, seed)
                print(name, seconds, seed, json.dumps(found), flush=True)
                if not options.quick:
                    path = CACHE / f"density-{name}-{seconds:g}-{seed}.json"
                    path.write_text(json.dumps(found))
    if not options.quick:
        lines = table()
        print("\n".join(lines))
        write_section(RESULTS, "density", lines)


# -- one data set, one budget ------------------------------------------------------------------------------------------


def load(name: str, seed: int) -> tuple[tuple[Tensor, ...], Any, float]:
    """Rows to train, validate and test on; the support; and the mean exact log-density of the test rows, or NaN."""
    if name in TOYS:
        toy = ifpyro.datasets.paper()[name]
        rows, test = toy.sample(20_000, seed=seed), toy.sample(10_000, seed=1000 + seed)
        return (rows[:18_000], rows[18_000:], test), None, float(toy.log_prob(test).mean())
    return split(name, seed), constraints.unit_interval if name == "digits" else None, math.nan


def compare(name: str, seconds: float, seed: int) -> dict[str, dict[str, float]]:
    """Mean held-out log-likelihood (tables: whitened units, digits as logits) and processor seconds of every model."""
    parts, support, exact = load(name, seed)
    limit = 0.85 * seconds / share_of_a_core()
    began = time.process_time()
    flow = ifpyro.fit(parts[0], validation=parts[1], support=support, seed=seed, max_seconds=limit, progress=False)
    took = time.process_time() - began
    granted = took if flow.report["training"]["stopped"] == "max_seconds" else max(took, seconds)
    score = float(scores(flow.log_prob, parts[2]).mean())
    free = parts
    if support is not None:
        free = tuple(torch.logit(p) for p in parts)
        score += float((parts[2].log() + torch.log1p(-parts[2])).sum(-1).mean())
    basis = Basis.from_samples(free[0])
    unit = 0.0 if name in TOYS else float(basis.scale.log().sum())
    found = {"ifpyro": {"score": score + unit, "seconds": took}}
    if name in TOYS:
        found["exact"] = {"score": exact, "seconds": 0.0}
    mean, sd = free[0].mean(0), free[0].std(0)
    spaces = {"standardised": (lambda x: (x - mean) / sd, -float(sd.log().sum()))}
    if name not in TOYS:
        spaces["whitened"] = (basis.to_standard, -float(basis.scale.log().sum()))
    for label, make in PEERS.items():
        for space, (to_space, offset) in spaces.items():
            began = time.process_time()
            score = train(make, tuple(to_space(p) for p in free), granted, seed) + offset + unit
            now = {"score": score, "seconds": time.process_time() - began}
            if label not in found or now["score"] > found[label]["score"]:
                found[label] = now | {"space": space}
    return found


def share_of_a_core() -> float:
    """Processor seconds per second of this process, one if it is alone."""
    x, wall, processor = torch.randn(128, 128), time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 2.0:
        x @ x
    return min(1.0, (time.process_time() - processor) / (time.perf_counter() - wall))


class PyroFlow(nn.Module):
    """Pyro's spline layers with reversed order between them, called as zuko's flows are."""

    def __init__(self, dim: int, layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.base = pd.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
        reverse = torch.arange(dim - 1, -1, -1)
        self.layers = nn.ModuleList(layer(dim) for _ in range(3))
        self.steps = [step for layer in self.layers for step in (layer, pt.Permute(reverse))]

    def forward(self) -> pd.TransformedDistribution:
        """The distribution."""
        return pd.TransformedDistribution(self.base, self.steps)


PEERS: dict[str, Callable[[int], nn.Module]] = {
    "zuko NSF": lambda d: zuko.flows.NSF(d, transforms=3, hidden_features=(64, 64)),
    "zuko MAF": lambda d: zuko.flows.MAF(d, transforms=5, hidden_features=(64, 64)),
    "zuko CNF": lambda d: zuko.flows.CNF(d, hidden_features=(64, 64), exact=d <= 8),
    "Pyro spline coupling": lambda d: PyroFlow(d, lambda d: pt.spline_coupling(d, hidden_dims=[64, 64], bound=4.0)),
    "Pyro spline autoregressive": lambda d: PyroFlow(
        d, lambda d: pt.spline_autoregressive(d, hidden_dims=[64, 64], bound=4.0)
    ),
}


def train(make: Callable[[int], nn.Module], parts: tuple[Tensor, ...], seconds: float, seed: int) -> float:
    """The mean held-out log-likelihood after so many processor seconds of training."""
    torch.manual_seed(seed)
    flow = train_flow(make(parts[0].shape[1]), parts[:2], seconds, seed)
    for module in flow.modules():
        if isinstance(module, zuko.flows.continuous.FFJTransform):
            module.exact = True
    return float(scores(lambda x: flow().log_prob(x), parts[2]).mean())


def train_flow(flow: nn.Module, parts: tuple[Tensor, ...], seconds: float, seed: int) -> nn.Module:
    """Train a peer for so many processor seconds; it returns with the weights that validated best."""
    train_rows, validation = parts
    optimiser = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=1e-4)
    batch = 64 if len(train_rows) < 5000 else 512
    generator = torch.Generator().manual_seed(seed)
    best, state, improved = math.inf, copy.deepcopy(flow.state_dict()), 0.0
    began = checked = time.process_time()
    order, place = torch.randperm(len(train_rows), generator=generator), 0
    while (spent := time.process_time() - began) < seconds:
        if place + batch > len(order):
            order, place = torch.randperm(len(train_rows), generator=generator), 0
        rows = train_rows[order[place : place + batch]]
        place += batch
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * min(1.0, spent / seconds)))
        optimiser.zero_grad()
        loss = -flow().log_prob(rows).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimiser.step()
        now = time.process_time()
        if now - checked > seconds / 40 or now - began >= seconds:
            value = -float(scores(lambda x: flow().log_prob(x), validation[:1000]).mean())
            checked = time.process_time()
            if value < best:
                best, state, improved = value, copy.deepcopy(flow.state_dict()), checked - began
            elif checked - began - improved > seconds / 4:
                break
    flow.load_state_dict(state)
    return flow


def scores(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([log_prob(rows) for rows in x.split(2000)])


# -- the table ------------------------------------------------------------------------------------------------------


def table() -> list[str]:
    """All kept results: nats below the exact log-density for toys, mean log-likelihood for tables."""
    models = ["ifpyro", *PEERS]
    lines = [
        "## Density: held-out log-likelihood at equal seconds of training\n",
        "Toys: nats below the exact mean log-density (less is better). Tables: mean log-likelihood over the splits in",
        "nats, whitened units (more is better). Bold: the best of its row. In brackets: processor seconds used.\n",
        "| data | budget, s | " + " | ".join(models) + " | ifpyro leads the best peer by |",
        "|---" * (len(models) + 3) + "|",
    ]
    wins: dict[float, list[bool]] = {}
    for name in NAMES:
        budgets = sorted({float(p.stem.split("-")[-2]) for p in CACHE.glob(f"density-{name}-*.json")})
        for seconds in budgets:
            runs = [json.loads(p.read_text()) for p in sorted(CACHE.glob(f"density-{name}-{seconds:g}-*.json"))]
            value = torch.tensor(
                [[run[m]["score"] - run.get("exact", run[m] | {"score": 0})["score"] for m in models] for run in runs]
            )
            used = [sum(run[m]["seconds"] for run in runs) / len(runs) for m in models]
            mean = value.mean(0)
            lead = value[:, 0] - value[:, 1 + int(mean[1:].argmax())]
            error = f" ± {float(lead.std() / len(runs) ** 0.5):.2f}" if len(runs) > 1 else ""
            wins.setdefault(seconds, []).append(bool(lead.mean() > 0))
            digits = 4 if name in TOYS else 2
            cells = []
            for k, m in enumerate(mean.tolist()):
                text = f"{abs(m) if name in TOYS else m:.{digits}f}"
                text = f"**{text}**" if k == int(mean.argmax()) else text
                cells.append(f"{text} ({used[k]:.0f})")
            lines.append(
                f"| {name} | {seconds:g} | " + " | ".join(cells) + f" | {float(lead.mean()):+.{digits}f}{error} |"
            )
    for seconds, won in sorted(wins.items()):
        lines.append(f"\nBest at {seconds:g} seconds: ifpyro on {sum(won)} of {len(won)} sets (goal: 7 of 8).")
    lines.append(SINE)
    lines.append(
        f"\n`python benchmarks/peers_density.py`; seeds 0, 1, ...; {machine('zuko', 'pyro-ppl', 'scikit-learn')}"
    )
    return lines


if __name__ == "__main__":
    main()
