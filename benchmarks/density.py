"""Held-out log-likelihood beside zuko's flows, one core, one run: moons against the exact value, and three real tables.

    python benchmarks/density.py [--only moons wine breast_cancer digits] [--seeds 5]

Tables are split 60/20/20 by seed; every model trains on the first part, stops early on the second, and is scored
on the third. zuko's NSF and MAF get the same rows, standardised by column and whitened (both are run; the better
counts). Digits are uniformly dequantised to (0, 1), and all models see their logits. Log-likelihoods are means in
nats in units in which the Gaussian of the training rows is standard normal ("whitened units"); the differences do
not depend on them.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable

import numpy as np
import torch
import zuko
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_moons
from torch import Tensor
from torch.distributions import constraints
from tqdm.auto import tqdm

import ifpyro
from ifpyro.flow.axes.basis import Basis
from results import RESULTS, machine, show, write_section

NOISE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["moons", *TABLES], choices=["moons", *TABLES])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        lines: list[str] = []
        if name == "moons":
            moons(lines)
        else:
            table(name, options.seeds, lines)
        show(lines, f"\n`python benchmarks/density.py --only {name}`; {machine('zuko', 'scikit-learn')}")
        write_section(RESULTS, f"early-stopped-{name}", lines)


# -- moons: the exact density is known -------------------------------------------------------------------------------


def moons(lines: list[str]) -> None:
    x = torch.as_tensor(make_moons(20_000, noise=NOISE, random_state=0)[0], dtype=torch.float32)
    test = torch.as_tensor(make_moons(20_000, noise=NOISE, random_state=1)[0], dtype=torch.float32)
    exact = ifpyro.datasets.moons(NOISE).log_prob(test)
    show(lines, f"## Moons, 20,000 points: exact mean held-out log-likelihood {float(exact.mean()):.4f}\n")
    show(lines, "| model | nats below exact | standard error | seconds of training |\n|---|---|---|---|")
    sd = x.std(0)
    for label, scale in (("ifpyro", torch.ones(2)), ("ifpyro, standardised input", sd)):
        flow = ifpyro.fit(x / scale, seed=0, max_seconds=55, progress=False)
        gap = exact - (_log_prob(flow.log_prob, test / scale) - scale.log().sum())
        error = float(gap.std()) / math.sqrt(len(gap))
        training = flow.report["training"]
        show(lines, f"| {label} | {float(gap.mean()):.4f} | {error:.4f} | {training['seconds']:.0f} |")


# -- real tables -----------------------------------------------------------------------------------------------------


def _breast_cancer(rng: np.random.RandomState) -> np.ndarray:
    x = load_breast_cancer().data
    # 13 patients have concavities of exactly zero; the logarithm is taken of at least 1e-3, below the smallest others
    return np.log(np.maximum(x, 1e-3))


def _digits(rng: np.random.RandomState) -> np.ndarray:
    x = (load_digits().data + rng.uniform(0.001, 0.999, (1797, 64))) / 17
    return x[:, x.std(0) > 0.03]


TABLES: dict[str, Callable[[np.random.RandomState], np.ndarray]] = {
    "wine": lambda rng: load_wine().data,
    "breast_cancer": _breast_cancer,
    "digits": _digits,
}


def split(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """60/20/20 rows of a table, shuffled by seed."""
    rng = np.random.RandomState(seed)
    x = torch.as_tensor(TABLES[name](rng), dtype=torch.float32)
    x = x[torch.as_tensor(rng.permutation(len(x)))]
    a, b = int(0.6 * len(x)), int(0.8 * len(x))
    return x[:a], x[a:b], x[b:]


def table(name: str, seeds: int, lines: list[str]) -> None:
    support = constraints.unit_interval if name == "digits" else None
    scores: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in tqdm(range(seeds), desc=name):
        parts = split(name, seed)
        jacobian = torch.zeros(len(parts[2]))
        free = parts
        if support is not None:
            free = tuple(torch.logit(p) for p in parts)
            jacobian = -(parts[2].log() + torch.log1p(-parts[2])).sum(-1)
        basis = Basis.from_samples(free[0])
        unit = float(basis.scale.log().sum())
        # scored in whitened units of the space in which the models are trained
        start = time.perf_counter()
        flow = ifpyro.fit(parts[0], validation=parts[1], support=support, seed=seed, progress=False)
        took = time.perf_counter() - start
        results = {
            "Gaussian": (float(_normal(basis.to_standard(free[2])).mean()), 0.0),
            "ifpyro": (float((_log_prob(flow.log_prob, parts[2]) - jacobian).mean()) + unit, took),
        }
        mean, sd = free[0].mean(0), free[0].std(0)
        spaces = {
            "standardised": (lambda x, mean=mean, sd=sd: (x - mean) / sd, unit - float(sd.log().sum())),
            "whitened": (basis.to_standard, 0.0),
        }
        for label, make in PEERS.items():
            for space, (to_space, offset) in spaces.items():
                start = time.perf_counter()
                score = peer(make, [to_space(p) for p in free], seed) + offset
                results[f"{label}, {space}"] = (score, time.perf_counter() - start)
        for label, (score, took) in results.items():
            scores.setdefault(label, []).append(score)
            seconds.setdefault(label, []).append(took)
    show(lines, f"## {name}: mean held-out log-likelihood over {seeds} splits, whitened units, all stopped early\n")
    show(lines, "| model | nats | ifpyro's lead, mean ± standard error over splits | seconds |\n|---|---|---|---|")
    ours = np.array(scores["ifpyro"])
    for label, values in scores.items():
        lead = ours - np.array(values)
        error = lead.std(ddof=1) / math.sqrt(seeds) if seeds > 1 else float("nan")
        took = float(np.median(seconds[label]))
        show(lines, f"| {label} | {np.mean(values):.2f} | {lead.mean():+.2f} ± {error:.2f} | {took:.0f} |")


PEERS = {
    "zuko NSF": lambda d: zuko.flows.NSF(d, transforms=3, hidden_features=(64, 64)),
    "zuko MAF": lambda d: zuko.flows.MAF(d, transforms=5, hidden_features=(64, 64)),
}


def peer(make: Callable[[int], torch.nn.Module], parts: list[Tensor], seed: int) -> float:
    """Train a zuko flow with AdamW and early stopping; mean held-out log-likelihood."""
    torch.manual_seed(seed)
    flow = make(parts[0].shape[1])
    optimiser = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=1e-4)
    best, state, since = math.inf, copy.deepcopy(flow.state_dict()), 0
    for _ in range(400):
        for batch in torch.randperm(len(parts[0])).split(64):
            loss = -flow().log_prob(parts[0][batch]).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimiser.step()
        with torch.no_grad():
            validation = -float(flow().log_prob(parts[1]).mean())
        since += 1
        if validation < best:
            best, state, since = validation, copy.deepcopy(flow.state_dict()), 0
        elif since > 30:
            break
    flow.load_state_dict(state)
    with torch.no_grad():
        return float(flow().log_prob(parts[2]).mean())


def _log_prob(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([log_prob(rows) for rows in x.split(2000)])


def _normal(v: Tensor) -> Tensor:
    return -0.5 * (v.square().sum(-1) + v.shape[-1] * math.log(2 * math.pi))


if __name__ == "__main__":
    main()
