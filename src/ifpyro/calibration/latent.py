r"""Coverage in the latent space of a flow, carried to data space and back.

The latent is N(0, I), so the ball ``|z|^2 <= r_p^2``, ``r_p^2`` being the ``p``-quantile of ``chi^2`` with as many
degrees of freedom as there are latents, holds probability ``p``. Two questions follow (de Albuquerque & Pearson 2024,
appendix C.2):

* Do balls survive the journey? Points inside are decoded and encoded again; what fraction is still inside? Numerical
  error of the map shows here.
* Do balls hold the right share of the data? A fraction ``p`` of held-out data should have its latent in the ball.
  Errors of the *learned* map show here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..core.arguments import check_seed
from .arrays import Array, check_levels, check_probability
from .bands import band_p_value, grid, simultaneous_band

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class LatentCoverage:
    """What was inside each ball. All arrays are ``(K,)``, one entry per level."""

    levels: Array
    """Probability of each ball."""
    gaussian_before: Array
    """Fraction of ``N(0, I)`` points inside: the level, up to the luck of the draw."""
    gaussian_after: Array
    """The same points after the journey."""
    uniform_before: Array
    """Fraction of points drawn evenly in each ball that are inside it: 1."""
    uniform_after: Array
    """The same points after the journey."""
    data: Array
    """Fraction of the data with its latent inside."""
    data_error: Array
    """Binomial standard error of that at the nominal level."""
    data_low: Array
    """Lower edge of the simultaneous band of `data`."""
    data_high: Array
    """Upper edge of it."""
    data_p_value: float
    """Of the hypothesis that squared latent lengths of the data follow ``chi^2``, at a hundred points."""
    displacement: float
    """Root mean square over Gaussian points and coordinates of what the journey added."""

    @property
    def mismatch(self) -> float:
        """Largest change of a fraction on the journey, over balls and both kinds of points."""
        gaussian = np.abs(self.gaussian_after - self.gaussian_before)
        return float(max(gaussian.max(), np.abs(self.uniform_after - self.uniform_before).max()))

    @property
    def data_mismatch(self) -> float:
        """Largest difference between the data's share and the level."""
        return float(np.abs(self.data - self.levels).max())

    def __str__(self) -> str:
        lines = [f"{'ball':>6} {'gaussian before, after':>24} {'uniform after':>14} {'data':>7}   band of data"]
        for k, level in enumerate(self.levels):
            lines.append(
                f"{level:6.3g} {self.gaussian_before[k]:15.4f}, {self.gaussian_after[k]:.4f} "
                f"{self.uniform_after[k]:15.4f} {self.data[k]:7.4f}   {self.data_low[k]:.3f} to {self.data_high[k]:.3f}"
            )
        lines.append(
            f"mismatch: round trip {self.mismatch:.4f}, data {self.data_mismatch:.4f} (p = {self.data_p_value:.2g})"
        )
        return "\n".join(lines)


def latent_coverage(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    x: Any,
    levels: Sequence[float] = LEVELS,
    num: int = 20_000,
    *,
    prob: float = 0.99,
    seed: int = 0,
    batch_size: int = 8192,
) -> LatentCoverage:
    """Balls in the latent of a flow: before the journey to data space and back, after it, and against data.

    Args:
        encode: data ``(n, *event)`` to latents ``(n, dim)``, such as ``flow.encode``.
        decode: the way back, such as ``flow.decode``.
        x: held-out data, ``(N, *event)``, array or tensor.
        levels: probabilities of the balls, increasing, ``(K,)``.
        num: Gaussian points, and uniform points per ball.
        prob: probability of the simultaneous band over the levels, for the data.
        seed: of the points.
        batch_size: most points carried at once.

    Raises:
        ValueError: for levels out of range, or maps whose shapes do not fit.

    Example:
        >>> result = ifpyro.calibration.latent_coverage(flow.encode, flow.decode, flow.sample(500, seed=0), num=200)
        >>> result.mismatch < 0.01, result.data_p_value > 0.01
        (True, True)
    """
    points, prob = check_levels(levels), check_probability("prob", prob)
    x = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x), dtype=torch.get_default_dtype())
    if len(x) == 0:
        raise ValueError("x must hold at least one row of data, got none")

    def carry(values: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([through(chunk) for chunk in values.split(batch_size)])

    latents = carry(x, encode)
    if latents.ndim != 2 or len(latents) != len(x):
        raise ValueError(f"encode must give latents of shape ({len(x)}, dim), got {tuple(latents.shape)}")
    dim = latents.shape[1]
    radii = np.sqrt(stats.chi2.ppf(points, dim))
    generator = torch.Generator().manual_seed(check_seed(seed))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gaussian = draw(num, dim)
    direction = draw(num, dim)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    # The same even points serve every ball, scaled: their length is the root of a uniform number.
    even = direction * torch.rand(num, 1, generator=generator, dtype=torch.float64) ** (1 / dim)

    def after(values: Tensor) -> Tensor:
        back = carry(carry(values.to(latents), decode), encode)
        if back.shape != values.shape:
            raise ValueError(f"encode(decode(z)) must have the shape of z, {tuple(values.shape)}, got {back.shape}")
        return back.to(values)

    returned = after(gaussian)
    length = {name: _lengths(z) for name, z in (("before", gaussian), ("after", returned), ("data", latents))}
    even_after = [float((_lengths(after(radius * even)) <= radius).mean()) for radius in radii]
    inside = {name: (value <= radii[:, None]).mean(1) for name, value in length.items()}
    low, high = simultaneous_band(len(x), points, prob)
    return LatentCoverage(
        levels=points,
        gaussian_before=inside["before"],
        gaussian_after=inside["after"],
        uniform_before=np.ones(len(points)),
        uniform_after=np.array(even_after),
        data=inside["data"],
        data_error=np.sqrt(points * (1 - points) / len(x)),
        data_low=low,
        data_high=high,
        data_p_value=band_p_value(stats.chi2.cdf(length["data"] ** 2, dim), grid(len(x))),
        displacement=float((returned - gaussian).square().mean().sqrt()),
    )


def _lengths(z: Tensor) -> Array:
    return z.double().norm(dim=-1).cpu().numpy()
