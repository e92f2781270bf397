"""What simulation-based calibration found, and what it says about the engine."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from ..ranks import Uniformity, combine, uniformity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 20.0
"""Effective draws below which ranks of a data set say little, and are not quite independent."""


@dataclass(frozen=True)
class SBC:
    """Ranks of the truth among posterior draws, for ``n`` simulations and ``Q`` test quantities.

    Example:
        >>> def simulate(rng):
        ...     theta = rng.normal()
        ...     return theta, theta + rng.normal()
        ...
        >>> def narrow(data, seed):
        ...     return np.random.default_rng(seed).normal(data / 2, 0.2, size=100)
        ...
        >>> result = ifpyro.calibration.sbc(ifpyro.calibration.Simulator(simulate), narrow, 100, progress=False)
        >>> result.passed, result.outside
        (False, ['theta'])
    """

    names: tuple[str, ...]
    """Of the test quantities."""
    ranks: Array
    """Uniform ranks (`ifpyro.calibration.ranks`), ``(n, Q)``: uniform on (0, 1) if the engine is right."""
    ess: Array
    """Smallest effective number of draws over the quantities, ``(n,)``: ranks use that many, thinned."""
    truth: Array
    """True values, ``(n, Q)``."""
    mean: Array
    """Posterior means, ``(n, Q)``."""
    sd: Array
    """Posterior standard deviations, ``(n, Q)``."""
    prob: float
    """Probability of the simultaneous bands; ``1 - prob`` is the size of each test."""
    seed: int
    """Of the whole run."""

    @property
    def num_simulations(self) -> int:
        """Finished simulations."""
        return len(self.ranks)

    @cached_property
    def tests(self) -> dict[str, Uniformity]:
        """The tests of every quantity (quantities that are the same number in every simulation are left out)."""
        moving = np.ptp(self.truth, axis=0) > 0
        return {name: uniformity(self.ranks[:, k]) for k, name in enumerate(self.names) if moving[k]}

    @property
    def p_value(self) -> float:
        """All quantities combined."""
        return float(combine(np.array([test.p for test in self.tests.values()])))

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against calibration, all quantities taken together."""
        return self.p_value >= 1 - self.prob

    @property
    def outside(self) -> list[str]:
        """Quantities whose distribution function leaves its band. Of a hundred calibrated ones, expect one."""
        return [name for name, test in self.tests.items() if test.band < 1 - self.prob]

    @property
    def contraction(self) -> dict[str, float]:
        """One minus posterior over prior variance, on average: near 0, data say nothing and a rank test proves
        little."""
        prior = self.truth.var(0)
        shrunk = 1 - np.divide(np.square(self.sd).mean(0), prior, out=np.ones_like(prior), where=prior > 0)
        return dict(zip(self.names, shrunk.tolist(), strict=True))

    def plot(self) -> "Figure":
        """Distribution functions of all ranks, minus the uniform one, in their simultaneous bands."""
        from ..figures import ecdf_differences

        columns = [k for k, name in enumerate(self.names) if name in self.tests]
        return ecdf_differences(
            self.ranks[:, columns].T, [self.names[k] for k in columns], prob=self.prob, title=str(self).splitlines()[-1]
        )

    def to_arviz(self) -> Any:
        """The ranks as an ArviZ object with the group ``prior_sbc``, which ``plot_ecdf_pit`` of ArviZ 1.x reads.

        ArviZ 0.x draws one quantity: ``plot_ecdf(ranks[:, k], cdf=scipy.stats.uniform.cdf, pit=True, ...)``.
        """
        from ...infer.results.arviz import sbc_group

        return sbc_group({name: self.ranks[:, self.names.index(name)] for name in self.tests})

    def __str__(self) -> str:
        width = max(14, *(len(name) for name in self.names))
        lines = [
            f"{'quantity':<{width}} {'p':>8} {'band':>8} {'shift':>8} {'sd':>8} "
            f"{'mean z':>7} {'rms z':>6} {'contr.':>7}"
        ]
        for name, test in self.tests.items():
            mark = " outside" if name in self.outside else ""
            lines.append(
                f"{name:<{width}} {test.p:8.2g} {test.band:8.2g} {test.location:8.2g} {test.spread:8.2g} "
                f"{test.mean_score:7.2f} {test.sd_score:6.2f} {self.contraction[name]:7.2f}{mark}"
            )
        few = int((self.ess < FEW).sum())
        note = f", {few} of them with fewer than {FEW:.0f} effective draws" if few else ""
        verdict = "no sign of miscalibration" if self.passed else "miscalibrated"
        lines.append(
            f"SBC: {self.num_simulations} simulations{note}, {len(self.outside)} of {len(self.tests)} quantities "
            f"outside the {self.prob:.0%} band, p = {self.p_value:.2g}: {verdict}"
        )
        return "\n".join(lines)
