"""The first ``k`` latents as a model of their own."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.arrays import as_real


class _Flow(Protocol):
    """What a decoder asks of a flow."""

    report: dict[str, Any]

    @property
    def latent_dim(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def encode(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Decoder:
    """A map from the first ``k`` latents to data, the remaining latents at their mean, zero.

    Its image has ``k`` dimensions and hence no density over the data, so it is no prior distribution, but it can stand
    inside a model::

        decoder = flow.decoder(8)


        def model(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
            x = pyro.deterministic("x", decoder(z), event_dim=len(flow.event_shape))
            pyro.sample("y", dist.Normal(x[..., 1], 0.2), obs=y)

    Attributes:
        flow: the flow.
        k: number of latents.

    Example:
        >>> decoder = flow.decoder(1)
        >>> decoder.k, decoder(torch.zeros(5, 1)).shape
        (1, torch.Size([5, 2]))
    """

    flow: _Flow
    k: int

    def __call__(self, z: Tensor) -> Tensor:
        """Data of shape ``(*batch, *event_shape)`` for latents of shape ``(*batch, k)``."""
        if not isinstance(z, Tensor):
            z = as_real(z, "latents", self.flow.dtype).to(self.flow.device)
        if z.shape[-1:] != (self.k,):
            raise ValueError(f"expected latents of shape (*batch, {self.k}), got {tuple(z.shape)}")
        return self.flow.decode(torch.nn.functional.pad(z, (0, self.flow.latent_dim - self.k)))

    def encode(self, x: Tensor) -> Tensor:
        """The first ``k`` latents of data ``(*batch, *event_shape)``: shape ``(*batch, k)``.

        Example:
            >>> flow.decoder(1).encode(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
            tensor([[-0.674],
                    [ 0.674]])
        """
        return self.flow.encode(x)[..., : self.k]

    @property
    def reconstruction_error(self) -> float:
        """Share of the variance of held-out data that ``k`` latents lose: 0 is perfect, 1 is as good as the mean.

        Measured by :func:`ifpyro.fit` for powers of two; for another ``k``, the figure of the next smaller one.

        Raises:
            ValueError: if the flow was not made by ``fit``, so that nothing was measured.
        """
        return self._measured("error")

    @property
    def pca_error(self) -> float:
        """The same for as many principal components of the training data. See :attr:`reconstruction_error`."""
        return self._measured("pca")

    def _measured(self, name: str) -> float:
        report = self.flow.report.get("reconstruction")
        if report is None:
            raise ValueError(
                "expected a flow whose reconstruction was measured by fit, found no flow.report['reconstruction']; "
                "measure it: flow.report['reconstruction'] = ifpyro.flow.reconstruction.measure(flow, train, held_out)"
            )
        index = max(i for i, k in enumerate(report["k"]) if k <= self.k)
        return float(report[name][index])
