"""The pages of the reference: one a public name, from ``ifpyro.__all__``; run by ``conf.py`` before each build."""

import inspect
import shutil
from pathlib import Path
from typing import Any

import ifpyro

OUT = Path(__file__).parent / "generated"
EXTENSION_POINTS = {
    "ifpyro.flow.networks.noise": ["Noise", "Sigmas", "Table", "Continuous"],
    "ifpyro.infer.engines.kernel": ["Kernel"],
    "ifpyro.infer.model.density": ["BatchedDensity"],
}
TOYS = ["circles", "moons", "sine", "s_curve", "swirl", "paper", "ToySet"]
GROUPS = {
    "Flows": [
        "fit",
        "load",
        "from_denoiser",
        "InflationaryFlow",
        "ConditionalFlow",
        "Recipe",
        "Decoder",
        "LogProbEstimate",
    ],
    "Training": ["Recipe"],
    "Flows in Pyro": ["FlowTransform", "ConditionalFlowTransform"],
    "What a flow is made of": ["Schedule", "Basis", "Velocity", "MLP", "Grid", "fidelity", "circular"],
    "Posteriors": ["SMC", "MCMC", "HMC", "EllipticalSlice", "linear_posterior", "amortise", "reparam", "to_arviz"],
    "Trust": ["check", "CheckResult", "ConvergenceWarning"],
    "Many processes, and errors": ["Pool", "IfpyroError", "ModelError", "BatchingError", "PoolError"],
}


def main() -> None:
    """Write all pages anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    named = {name for names in GROUPS.values() for name in names} | {"calibration", "datasets"}
    groups: dict[str, list[str]] = {
        title: [_page("ifpyro", n) for n in names if n in ifpyro.__all__] for title, names in GROUPS.items()
    }
    groups["More"] = [_page("ifpyro", name) for name in ifpyro.__all__ if name not in named]  # new since GROUPS
    groups["ifpyro.calibration"] = [_page("ifpyro.calibration", name) for name in ifpyro.calibration.__all__]
    groups["ifpyro.datasets"] = [_page("ifpyro.data.datasets", name) for name in TOYS]
    groups["Extension points"] = [_page(module, n) for module, names in EXTENSION_POINTS.items() for n in names]
    lines: list[str] = []
    for title, pages in groups.items():
        if pages:
            lines += [title, "-" * len(title), "", ".. toctree::", "   :maxdepth: 1", ""]
            lines += [*(f"   generated/{page}" for page in pages), ""]
    (OUT / "list.txt").write_text("\n".join(lines))


def _page(module: str, name: str) -> str:
    """One page; its name without ending."""
    found: Any = __import__(module, fromlist=[name])
    thing = getattr(found, name)
    shown = "ifpyro.datasets" if module == "ifpyro.data.datasets" else module
    full = f"{shown}.{name}"
    kind = "autoclass" if inspect.isclass(thing) else "autofunction"
    body = [name, "=" * len(name), "", f"``{full}``", "", f".. {kind}:: {module}.{name}"]
    if inspect.isclass(thing):
        body += ["   :members:", "   :show-inheritance:"]
        if issubclass(thing, ifpyro.MCMC.__mro__[1]):
            body += [f"   :inherited-members: {ifpyro.MCMC.__mro__[2].__name__}"]
    page = full.removeprefix("ifpyro.")
    (OUT / f"{page}.rst").write_text("\n".join(body) + "\n")
    return page


if __name__ == "__main__":
    main()
