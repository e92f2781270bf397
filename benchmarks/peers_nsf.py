"""A zuko NSF as the prior, as a Pyro user would set it up: in data space, and in its own latent space.

The flow is trained on standardised data (digits: on their standardised logits) for 20 s. Its prior is not ours, so its
posterior is not ours either, and where importance sampling from this prior reaches it (in the plane and in space) these
rows are judged by that posterior.
"""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer.reparam import TransformReparam
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import constraints

import posterior
from peers_density import train_flow
from peers_reference import OBSERVED, training_rows
from results import CACHE

DATA, LATENT = "Pyro NUTS, zuko NSF prior", "Pyro NUTS, zuko NSF prior, latent"
COUPLING_ABOVE = 8
"""Coordinates: an autoregressive inverse takes as many passes as there are, so above, the latent's flow is coupling."""


class Prior(ZukoToPyro):
    """With what NUTS asks of a distribution and Pyro's wrapper lacks: where it lives, and a draw."""

    support = constraints.real_vector

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw."""
        return self.dist.rsample(sample_shape)


class NSFPosterior:
    """The problem ``name`` with an NSF for its prior.

    Args:
        name: of the problem.
        label: `DATA` or `LATENT`.
    """

    def __init__(self, name: str, label: str) -> None:
        rows = training_rows(name)
        if name == "digits":
            rows = torch.logit(rows)
        self.name, self.bounded, self.latent = name, name == "digits", label == LATENT
        self.mean, self.sd = rows.mean(0), rows.std(0).clamp_min(1e-6)
        self.dim = rows.shape[1]
        self.flow = self._trained((rows - self.mean) / self.sd)

    def _trained(self, rows: Tensor) -> Any:
        coupling = self.latent and self.dim > COUPLING_ABOVE
        path = CACHE / f"nsf-{self.name}{'-coupling' if coupling else ''}.safetensors"
        options = {"passes": 2} if coupling else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            flow: Any = zuko.flows.NSF(self.dim, transforms=3, hidden_features=(64, 64), **options)
        if not path.exists():
            cut = len(rows) * 9 // 10
            save_file(train_flow(flow, (rows[:cut], rows[cut:]), 20.0, 0).state_dict(), path)
        flow.load_state_dict(load_file(path))
        return flow.requires_grad_(False)

    def to_x(self, v: Tensor) -> Tensor:
        """Data of standardised data."""
        x = self.mean + self.sd * v
        return torch.sigmoid(x) if self.bounded else x

    def draws_to_x(self, draws: Tensor) -> Tensor:
        """Data of what the sampler moves."""
        with torch.no_grad():
            return self.to_x(self.flow().transform.inv(draws) if self.latent else draws)

    @property
    def site(self) -> str:
        """What the sampler moves."""
        return "v_base" if self.latent else "v"

    def model(self, y: Tensor) -> None:
        """For NUTS."""
        columns, noise = OBSERVED[self.name]
        v = self._sample()
        pyro.sample("y", dist.Normal(self.to_x(v)[..., columns], noise).to_event(1), obs=y)

    def _sample(self) -> Tensor:
        flow = self.flow()
        if not self.latent:
            return pyro.sample("v", Prior(flow))
        base = dist.Normal(torch.zeros(self.dim), 1.0).to_event(1)
        with pyro.poutine.reparam(config={"v": TransformReparam()}):
            return pyro.sample("v", dist.TransformedDistribution(base, [flow.transform.inv]))


def nsf_reference(name: str, num: int = 1_000_000) -> tuple[Tensor, Tensor] | None:
    """Prior draws of the NSF ``(n, E)`` with the weights ``(n,)`` of its posterior; None where they do not reach it."""
    if name == "digits":
        return None
    path = CACHE / f"reference-nsf-{name}.npz"
    if not path.exists():
        nsf, problem = NSFPosterior(name, DATA), posterior.PROBLEMS[name](False)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(100)
            x = torch.cat([nsf.to_x(nsf.flow().sample((20_000,))) for _ in range(num // 20_000)])
        w = torch.softmax(problem.likelihood(x).double(), 0)
        keep = w > 1e-9 * w.max()
        np.savez(path, x=x[keep].numpy(), w=w[keep].numpy())
    found = np.load(path)
    return torch.from_numpy(found["x"]), torch.from_numpy(found["w"])
