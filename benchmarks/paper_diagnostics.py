"""Sections ``residuals`` (what a network's errors add up to) and ``neighbours`` (who stays near whom)."""

import copy
from collections.abc import Iterator

import torch
from sklearn.decomposition import PCA, KernelPCA
from sklearn.manifold import TSNE, Isomap, LocallyLinearEmbedding, trustworthiness
from torch import Tensor

import ifpyro
from ifpyro.checks.residuals import Residuals, accumulated, mixture_velocity, network_residuals, path_errors
from ifpyro.data import datasets
from ifpyro.flow.networks.velocity import Velocity
from ifpyro.flow.solver.grid import Grid
from paper_flows import Key, data, flow_of
from paper_toy import SCHEDULES as TOY_SCHEDULES

# -- residuals -------------------------------------------------------------------------------------------------------


def residual_keys(quick: bool) -> list[Key]:
    """All flows of the section."""
    names, schedules = (("moons",), TOY_SCHEDULES[:1]) if quick else (("circles", "moons"), TOY_SCHEDULES)
    return [Key(name, schedule) for name in names for schedule in schedules]


def residuals(quick: bool) -> Iterator[str]:
    rows = 100 if quick else 1000
    yield "## Residuals of the network along time (the paper's appendix C.3), and what errors add up to\n"
    yield (
        "Circles and moons are Gaussian mixtures to six digits, so the exact velocity `F*` is known. Residuals: mean "
        "correlation over pairs of times at least 0.1 apart, data noised afresh at every time as in the paper; of the "
        "network, and of `F*` itself. Errors `F - F*` on the flow's own paths: root mean square at t = 0.1, 0.5, 0.9; "
        "the time after which their correlation has fallen to one half (from t = 0.5); what they add up to in the "
        "latent, what they would if nothing cancelled, and the ratio. Last, the difference between the flow's latent "
        "and that of `F*`, which also counts how later stretches of the flow stretch earlier errors. "
        f"{rows:,} held-out rows.\n"
    )
    yield (
        "| set | flow | residuals, network | residuals, exact | error at t = 0.1, 0.5, 0.9 | half-life | adds up to "
        "| without cancelling | ratio | latent off by |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for key in residual_keys(quick):
        flow, toy = flow_of(key, quick), datasets.paper()[key.data]
        cells = error_cells(flow, mixture_velocity(flow, *toy.mixture()), data(key.data).held_out[:rows])
        yield f"| {key.data} | {key.schedule} | {cells} |"


def error_cells(flow: ifpyro.InflationaryFlow, exact: Velocity, x: Tensor) -> str:
    errors = path_errors(flow, exact, x)
    total = accumulated(flow, errors)
    truth = exact_flow(flow, exact)
    fresh = [far_correlation(network_residuals(f, x.to(f.dtype), seed=0)) for f in (flow, truth)]
    with torch.no_grad():
        off = float((flow.encode(x).double() - truth.encode(x.double())).square().mean().sqrt())
    sizes = [float(errors.size()[(errors.times - t).abs().argmin()]) for t in (0.1, 0.5, 0.9)]
    return (
        f"{fresh[0]:.3f} | {fresh[1]:.3f} | {', '.join(f'{s:.3f}' for s in sizes)} | {half_life(errors):.2f} "
        f"| {total.error:.4f} | {total.without_cancelling:.4f} | {total.coherence:.2f} | {off:.4f}"
    )


def exact_flow(flow: ifpyro.InflationaryFlow, exact: Velocity) -> ifpyro.InflationaryFlow:
    """The flow that the network stands for, in double precision."""
    basis = copy.deepcopy(flow.basis).double()
    return ifpyro.InflationaryFlow(basis, flow.schedule, exact, grid=Grid(32, flow.grid.power))


def far_correlation(found: Residuals) -> float:
    """Mean correlation over pairs of times that are at least 0.1 apart."""
    far = (found.times.unsqueeze(0) - found.times.unsqueeze(1)).abs() >= 0.1
    return float(found.autocorrelation()[far].mean())


def half_life(errors: Residuals, start: float = 0.5) -> float:
    """Time after ``start`` at which the correlation with the error there first falls to one half."""
    first = int((errors.times - start).abs().argmin())
    fallen = (errors.autocorrelation()[first, first:] <= 0.5).nonzero().flatten()
    return float(errors.times[first + fallen[0]] - errors.times[first]) if len(fallen) else float("nan")


# -- neighbours ------------------------------------------------------------------------------------------------------

NEIGHBOURS = 10
SCHEDULES = ("preserving", "reducing", "details first, p = 1", "details first, p = 2")


def neighbour_keys(quick: bool) -> list[Key]:
    """All flows of the section."""
    return [Key("digits, logits", name) for name in (SCHEDULES[:1] if quick else SCHEDULES)]


def neighbours(quick: bool) -> Iterator[str]:
    found = data("digits, logits")
    held_out = found.held_out[: 60 if quick else None]
    rows, test = found.train.flatten(1).numpy(), held_out.flatten(1).numpy()
    yield "## Neighbourhoods: held-out digits against their first K latents\n"
    yield (
        f"{len(rows):,} digits to train on, {len(test)} held out and embedded. Trustworthiness (neighbours in the "
        "embedding that are neighbours in the data) / continuity (neighbours in the data that stay so; the same figure "
        f"with the roles exchanged), {NEIGHBOURS} neighbours; 1 is best. t-SNE cannot embed held-out rows: it was "
        "fitted to the test set itself. Flows work on logits.\n"
    )
    sizes = (2, 8, 32)
    yield f"| map | {' | '.join(f'K = {k}' for k in sizes)} |\n|---|{'---|' * len(sizes)}"
    for name, embed in baselines(rows, test, quick).items():
        yield f"| {name} | {' | '.join(scores(test, embed(k)) for k in sizes)} |"
    for key in neighbour_keys(quick):
        with torch.no_grad():
            z = flow_of(key, quick).encode(held_out).numpy()
        yield f"| flow, {key.schedule} | {' | '.join(scores(test, z[:, :k]) for k in sizes)} |"


def scores(x, z) -> str:
    if z is None:
        return "–"
    return f"{trustworthiness(x, z, n_neighbors=NEIGHBOURS):.3f} / {trustworthiness(z, x, n_neighbors=NEIGHBOURS):.3f}"


def baselines(rows, test, quick: bool) -> dict:
    """Name -> function from ``K`` to the embedded test set."""
    gamma = 1 / (rows.shape[1] * rows.var())
    found = {
        "PCA": lambda k: PCA(k).fit(rows).transform(test),
        "PCA, components of unit variance": lambda k: PCA(k, whiten=True).fit(rows).transform(test),
        "kernel PCA (Gaussian)": lambda k: KernelPCA(k, kernel="rbf", gamma=gamma).fit(rows).transform(test),
        "Isomap": lambda k: Isomap(n_neighbors=NEIGHBOURS, n_components=k).fit(rows).transform(test),
        "locally linear embedding": lambda k: (
            LocallyLinearEmbedding(n_neighbors=40, n_components=k, random_state=0).fit(rows).transform(test)
        ),
    }
    if not quick:
        found["t-SNE of the test set"] = lambda k: TSNE(2, random_state=0).fit_transform(test) if k == 2 else None
    return found
