"""Sixteen posteriors of posteriordb, by SMC, HMC and Pyro's NUTS: right, or warned about, and how fast.

    python benchmarks/posteriordb.py --data PATH [--models kidscore,arK] [--engines smc,hmc,nuts] [--seeds 0,1]

``PATH`` is a checkout of posteriordb, or a folder with ``reference.json`` and perhaps ``models.py``: the same
posteriors written for an outermost plate, the variant ``plate``; those of `posteriordb_models` are ``natural``. Every
run is a process of its own under a cap of processor seconds; finished rows are kept in ``benchmarks/.cache`` and not
run again without ``--fresh``. The table goes to ``posteriordb.md``.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import ifpyro
from ifpyro.infer.results.diagnostics import convergence_figures
from posteriordb_models import NATURAL, POSTERIORS, exact_log_evidence, read
from results import CACHE, machine, write_section

TABLE = Path(__file__).parent / "posteriordb.md"
ENGINES = ("smc", "hmc", "nuts")
PARTICLES, CHAINS, DRAWS = 512, 64, 100
NUTS_WARMUP, NUTS_DRAWS = 500, 1000
MEAN, SD = 0.15, 0.12
"""Largest error of a mean, in standard deviations, and of a standard deviation, as a share: beyond is wrong."""


class TimeIsUp(BaseException):
    """Raised in Pyro's sampler when its time is up."""


def problem(data_path: Path, name: str, variant: str) -> tuple[Any, tuple[Any, ...], Callable[..., Any], Any, Any]:
    """Model, arguments, names, reference, and data."""
    data, references = read(data_path)
    if variant == "natural":
        return *NATURAL[name](data[name]), references[name], data[name]
    spec = importlib.util.spec_from_file_location("plate_models", data_path / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, args, rename, reference = module.MODELS[name]()
    return model, args, rename, reference, data[name]


def smc(model: Any, args: Any, seed: int, cap: float) -> dict[str, Any]:
    run = ifpyro.SMC(model, PARTICLES, seed=seed, progress=False).run(*args)
    evidence = {"log_evidence": run.log_evidence, "se": run.log_evidence_se}
    return {"chains": run.get_samples(True), "pooled": run.get_samples(), **evidence, **_facts(run)}


def hmc(model: Any, args: Any, seed: int, cap: float) -> dict[str, Any]:
    run = ifpyro.MCMC(ifpyro.HMC(model), DRAWS, num_chains=CHAINS, seed=seed, progress=False).run(*args)
    return {"chains": run.get_samples(True), **_facts(run)}


def _facts(run: Any) -> dict[str, Any]:
    return {"batching": run.attributes.get("batching", ""), "warned": run.attributes.get("convergence", "")}


def nuts(model: Any, args: Any, seed: int, cap: float) -> dict[str, Any]:
    """One chain; what it has drawn when its time is up."""
    pyro.set_rng_seed(seed)
    kept: list[dict[str, torch.Tensor]] = []
    began = time.process_time()

    def hook(kernel: Any, samples: dict[str, torch.Tensor], stage: str, index: int) -> None:
        if stage.lower().startswith("sample"):
            kept.append({name: value.clone() for name, value in samples.items()})
        if time.process_time() - began > cap:
            raise TimeIsUp

    kernel = pyro.infer.NUTS(model)
    sampler = pyro.infer.MCMC(kernel, NUTS_DRAWS, NUTS_WARMUP, hook_fn=hook, disable_progbar=True)
    with contextlib.suppress(TimeIsUp):
        sampler.run(*args)
    if len(kept) < 8:
        return {}
    draws = {name: torch.stack([row[name] for row in kept]) for name in kept[0]}
    draws = {name: kernel.transforms[name].inv(v) if name in kernel.transforms else v for name, v in draws.items()}
    seconds = time.process_time() - began
    quiet: dict[str, Any] = {"log_likelihood": False, "posterior_predictive": False, "progress": False}
    posterior = ifpyro.to_arviz({n: v[None] for n, v in draws.items()}, model=model, args=args, **quiet)["posterior"]
    return {"chains": {n: torch.as_tensor(v.values) for n, v in posterior.data_vars.items()}, "seconds": seconds}


def one(data_path: Path, name: str, variant: str, engine: str, seed: int, cap: float) -> dict[str, Any]:
    """Run one engine on one posterior, and set it beside the reference."""
    model, args, rename, reference, data = problem(data_path, name, variant)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {"smc": smc, "hmc": hmc, "nuts": nuts}[engine](model, args, seed, cap)
    seconds = found.get("seconds", time.process_time() - began)
    if not found:
        return {"state": f"no draws within {cap:.0f} s"}
    chains = rename({n: v.double().numpy() for n, v in found["chains"].items()})
    pooled = rename({n: v.double().numpy() for n, v in found["pooled"].items()}) if "pooled" in found else chains
    names = [n for n in reference if n in chains]
    missing = sorted(set(reference) - set(chains))
    if missing:
        raise ValueError(f"{name} has no draws of {missing}")
    figures = convergence_figures(np.stack([chains[n] for n in names], -1))
    sd = np.array([reference[n]["sd"] for n in names])
    draws = np.stack([pooled[n].ravel() for n in names], -1)
    mean = (draws.mean(0) - np.array([reference[n]["mean"] for n in names])) / sd
    ratio = draws.std(0, ddof=1) / sd
    ends = np.quantile(draws, [0.05, 0.95], axis=0)
    ends = (ends - np.array([[reference[n][q] for n in names] for q in ("q05", "q95")])) / sd
    worst = int(np.abs(mean).argmax())
    exact = exact_log_evidence(name, data)
    return {
        "state": "",
        "mean": float(mean[worst]),
        "worst": names[worst],
        "ratio": [float(ratio.min()), float(ratio.max())],
        "ends": [float(row[np.abs(row).argmax()]) for row in ends],
        "r_hat": float(np.nanmax(figures.r_hat)),
        "ess": float(min(figures.bulk.min(), figures.tail.min())),
        "draws": len(draws),
        "seconds": seconds,
        "exact": exact,
        **{key: found[key] for key in ("log_evidence", "se", "batching", "warned") if key in found},
    }


def verdict(row: dict[str, Any]) -> str:
    """``right``, ``warned`` or ``WRONG``."""
    right = abs(row["mean"]) <= MEAN and row["ratio"][0] >= 1 - SD and row["ratio"][1] <= 1 + SD
    warned = bool(row.get("warned"))
    return ("right" if right else "WRONG") if not warned else ("right, warned" if right else "warned")


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The markdown table of all rows there are."""
    lines = [
        "| posterior | written | engine | seed | verdict | worst mean, sd | sd ratio | q05, q95, sd | R-hat | ESS | "
        "s | ESS/s | log-evidence − exact | batching |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in POSTERIORS:
        for key in sorted(key for key in rows if key.split("/")[0] == name):
            _, variant, engine, seed = key.split("/")
            row, start = rows[key], f"| {name} | {variant} | {engine} | {seed} | "
            if row["state"]:
                lines.append(start + f"{row['state']} |" + " |" * 9)
                continue
            evidence = ""
            if "log_evidence" in row and row["exact"] is not None:
                evidence = f"{row['log_evidence'] - row['exact']:+.2f} ± {row['se']:.2f}"
            lines.append(
                start + f"{verdict(row)} | {row['mean']:+.3f} ({row['worst']}) | {row['ratio'][0]:.2f} to "
                f"{row['ratio'][1]:.2f} | {row['ends'][0]:+.2f}, {row['ends'][1]:+.2f} | {row['r_hat']:.3f} | "
                f"{row['ess']:.0f} of {row['draws']} | {row['seconds']:.1f} | {row['ess'] / row['seconds']:.1f} | "
                f"{evidence} | {row.get('batching', '')} |"
            )
    lines += ["", *evidences(rows)]
    said = [f"* {key}: {row['warned']}" for key, row in sorted(rows.items()) if row.get("warned")]
    return [*lines, "", *(["Warnings:", "", *said] if said else [])]


def evidences(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Errors of SMC's log-evidences in their reported standard errors, over seeds, where the exact value is known."""
    errors: dict[str, list[float]] = {}
    for key, row in rows.items():
        if row.get("exact") is not None and "log_evidence" in row:
            name, variant = key.split("/")[:2]
            errors.setdefault(f"{name}, {variant}", []).append((row["log_evidence"] - row["exact"]) / row["se"])
    lines = ["| evidence of | seeds | mean error, se | rms error, se |", "|---|---|---|---|"]
    for name, found in sorted(errors.items()):
        rms = math.sqrt(sum(e * e for e in found) / len(found))
        lines.append(f"| {name} | {len(found)} | {sum(found) / len(found):+.2f} | {rms:.2f} |")
    return lines if errors else []


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing, one process each, and write the table after every row."""
    store = CACHE / "posteriordb.json"
    rows: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    variants = arguments.variants.split(",")
    if not (arguments.data / "models.py").exists():
        variants = ["natural"]
    wanted = [
        f"{name}/{variant}/{engine}/{seed}"
        for seed in arguments.seeds.split(",")
        for engine in arguments.engines.split(",")
        for variant in variants
        for name in (arguments.models or ",".join(POSTERIORS)).split(",")
    ]
    for key in wanted:
        if key not in rows or arguments.fresh:
            rows[key] = _in_a_process(key, arguments)
            print(key, rows[key]["state"] or f"{verdict(rows[key])}, {rows[key]['seconds']:.1f} s", flush=True)
            CACHE.mkdir(exist_ok=True)
            store.write_text(json.dumps(rows, indent=1))
        _write(rows)
    _write(rows)


def _write(rows: dict[str, Any]) -> None:
    about = (
        f"SMC: {PARTICLES} particles; HMC: {CHAINS} chains of {DRAWS} draws after a short SMC; NUTS: Pyro's, one "
        f"chain, {NUTS_WARMUP} + {NUTS_DRAWS} transitions or what the cap leaves; processor seconds with set-up and "
        f"warm-up. Right: every mean within {MEAN} sd, every sd within {SD:.0%}. ESS: the smallest, bulk or tail, "
        "over all parameters. Exact log-evidences by quadrature over the noise scale."
    )
    write_section(TABLE, "posteriordb", ["# posteriordb", "", machine("pyro-ppl"), "", about, "", *table(rows)])


def _in_a_process(key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--data", str(arguments.data), "--cap", str(arguments.cap), "--one", key]
    limit = math.ceil(arguments.cap * 1.2 + 60)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5)),
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {"state": f"not done within {arguments.cap:.0f} s"}
    return {"state": "failed: " + (done.stderr.strip().splitlines() or ["?"])[-1][:160]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", default="", help=f"comma-separated, of {', '.join(POSTERIORS)}; all by default")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--variants", default="plate,natural")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--cap", type=float, default=120.0, help="processor seconds of one run")
    parser.add_argument("--fresh", action="store_true", help="run again what is kept")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.one:
        run(arguments)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    name, variant, engine, seed = arguments.one.split("/")
    print(json.dumps(one(arguments.data, name, variant, engine, int(seed), arguments.cap)))


if __name__ == "__main__":
    main()
