"""What the processes of ``test_pool.py`` run, by name: ``python jobs_for_pools.py NAME,NAME FOLDER``."""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import ifpyro
from flows_zoo import mlp_flow
from ifpyro import Pool
from ifpyro.training import Recipe

RECIPE = Recipe(max_steps=30, batch=65, shared=2, rate=2e-3, average=0.9, patience=1_000, check_every=10)
Y = torch.tensor(0.5)


def samples():
    x = torch.randn(501, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] += x[:, 1] ** 2
    return x


def flow_model():
    flow = mlp_flow(2, torch.float32)

    def model(y):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 1], 0.3), obs=y)

    return model


def train(pool, folder):
    """From memory and from a file, as a whole and in two parts."""
    options = {"seed": 1, "recipe": RECIPE, "progress": False, "pool": pool, "tolerance": 0.05}
    options["network"] = {"width": 16, "blocks": 1, "dropout": 0.0}
    x = samples()
    if pool.rank == 0:
        np.save(folder / "x.npy", x.numpy())
    pool.sum(torch.zeros(()))  # the file is there
    mapped = np.load(folder / "x.npy", mmap_mode="r")
    ifpyro.fit(x, max_steps=15, checkpoint=folder / f"checkpoint{pool.size}", **options)
    # Clocks differ, and all must stop after the same step.
    timed = {**options, "network": {"width": 8, "blocks": 1}, "max_seconds": 0.3, "max_steps": 100_000}
    return {
        "timed": ifpyro.fit(x, **timed),
        "memory": ifpyro.fit(x, **options),
        "mapped": ifpyro.fit(mapped, **options),
        "resumed": ifpyro.fit(x, checkpoint=folder / f"checkpoint{pool.size}", **options),
        "dropout": ifpyro.fit(x, **{**options, "network": {"width": 16, "blocks": 1, "dropout": 0.3}}),
    }


def infer(pool, folder):
    """Every engine; the first process holds the draws."""
    options = {"seed": 0, "progress": False, "pool": pool}
    smc = ifpyro.SMC(flow_model(), 64, max_moves=4, prior_draws=1, **options).run(Y)
    hmc = ifpyro.MCMC(ifpyro.HMC(flow_model(), max_steps=4), 5, 20, 7, init="prior", **options).run(Y)
    slices = ifpyro.MCMC(ifpyro.EllipticalSlice(flow_model()), 3, 3, 7, batch_size=4, init="prior", **options).run(Y)
    return {"smc": smc, "hmc": hmc, "slices": slices}


def breaking_model(pool, after, break_down):
    """A model that breaks down in the second process after some evaluations."""
    evaluations = []

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        evaluations.append(None)
        if pool.rank == 1 and len(evaluations) > after:
            break_down()
        pyro.sample("y", dist.Normal(x[..., 1], 0.3), obs=y)

    return model


def fail(pool, folder):
    """The model fails in the second process only, and the job goes on."""

    def too_cold():
        raise ArithmeticError("too cold")

    model = breaking_model(pool, 40, too_cold)
    mcmc = ifpyro.MCMC(ifpyro.HMC(model), 100, 5, 6, init="prior", seed=0, progress=False, pool=pool)
    try:
        mcmc.run(Y)
    except RuntimeError as error:
        (folder / f"error{pool.rank}").write_text(str(error))
    return {}


def die(pool, folder):
    """The second process dies while the chains are sampled; nobody catches anything."""
    model = breaking_model(pool, 100, partial(os._exit, 3))
    kernel = ifpyro.HMC(model, step_size=0.5, trajectory_length=1.0, jumps=False)
    options = {"seed": 0, "progress": False, "pool": pool, "init": "prior"}
    ifpyro.MCMC(kernel, 4000, 2, 6, checkpoint=folder / "draws", **options).run(Y)
    return {}


def main(name, folder):
    pool = Pool.join()
    for job in name.split(","):
        results = globals()[job](pool, folder)
        for key, result in results.items() if pool.rank == 0 else ():
            result.save(folder / f"{key}{pool.size}")
    pool.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
