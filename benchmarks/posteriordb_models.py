"""Sixteen posteriors of posteriordb as Pyro models, written as for a single draw, and their exact evidences.

`NATURAL[name](data)` returns the model, its arguments, and a function from draws by site (NumPy, any leading
dimensions) to posteriordb's parameters. Flat priors of the Stan programs are wide proper ones here.
"""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor

Draws = dict[str, np.ndarray]
Problem = tuple[Callable[..., None], tuple[Any, ...], Callable[[Draws], Draws]]
NATURAL: dict[str, Callable[[dict[str, Any]], Problem]] = {}

POSTERIORS = {
    "eight_nc": "eight_schools-eight_schools_noncentered",
    "kidscore": "kidiq-kidscore_momhsiq",
    "kidscore_inter": "kidiq-kidscore_interaction",
    "arK": "arK-arK",
    "arma11": "arma-arma11",
    "garch11": "garch-garch11",
    "hmm_hand": "hmm_example-hmm_example",
    "logmesquite": "mesquite-logmesquite_logvash",
    "mesquite": "mesquite-mesquite",
    "logearn_inter": "earnings-logearn_interaction",
    "earn_height": "earnings-earn_height",
    "gauss_mix": "low_dim_gauss_mix-low_dim_gauss_mix",
    "sblri": "sblri-blr",
    "sblrc": "sblrc-blr",
    "gp_pois": "gp_pois_regr-gp_pois_regr",
    "lotka": "hudson_lynx_hare-lotka_volterra",
}
"""Short name -> posteriordb's."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Data and references of all sixteen, by short name.

    Args:
        path: a folder with ``reference.json`` (``{"data": ..., "posteriors": ...}``), or a checkout of posteriordb,
            whose reference draws are reduced to means, standard deviations and quantiles.
    """
    if (path / "reference.json").exists():
        everything = json.loads((path / "reference.json").read_text())
        found = everything["posteriors"]
        return (
            {name: everything["data"][found[name]["data"]] for name in POSTERIORS},
            {name: found[name]["reference"] for name in POSTERIORS},
        )
    base = path / "posterior_database"
    data, references = {}, {}
    for name, theirs in POSTERIORS.items():
        about = json.loads((base / "posteriors" / f"{theirs}.json").read_text())
        data[name] = _unzip(base / "data" / "data" / f"{about['data_name']}.json.zip")
        draws = base / "reference_posteriors" / "draws" / "draws" / f"{about['reference_posterior_name']}.json.zip"
        chains = _unzip(draws)
        references[name] = {
            parameter: _moments(np.concatenate([chain[parameter] for chain in chains])) for parameter in chains[0]
        }
    return data, references


def _unzip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def _moments(draws: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(draws, [0.05, 0.95])
    return {"mean": float(draws.mean()), "sd": float(draws.std(ddof=1)), "q05": float(low), "q95": float(high)}


def _natural(build: Callable[[dict[str, Any]], Problem]) -> Callable[[dict[str, Any]], Problem]:
    NATURAL[build.__name__] = build
    return build


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.get_default_dtype())


def _entries(values: np.ndarray, name: str) -> Draws:
    return {f"{name}[{i + 1}]": values[..., i] for i in range(values.shape[-1])}


def _as_they_are(*names: str) -> Callable[[Draws], Draws]:
    return lambda draws: {name: draws[name] for name in names}


# -- regressions -----------------------------------------------------------------------------------


def design(name: str, data: dict[str, Any]) -> tuple[Tensor, Tensor, float, Any]:
    """Regressors with their constant, response, prior standard deviation of the coefficients, prior of the noise."""
    x = {key: _tensor(value) for key, value in data.items()}
    if name in ("kidscore", "kidscore_inter"):
        columns = [x["mom_hs"], x["mom_iq"]]
        columns += [x["mom_hs"] * x["mom_iq"]] if name == "kidscore_inter" else []
        return _with_constant(columns), x["kid_score"], 1e3, dist.HalfCauchy(2.5)
    if name == "logmesquite":
        area = x["diam1"] * x["diam2"]
        columns = [area * x["canopy_height"], area, x["diam1"] / x["diam2"], x["total_height"]]
        return _with_constant([*map(torch.log, columns), x["group"]]), x["weight"].log(), 1e3, dist.Uniform(0.0, 100.0)
    if name == "mesquite":
        names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
        return _with_constant([x[n] for n in names]), x["weight"], 1e5, dist.Uniform(0.0, 1e4)
    if name == "logearn_inter":
        columns = [x["height"], x["male"], x["height"] * x["male"]]
        return _with_constant(columns), x["earn"].log(), 1e3, dist.Uniform(0.0, 100.0)
    if name == "earn_height":
        return _with_constant([x["height"]]), x["earn"], 1e7, dist.Uniform(0.0, 1e7)
    if name == "arK":
        lags = [x["y"][data["K"] - k - 1 : len(x["y"]) - k - 1] for k in range(data["K"])]
        return _with_constant(lags), x["y"][data["K"] :], 10.0, dist.HalfCauchy(2.5)
    return x["X"], x["y"], 10.0, dist.HalfNormal(10.0)  # sblri, sblrc


REGRESSIONS = (
    "kidscore",
    "kidscore_inter",
    "logmesquite",
    "mesquite",
    "logearn_inter",
    "earn_height",
    "sblri",
    "sblrc",
    "arK",
)


def _with_constant(columns: list[Tensor]) -> Tensor:
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def _regression(name: str, data: dict[str, Any]) -> Problem:
    x, y, scale, noise = design(name, data)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), scale).to_event(1))
        sigma = pyro.sample("sigma", noise)
        pyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=y)

    def rename(draws: Draws) -> Draws:
        if name == "arK":
            beta = draws["beta"]
            return {"alpha": beta[..., 0], **_entries(beta[..., 1:], "beta"), "sigma": draws["sigma"]}
        return {**_entries(draws["beta"], "beta"), "sigma": draws["sigma"]}

    return model, (x, y), rename


for _name in REGRESSIONS:
    NATURAL[_name] = lambda data, name=_name: _regression(name, data)


def exact_log_evidence(name: str, data: dict[str, Any]) -> float | None:
    """By quadrature over the one scale that is left when all else is integrated; None where that cannot be done."""
    if name == "eight_nc":
        y, noise = np.asarray(data["y"], float), np.asarray(data["sigma"], float)
        prior, scale = stats.halfcauchy(scale=5.0), np.geomspace(1e-4, 1e4, 4001)
        covariances = 25.0 + np.eye(len(y)) * (noise**2 + scale[:, None, None] ** 2)
        log_density = _log_normal(y, covariances)
    elif name in REGRESSIONS:
        x, y, spread, noise = design(name, data)
        x, y = x.double().numpy(), y.double().numpy()
        if name.startswith("log") or name in ("mesquite", "earn_height"):
            prior = stats.uniform(0.0, float(noise.high))
        else:
            kind = stats.halfnorm if name.startswith("sbl") else stats.halfcauchy
            prior = kind(scale=float(noise.scale))
        # By the singular values of x: a covariance of 1,000 rows for each scale would take minutes.
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        along, rest = u.T @ y, float(y @ y - (u.T @ y) @ (u.T @ y))
        centre = math.sqrt(max(rest, 1e-300) / len(y))
        scale = centre * np.geomspace(1e-2, 1e2, 20001)
        variances = (s * spread) ** 2 + scale[:, None] ** 2
        log_density = -0.5 * (np.log(2 * np.pi * variances) + along**2 / variances).sum(1)
        free = len(y) - len(s)
        log_density += -0.5 * (free * np.log(2 * np.pi * scale**2) + rest / scale**2)
    else:
        return None
    values = log_density + prior.logpdf(scale) + np.log(scale)  # over the logarithm of the scale
    top = values.max()
    return float(top + np.log(np.trapezoid(np.exp(values - top), np.log(scale))))


def _log_normal(y: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    _, log_det = np.linalg.slogdet(2 * np.pi * covariances)
    return -0.5 * (log_det + np.einsum("i,kij,j->k", y, np.linalg.inv(covariances), y))


# -- the others ------------------------------------------------------------------------------------


@_natural
def eight_nc(data: dict[str, Any]) -> Problem:
    def model(y: Tensor, noise: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("J", len(y)):
            effect = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * effect)
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    def rename(draws: Draws) -> Draws:
        return {**_entries(draws["theta"], "theta"), "mu": draws["mu"], "tau": draws["tau"]}

    return model, (_tensor(data["y"]), _tensor(data["sigma"])), rename


@_natural
def arma11(data: dict[str, Any]) -> Problem:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        error = y[0] - (mu + phi * mu)
        errors = [error]
        for t in range(1, len(y)):
            error = y[t] - (mu + phi * y[t - 1] + theta * error)
            errors.append(error)
        pyro.factor("y", dist.Normal(0.0, sigma).log_prob(torch.stack(errors)).sum())

    return model, (_tensor(data["y"]),), _as_they_are("mu", "phi", "theta", "sigma")


@_natural
def garch11(data: dict[str, Any]) -> Problem:
    def model(y: Tensor, first: float) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        alpha0 = pyro.sample("alpha0", dist.Uniform(0.0, 100.0))
        alpha1 = pyro.sample("alpha1", dist.Beta(1.0, 2.0))  # and beta1 uniform: uniform on their triangle
        beta1 = pyro.sample("beta1", dist.Uniform(0.0, 1 - alpha1))
        variance = torch.as_tensor(first) ** 2
        variances = [variance + 0 * mu]
        for t in range(1, len(y)):
            variance = alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * variance
            variances.append(variance)
        pyro.sample("y", dist.Normal(mu, torch.stack(variances).sqrt()).to_event(1), obs=y)

    return model, (_tensor(data["y"]), float(data["sigma1"])), _as_they_are("mu", "alpha0", "alpha1", "beta1")


@_natural
def hmm_hand(data: dict[str, Any]) -> Problem:
    means = _tensor([3.0, 10.0])

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        mu = pyro.sample("mu", dist.Normal(means, 1.0).to_event(1))
        emitted = dist.Normal(mu, 1.0).log_prob(y[:, None])
        state = emitted[0] - math.log(2)
        for row in emitted[1:]:
            state = torch.logsumexp(state[:, None] + theta.log(), 0) + row
        pyro.factor("y", torch.logsumexp(state, 0))

    def rename(draws: Draws) -> Draws:
        theta = draws["theta"]
        rows = {f"theta{i + 1}[{j + 1}]": theta[..., i, j] for i in range(2) for j in range(2)}
        return {**rows, **_entries(draws["mu"], "mu")}

    return model, (_tensor(data["y"]),), rename


@_natural
def gauss_mix(data: dict[str, Any]) -> Problem:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        weights = torch.stack([theta, 1 - theta]).log()
        density = torch.logsumexp(weights + dist.Normal(mu, sigma).log_prob(y[:, None]), -1)
        pyro.factor("y", density.sum())

    def rename(draws: Draws) -> Draws:  # the Stan program orders the means
        order = draws["mu"].argsort(-1)
        mu, sigma = (np.take_along_axis(draws[name], order, -1) for name in ("mu", "sigma"))
        theta = np.where(order[..., 0] == 0, draws["theta"], 1 - draws["theta"])
        return {**_entries(mu, "mu"), **_entries(sigma, "sigma"), "theta": theta}

    return model, (_tensor(data["y"]),), rename


@_natural
def gp_pois(data: dict[str, Any]) -> Problem:
    x = _tensor(data["x"])
    squares = (x[:, None] - x) ** 2

    def model(k: Tensor) -> None:
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        white = pyro.sample("f_tilde", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        covariance = alpha**2 * (-0.5 * squares / rho**2).exp() + 1e-5 * torch.eye(len(x))
        f = pyro.deterministic("f", torch.linalg.cholesky(covariance) @ white, event_dim=1)
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)

    def rename(draws: Draws) -> Draws:
        return {"rho": draws["rho"], "alpha": draws["alpha"], **_entries(draws["f"], "f")}

    return model, (_tensor(data["k"]),), rename


@_natural
def lotka(data: dict[str, Any]) -> Problem:
    substeps, rates = 10, ("alpha", "beta", "gamma", "delta")
    locations, scales = (1.0, 0.05, 1.0, 0.05), (0.5, 0.05, 0.5, 0.05)

    def model(first: Tensor, y: Tensor) -> None:
        a, b, c, d = (
            pyro.sample(name, _positive_normal(*place))
            for name, place in zip(rates, zip(locations, scales, strict=True), strict=True)
        )
        z = start = pyro.sample("z_init", dist.LogNormal(math.log(10.0) * torch.ones(2), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(-torch.ones(2), 1.0).to_event(1))

        def slope(z: Tensor) -> Tensor:
            return torch.stack([(a - b * z[1]) * z[0], (-c + d * z[0]) * z[1]])

        path, before = [], 0.0
        for time in data["ts"]:
            h = (time - before) / substeps
            for _ in range(substeps):
                k1 = slope(z)
                k2 = slope(z + h / 2 * k1)
                k3 = slope(z + h / 2 * k2)
                z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(z + h * k3))
            path.append(z)
            before = time
        z = torch.stack(path)
        possible = ((z > 0) & z.isfinite()).all()
        log_z = torch.where(possible, z, torch.ones_like(z)).log()
        pyro.sample("y0", dist.LogNormal(start.log(), sigma).to_event(1), obs=first)
        density = dist.LogNormal(log_z, sigma).log_prob(y).sum()
        pyro.factor("y", torch.where(possible, density, density.new_tensor(-math.inf)))

    def rename(draws: Draws) -> Draws:
        theta = {f"theta[{i + 1}]": draws[name] for i, name in enumerate(rates)}
        return {**theta, **_entries(draws["z_init"], "z_init"), **_entries(draws["sigma"], "sigma")}

    return model, (_tensor(data["y_init"]), _tensor(data["y"])), rename


def _positive_normal(mean: float, sd: float) -> Any:
    """A normal distribution restricted to positive values: a standard normal through its quantiles."""
    return dist.TransformedDistribution(dist.Normal(0.0, 1.0), [_ToPositive(mean, sd)])


class _ToPositive(torch.distributions.Transform):
    """The monotone map of a standard normal to ``N(mean, sd)`` given that it is positive."""

    domain, codomain = torch.distributions.constraints.real, torch.distributions.constraints.positive
    bijective, sign = True, 1

    def __init__(self, mean: float, sd: float) -> None:
        super().__init__()
        self.mean, self.sd = mean, sd
        self.kept = 0.5 * math.erfc(-mean / sd / math.sqrt(2))

    def _call(self, x: Tensor) -> Tensor:
        upper = (self.kept * torch.special.ndtr(-x)).clamp(1e-30, 1 - 1e-7)
        return (self.mean - self.sd * torch.special.ndtri(upper)).clamp(min=1e-7)

    def _inverse(self, y: Tensor) -> Tensor:
        upper = torch.special.ndtr((self.mean - y) / self.sd) / self.kept
        return -torch.special.ndtri(upper.clamp(1e-30, 1 - 1e-7))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(self.kept * self.sd) - 0.5 * x**2 + 0.5 * ((y - self.mean) / self.sd) ** 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ToPositive) and (other.mean, other.sd) == (self.mean, self.sd)

    __hash__ = None  # type: ignore[assignment]
