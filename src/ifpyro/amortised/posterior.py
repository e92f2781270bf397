"""A posterior for every data set of a model, and for one of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.ranks import uniform_ranks
from ..calibration.simulated.result import SBC
from ..checks.checking import check
from ..checks.result import CheckResult
from ..core.arguments import check_count
from ..flow.conditional import ConditionalFlow
from ..flow.given import GivenFlow
from ..infer.engines.smc import SMC
from ..infer.results.draws import Draws
from .refined import refine_many
from .simulations import Joint


class AmortisedPosterior:
    """The posterior of a Pyro model as a function of its data; made by :func:`ifpyro.amortise`.

    Attributes:
        flow: The conditional flow over the model's unconstrained latents ``q``.
        seed: Of its simulations and its training.
    """

    def __init__(self, joint: Joint, flow: ConditionalFlow, seed: int) -> None:
        self.joint, self.flow, self.seed = joint, flow, seed

    def given(self, y: Any) -> "GivenPosterior":
        """The posterior given data.

        Args:
            y: The data of the model's observed site, or a dictionary of those of all; of shape ``(S, *shape)`` for many
                data sets.

        Raises:
            ValueError: If names or shapes are not those of the model's data.
        """
        data, batch = self.joint.read(y)
        return GivenPosterior(self.joint, data, batch, self.flow.given(self.joint.columns(data, batch)))

    def refine(self, y: Any, num_particles: int = 1024, *, seed: int | None = None, **options: Any) -> Any:
        """The exact posterior given data: draws of the flow weighted by ``p L / q`` and, where these weights are not to
        be trusted, tempered from the flow to the posterior.

        Args:
            y: As for :meth:`given`.
            num_particles: Particles for every data set.
            seed: Of the draws; fresh by default.
            options: For :class:`ifpyro.SMC`, such as ``defensive`` or ``max_moves``.

        Returns:
            Of one data set a finished :class:`ifpyro.SMC`, whose ``log_evidence`` is that of the model and whose
            ``pareto_k`` says how good the flow was; of many a :class:`Refined`.
        """
        given = self.given(y)
        if given.batch_shape:
            return refine_many(self.joint, given.data, given.flow, num_particles, seed=seed, **options)
        options = {"progress": False, **options}
        smc = SMC(self.joint.conditioned(given.data), num_particles, start=given.flow, seed=seed, **options)
        return smc.run(*self.joint.args, **self.joint.kwargs)

    def simulate(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        """New pairs of latents ``q``, ``(num, dim)``, and conditions, ``(num, p)``."""
        q, data = self.joint.simulate(num, seed)
        return q, self.joint.columns(data, (num,))

    def sbc(self, num: int = 1000, draws: int = 99, *, seed: int = 0, prob: float = 0.99) -> SBC:
        """Simulation-based calibration: ranks of new true values among draws given their data.

        Args:
            num: New simulations.
            draws: Draws for each.
            seed: Of simulations and draws.
            prob: Probability of the simultaneous bands.

        Returns:
            The result for every coordinate of every latent site; ``.passed`` says whether something is wrong.
        """
        num, draws = check_count("num", num, 10), check_count("draws", draws, 2)
        q, c = self.simulate(num, _later(self.seed, seed))
        drawn = self.flow.given(c).sample((draws,), seed=seed)  # (draws, num, dim)
        truth = self._quantities(q)
        values = self._quantities(drawn.reshape(-1, q.shape[1])).reshape(draws, num, -1)
        names = self._names()
        ranks = uniform_ranks(truth, values.swapaxes(0, 1), np.random.default_rng(seed))
        return SBC(names, ranks, np.full(num, float(draws)), truth, values.mean(0), values.std(0), prob, seed)

    def check(self, num: int = 1000, *, level: float = 0.01, seed: int = 0) -> CheckResult:
        """Whether the posterior can be trusted, for all data at once, from new simulations; see :func:`ifpyro.check`.

        Args:
            num: New simulations.
            level: Probability that a correct posterior gets any tested row wrong.
            seed: Of simulations and tests.
        """
        q, c = self.simulate(check_count("num", num, 32), _later(self.seed, seed))
        return check(self.flow, q, condition=c, rows=num, level=level, seed=seed, store=False)

    def _quantities(self, q: Tensor) -> np.ndarray:
        sites = self.joint.base.sites(q)
        parts = [sites[name].reshape(len(q), -1).double().cpu().numpy() for name in self._sites()]
        return np.concatenate(parts, 1)

    def _sites(self) -> list[str]:
        base = self.joint.base
        return [name.removesuffix("_base") if name.endswith("_base") else name for name in base.latents]

    def _names(self) -> tuple[str, ...]:
        sites = self.joint.base.sites(torch.zeros(1, self.joint.base.dim, dtype=self.joint.base.dtype))
        names: list[str] = []
        for name in self._sites():
            shape = tuple(sites[name].shape[1:])
            names += [f"{name}[{','.join(map(str, at))}]" if shape else name for at in np.ndindex(*shape)]
        return tuple(names)


class GivenPosterior:
    """An amortised posterior at data: one data set, or many.

    Attributes:
        data: By site.
        batch_shape: ``()``, or ``(S,)`` for many data sets.
        flow: The flow over ``q``.
    """

    def __init__(self, joint: Joint, data: dict[str, Tensor], batch: torch.Size, flow: GivenFlow) -> None:
        self.joint, self.data, self.batch_shape, self.flow = joint, data, batch, flow

    def sample(self, num: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draws of every latent and computed site by name, ``(num, *shape)``, or ``(num, S, *shape)``."""
        q = self.flow.sample((check_count("num", num, 1),), seed=seed)
        sites = self.joint.base.sites(q.reshape(-1, q.shape[-1]))
        return {name: value.reshape(num, *self.batch_shape, *value.shape[1:]) for name, value in sites.items()}

    def draws(self, num: int = 1000, *, chains: int = 4, seed: int | None = None) -> "AmortisedDraws":
        """Draws as a sampler's result, for :func:`ifpyro.to_arviz`, ``summary`` and the like; of one data set.

        Raises:
            ValueError: If there are many data sets.
        """
        if self.batch_shape:
            raise ValueError(f"draws expects one data set, got {self.batch_shape.numel()}; use given(y[i]).draws()")
        return AmortisedDraws(self, num, chains, seed)


class AmortisedDraws(Draws):
    """Draws of an amortised posterior, which are exact as far as the flow is."""

    def __init__(self, given: GivenPosterior, num: int, chains: int, seed: int | None) -> None:
        super().__init__(seed=seed, batch_size=None, batching=None, progress=False)
        joint = given.joint
        self.model, self.model_args, self.model_kwargs = joint.conditioned(given.data), joint.args, joint.kwargs
        self._density = joint.base
        each = -(-check_count("num", num, 1) // check_count("chains", chains, 1))
        self._positions = given.flow.sample((chains, each), seed=self.seed)
        self.attributes = {"inference_method": "amortised", "seed": self.seed}


def _later(training: int, seed: int) -> int:
    """A seed of simulations that training has not seen."""
    return int(np.random.SeedSequence([training, seed, 1]).generate_state(1)[0])
