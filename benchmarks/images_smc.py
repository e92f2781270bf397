"""Posteriors of patches by tempered SMC in the latent, beside those by noising and denoising: do two ways agree?

    python benchmarks/images_smc.py 8-colour 0 12

    patch ~ flow.prior(),        y ~ Normal(A patch, 0.05),

The two share the network and nothing else: SMC moves the latents of the deterministic map and needs its gradients,
`linear_posterior` runs the stochastic reverse process. Draws are kept in ``benchmarks/.cache``; the command makes those
of the patches from one number to another.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import ifpyro
from ifpyro.calibration import coverage
from ifpyro.flow.tuning import doubling_error
from ifpyro.infer.results.diagnostics import convergence
from images_flows import KINDS, train
from images_posterior import NOISE, Task, as_seen, observed, sample_crps, save_picture, show_patches, tasks
from results import CACHE

PARTICLES, ISLANDS = {"8-colour": 128, "16": 64}, 4
DRAWS = 256  # of linear_posterior, for each patch
RATIOS = (0.75, 0.9)
PART = "places"
PATCHES = 12
COUNT = {"8-colour": 7, "16": 1}  # the first so many of them
GRIDS: dict[str, dict[str, Any]] = {
    "16": {"steps": 6, "method": "midpoint"}
}  # of the solver; by default those that training chose
VERDICT = {
    "8-colour": (
        "Both have converged, each to its own answer: SMC's islands agree, and chains of the other go back to where "
        "they were. A network that is not exact defines two priors, that of the deterministic map and that of the "
        "stochastic reverse process. Their posteriors differ here by a fifth to a quarter of a standard deviation, and "
        "the stochastic one's are wider. (For exact networks the tests compare `linear_posterior` with exact "
        "posteriors.)"
    ),
    "16": (
        "One patch, and islands of 16 particles, are little to go by: here the two differ by a third to six tenths "
        "of a standard deviation. Deblurred draws by noise and denoise show checks that no photograph has and SMC's "
        "draws do not, likely because the reverse process, where data say little, meets noised images that training "
        "has not shown the network."
    ),
}


class Found(NamedTuple):
    """Draws of the patch by SMC, and what they cost."""

    draws: Tensor  # (islands, draws, D)
    log_evidence: Tensor  # (islands,)
    temperatures: int
    seconds: float


def smc(name: str, quick: bool) -> Iterator[str]:
    """Means, standard deviations and coverage of the two."""
    name, count = ("8-colour", 2) if quick else (name, COUNT[name])
    flow, kind = trained_flow(name, 2.0 if quick else None), KINDS[name]
    yield f"### Two ways to one posterior: SMC and `linear_posterior`, {kind.size} x {kind.size}"
    yield ""
    yield (
        f"The same observations of {kind.size} x {kind.size} colour patches (D = {flow.latent_dim}), held-out places, "
        f"{count} {'patches' if count > 1 else 'patch'}. SMC: {PARTICLES[name]} particles in {ISLANDS} islands, "
        f"tempered from the prior in the latent, through the map of {flow.grid.evaluations} evaluations (error "
        f"{map_error(flow):.2f} standard deviations). `linear_posterior`: {DRAWS} draws a patch, at two ratios of "
        f"neighbouring noise levels (its default is {RATIOS[0]}). Over patches and scored pixels: root mean square of "
        "the difference of the two means, in posterior standard deviations, and what Monte Carlo error alone would "
        "give (from the spread of the islands and the number of draws); geometric mean of the ratio of standard "
        "deviations; coverage of nominal 90% in percent, CRPS; ± standard error over patches. Medians over patches of "
        "R-hat between islands and of the standard deviation of their log evidences; mean processor seconds a patch."
    )
    yield ""
    yield "| task | ratio | means differ by | chance alone | sd over SMC's | R-hat | log evidence's sd | temperatures |"
    yield "|---|---|---|---|---|---|---|---|"
    scores, shown = [], {}
    for task in tasks(kind.size):
        x, y = (rows[:count] for rows in observed(name, task, PART, PATCHES))
        whole, x = x, x[:, task.scored]
        by_smc = [particles(flow, name, task, y[i], i, quick) for i in range(count)]
        ours = torch.stack([found.draws for found in by_smc])[..., task.scored]
        rhat, spread = between_islands(ours, torch.stack([found.log_evidence for found in by_smc]))
        temperatures, took = (np.mean([getattr(found, k) for found in by_smc]) for k in ("temperatures", "seconds"))
        scores.append(f"| {task.name} | SMC | {score(x, ours.flatten(1, 2))} | {took:.0f} |")
        for ratio in RATIOS:
            start = time.process_time()
            theirs = ifpyro.linear_posterior(
                flow, task.operator, y, NOISE, draws=DRAWS, ratio=ratio, seed=1, batch_size=DRAWS, progress=False
            ).flatten(2)
            seconds = (time.process_time() - start) / count
            shown |= first_patch(task, whole[0], y[0], by_smc[0].draws.flatten(0, 1), theirs[0])
            theirs = theirs[..., task.scored]
            found = " | ".join(agreement(ours, theirs))
            yield f"| {task.name} | {ratio} | {found} | {rhat:.2f} | {spread:.1f} | {temperatures:.0f} |"
            scores.append(f"| {task.name} | `linear_posterior`, {ratio} | {score(x, theirs)} | {seconds:.1f} |")
    yield ""
    yield "| task | draws by | 90% covers | CRPS | s |"
    yield "|---|---|---|---|---|"
    yield from scores
    yield ""
    if not quick:
        show_patches(shown, kind.size)
        save_picture(f"smc-{kind.size}.png")
        yield f"![Draws of the first patch](pictures/smc-{kind.size}.png)"
        yield ""
    yield VERDICT[name]


def trained_flow(name: str, seconds: float | None = None) -> ifpyro.InflationaryFlow:
    """The flow of a name, with the steps of this comparison."""
    flow = train(name, seconds)
    flow.grid = replace(flow.grid, **GRIDS.get(name, {}))
    return flow


def map_error(flow: ifpyro.InflationaryFlow) -> float:
    """Of a decode, in standard deviations."""
    z = torch.randn(64, flow.latent_dim, generator=torch.Generator().manual_seed(0)).to(flow.device)
    with torch.no_grad():
        return doubling_error(flow, z, flow.grid)


def between_islands(draws: Tensor, log_evidence: Tensor) -> tuple[float, float]:
    """Medians over patches of R-hat and of the standard deviation of log evidences.

    Args:
        draws: ``(patches, islands, draws, d)``.
        log_evidence: ``(patches, islands)``.
    """
    rhat = np.median([np.median(convergence({"x": patch})["x"]["r_hat"]) for patch in draws])
    return float(rhat), float(log_evidence.std(1).median())


def first_patch(task: Task, truth: Tensor, y: Tensor, ours: Tensor, theirs: Tensor) -> dict[str, Tensor]:
    """Of one patch under captions: truth, what is seen and the two means; draws of SMC; of the other."""
    return {
        f"{task.name}: truth,\nseen, the two means": torch.stack(
            [truth, as_seen(task, y[None])[0], ours.mean(0), theirs.mean(0)]
        ),
        f"{task.name}:\ndraws by SMC": ours[:: len(ours) // 12],
        f"{task.name}: by noise\nand denoise": theirs,
    }


def model(flow: ifpyro.InflationaryFlow, operator: Tensor, y: Tensor) -> None:
    """A patch of which ``y`` is seen."""
    patch = pyro.sample("patch", flow.prior())
    pyro.sample("y", dist.Normal(patch.flatten(-3) @ operator.T, NOISE).to_event(1), obs=y)


def particles(
    flow: ifpyro.InflationaryFlow, name: str, task: Task, y: Tensor, index: int, quick: bool = False
) -> Found:
    """Draws by SMC for one patch, from the cache or made now."""
    path = CACHE / f"images-smc-{name}-{task.name}-{index}.npz"
    if path.exists() and not quick:
        with np.load(path) as kept:
            draws, evidence = torch.as_tensor(kept["draws"]), torch.as_tensor(kept["log_evidence"])
            return Found(draws, evidence, int(kept["temperatures"]), float(kept["seconds"]))
    start = time.process_time()
    count = 32 if quick else PARTICLES[name]
    run = ifpyro.SMC(model, count, num_islands=ISLANDS, seed=index, progress=False).run(flow, task.operator, y)
    draws = run.get_samples(group_by_chain=True)["patch"].flatten(2)
    found = Found(draws, run.island_log_evidence, len(run.stages), time.process_time() - start)
    if not quick:
        columns = {"draws": found.draws.numpy(), "log_evidence": found.log_evidence.numpy()}
        np.savez(path, **columns, temperatures=found.temperatures, seconds=found.seconds)
    return found


def agreement(ours: Tensor, theirs: Tensor) -> list[str]:
    """Difference of means and what chance would give, in standard deviations, and ratio of standard deviations.

    Args:
        ours: ``(patches, islands, draws, d)``, from SMC.
        theirs: ``(patches, draws, d)``, independent.
    """
    sd = ours.flatten(1, 2).std(1)
    difference = ((ours.mean((1, 2)) - theirs.mean(1)) / sd).square().mean(1)
    chance = (ours.mean(2).var(1) / ours.shape[1] / sd.square()).mean(1) + 1 / theirs.shape[1]
    root = float(difference.mean().sqrt())
    log_ratio = (theirs.std(1) / sd).log().mean(1)
    return [
        f"{root:.2f}{_error(difference, 2, 2 * root)}",
        f"{float(chance.mean().sqrt()):.2f}",
        f"{float(log_ratio.mean().exp()):.2f}{_error(log_ratio, 2)}",
    ]


def score(truth: Tensor, draws: Tensor) -> str:
    """Coverage of the central 90% intervals, and CRPS."""
    found = coverage(truth.numpy(), draws.numpy(), (0.9,))
    crps = sample_crps(truth, draws).mean(1)
    covered = f"{100 * found.pooled[0]:.1f}" + (f" ± {100 * found.pooled_error[0]:.1f}" if len(truth) > 1 else "")
    return f"{covered} | {float(crps.mean()):.4f}{_error(crps, 4)}"


def _error(values: Tensor, digits: int, unit: float = 1.0) -> str:
    """Standard error over patches, if there are several."""
    return f" ± {float(values.std()) / math.sqrt(len(values)) / unit:.{digits}f}" if len(values) > 1 else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=KINDS)
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trained = trained_flow(options.name)
    for number in range(options.first, options.end):
        for problem in tasks(KINDS[options.name].size):
            seen = observed(options.name, problem, PART, PATCHES)[1][number]
            result = particles(trained, options.name, problem, seen, number)
            evidence = ", ".join(f"{value:.1f}" for value in result.log_evidence.tolist())
            print(f"{problem.name} {number}: {result.temperatures} temperatures, {result.seconds:.0f} s, {evidence}")
