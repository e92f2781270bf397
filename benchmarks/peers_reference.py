"""What a posterior is judged by in peers_posterior.py: long references, and distances to them over time."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import ifpyro
import posterior
from ifpyro.infer.diagnostics import convergence
from results import CACHE

LEVELS = torch.linspace(0.05, 0.95, 19)
OBSERVED: dict[str, tuple[list[int], float]] = {
    "moons": ([1], 0.2),
    "scurve": ([0, 1], 0.1),
    "digits": (list(range(32)), 0.1),
}


def reference(name: str) -> tuple[Tensor, Tensor]:
    """Draws ``(n, E)`` and weights ``(n,)`` of a long run, kept in the cache."""
    path = CACHE / f"reference-{name}.npz"
    if not path.exists():
        problem = posterior.PROBLEMS[name](False)
        if name == "digits":
            runs = []
            for seed in (100, 101):
                smc = ifpyro.SMC(problem.model, 8192, seed=seed, progress=False)
                smc.run(problem.y)
                runs.append((smc.get_samples()["x"].flatten(1), smc.log_evidence))
            weight = torch.softmax(torch.tensor([float(e) for _, e in runs], dtype=torch.double), 0)
            x = torch.cat([draws for draws, _ in runs])
            w = torch.cat([weight[k] / len(d) * torch.ones(len(d)) for k, (d, _) in enumerate(runs)])
        else:
            x, w = posterior.reference_draws(problem, 400_000)
        np.savez(path, x=x.numpy(), w=w.double().numpy())
    found = np.load(path)
    return torch.from_numpy(found["x"]), torch.from_numpy(found["w"])


def training_rows(name: str) -> Tensor:
    """The rows on which posterior.py trains its flows."""
    from sklearn.datasets import make_moons, make_s_curve

    if name == "digits":
        return posterior.demo.digits(0)[0].flatten(1)
    x = (make_moons if name == "moons" else make_s_curve)(20_000, noise=0.05, random_state=0)[0]
    return torch.as_tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)


def trained_nsf(name: str, rows: Tensor) -> Any:
    """A zuko NSF, trained for 40 s or loaded."""
    import zuko
    from safetensors.torch import load_file, save_file

    from peers_density import train_flow

    path = CACHE / f"nsf-{name}.safetensors"
    flow = zuko.flows.NSF(rows.shape[1], transforms=3, hidden_features=(64, 64))
    if not path.exists():
        cut = len(rows) * 9 // 10
        torch.manual_seed(0)
        flow = train_flow(flow, (rows[:cut], rows[cut:]), 40.0, 0)
        save_file(flow.state_dict(), path)
    flow.load_state_dict(load_file(path))
    return flow.requires_grad_(False)


def judge(name: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over time, and the seconds from which they stay within 5% and 2%."""
    problem = posterior.PROBLEMS[name](False)
    x_ref, w_ref = reference(name)
    w_ref = w_ref / w_ref.sum()
    live = x_ref.std(0) > 1e-3
    order = [x_ref[:, k].sort() for k in range(x_ref.shape[1])]
    cumulative = [w_ref[o.indices].cumsum(0) for o in order]
    cuts = [
        o.values[torch.searchsorted(c, LEVELS.double()).clamp(max=len(c) - 1)]
        for o, c in zip(order, cumulative, strict=True)
    ]
    exact = [
        torch.cat([torch.zeros(1).double(), c])[torch.searchsorted(o.values.contiguous(), q, right=True)]
        for o, c, q in zip(order, cumulative, cuts, strict=True)
    ]
    shares = class_shares(x_ref, w_ref) if name == "digits" else None

    xs: list[Tensor] = []
    with torch.no_grad():
        for block in blocks:
            values = torch.from_numpy(block["values"])
            if not block["in_x"]:
                flat = values.reshape(-1, values.shape[-1])
                values = torch.cat([problem.flow.decode(v).flatten(1) for v in flat.split(4096)]).reshape(
                    *values.shape[:2], -1
                )
            xs.append(values)
    weights = [None if b["log_weight"] is None else torch.from_numpy(b["log_weight"]).double() for b in blocks]

    def error(first: int, last: int) -> float:
        x = torch.cat([v.flatten(0, 1) for v in xs[first:last]])
        if weights[first] is None:
            w = torch.full((len(x),), 1 / len(x), dtype=torch.double)
        else:
            w = torch.softmax(torch.cat([v.flatten() for v in weights[first:last]]), 0)
        gaps = [
            float((((x[:, k, None] <= cuts[k]) * w[:, None]).sum(0) - exact[k]).abs().max())
            for k in torch.nonzero(live).flatten().tolist()
        ]
        if shares is not None:
            gaps.append(float((class_shares(x, w) - shares).abs().max()))
        return max(gaps)

    found: dict[str, Any] = {"blocks": len(blocks), "errors": []}
    if not blocks:
        return found
    if blocks[0]["fresh"]:
        found["errors"] = [(b["seconds"], error(k, k + 1)) for k, b in enumerate(blocks)]
        x = xs[-1]
    else:
        ends = sorted({round(v) for v in np.geomspace(1, len(blocks), 30)})
        found["errors"] = [(blocks[e - 1]["seconds"], error(0, e)) for e in ends]
        x = torch.cat(xs, 1)
    for level in (0.05, 0.02):
        right = next(
            (s for k, (s, _) in enumerate(found["errors"]) if all(e <= level for _, e in found["errors"][k:])), None
        )
        found[f"right {level}"] = right
    if weights[0] is not None:
        w = torch.softmax(torch.cat([v.flatten() for v in (weights[-1:] if blocks[0]["fresh"] else weights)]), 0)
        found["ess"], found["r_hat"] = float(1 / w.square().sum()) if not blocks[0]["fresh"] else None, None
    elif x.shape[1] >= 8:
        if x.shape[0] == 1:
            half = x.shape[1] // 2
            r_hat = convergence({"x": x[:, : 2 * half].reshape(2, half, -1)})["x"]["r_hat"]
        else:
            r_hat = convergence({"x": x})["x"]["r_hat"]
        found["ess"] = float(np.nanmin(convergence({"x": x})["x"]["n_eff"]))
        found["r_hat"] = float(np.nanmax(r_hat))
    found["seconds"] = blocks[-1]["seconds"]
    return found


_CLASSIFIER: list[Any] = []


def class_shares(x: Tensor, w: Tensor) -> Tensor:
    """Weighted share of images in each class of digits, by a logistic regression."""
    if not _CLASSIFIER:
        data = posterior.load_digits()
        _CLASSIFIER.append(posterior.LogisticRegression(max_iter=1000).fit(data.data / 17, data.target))
    labels = torch.as_tensor(_CLASSIFIER[0].predict(x.numpy()))
    return torch.zeros(10, dtype=torch.double).index_add(0, labels, w.double())
