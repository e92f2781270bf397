"""Modules that turn conditions into shifts of a velocity's embedding."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn


class Shift(nn.Module, ABC):
    """From what is known of a condition to ``g(c)``, ``(n, E)``.

    Attributes:
        takes: ``"features"``, those of :class:`~ifpyro.data.conditions.Conditions`, ``(n, p)``; or ``"inputs"``, its
            standardised conditions, flattened, ``(n, numel)``.
    """

    takes: Literal["features", "inputs"] = "features"

    @abstractmethod
    def forward(self, known: Tensor) -> Tensor:
        """``(n, E)``."""

    def spec(self) -> dict[str, Any] | None:
        """Plain data that rebuilds this module, or None if the user must pass it to :func:`ifpyro.load`."""
        return None


class FeatureShift(Shift):
    """A perceptron of the features.

    Args:
        dim: Number ``p`` of features.
        size: Of the embedding, ``E``.
        width: Hidden units.
        dropout: Probability of dropping a hidden unit in training.
    """

    def __init__(self, dim: int, size: int, width: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim, self.size, self.width, self.dropout = dim, size, width, dropout
        drop = nn.Dropout(dropout)
        self.net = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), drop, nn.Linear(width, width), nn.SiLU(), drop)
        self.out = nn.Linear(width, size)
        self.direct = nn.Linear(dim, size, bias=False)

    def forward(self, known: Tensor) -> Tensor:
        """See :meth:`Shift.forward`."""
        return self.out(self.net(known)) + self.direct(known)

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"kind": "features", "dim": self.dim, "size": self.size, "width": self.width, "dropout": self.dropout}


class SetShift(Shift):
    """A perceptron of the elements' mean features, whatever their order and number (Zaheer et al. 2017).

    Args:
        elements: Most elements ``M``; absent ones are NaN.
        dim: Entries ``k`` of an element.
        size: Of the embedding, ``E``.
        width: Hidden units.
        dropout: Probability of dropping a hidden unit in training.
    """

    takes = "inputs"

    def __init__(self, elements: int, dim: int, size: int, width: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.elements, self.dim, self.size, self.width, self.dropout = elements, dim, size, width, dropout
        self.each = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        drop = nn.Dropout(dropout)
        self.net = nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU(), drop, nn.Linear(width, size))

    def forward(self, known: Tensor) -> Tensor:
        """See :meth:`Shift.forward`."""
        elements = known.unflatten(-1, (self.elements, self.dim))
        present = ~elements.isnan().any(-1, keepdim=True)
        values = torch.where(present, elements, elements.new_zeros(()))
        seen = torch.where(present, self.each(values), values.new_zeros(()))
        count = present.sum(-2).to(known)
        mean = seen.sum(-2) / count.clamp(min=1)
        root = seen.sum(-2) / count.clamp(min=1).sqrt() / self.elements**0.5
        return self.net(torch.cat([mean, root, count / self.elements], -1))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "kind": "set",
            "elements": self.elements,
            "dim": self.dim,
            "size": self.size,
            "width": self.width,
            "dropout": self.dropout,
        }


class ModuleShift(Shift):
    """Any module from standardised conditions, in their own shape, to ``(n, K)``, and a linear layer.

    Args:
        module: The module.
        shape: Of one condition.
        outputs: ``K``.
        size: Of the embedding, ``E``.
    """

    takes = "inputs"

    def __init__(self, module: nn.Module, shape: torch.Size, outputs: int, size: int) -> None:
        super().__init__()
        self.module, self.shape = module, shape
        self.out = nn.Linear(outputs, size)

    def forward(self, known: Tensor) -> Tensor:
        """See :meth:`Shift.forward`."""
        lead = known.shape[:-1]
        result: Tensor = self.out(self.module(known.reshape(-1, *self.shape)).reshape(*lead, -1))
        return result


class MixtureShift(Shift):
    r"""The exact shift of a Gaussian mixture: log-weights and means of ``x | c``.

    .. math:: w_k(c) \propto w_k N(c; m_k^c, S_k^{cc}), \qquad m_k(c) = a_k + G_k c .

    Args:
        log_weights: ``log w_k``, ``(K,)``.
        centres: ``m_k^c``, ``(K, p)``.
        whiten: ``U_k`` with ``U_k S_k^{cc} U_k^T = I``, ``(K, p, p)``.
        means: ``a_k``, in the coordinates ``x_0/s`` and relative to the frame, ``(K, D)``.
        gains: ``G_k``, likewise, ``(K, D, p)``.
        before: Entries of the embedding that no condition shifts.
    """

    log_weights: Tensor
    centres: Tensor
    whiten: Tensor
    means: Tensor
    gains: Tensor

    def __init__(
        self, log_weights: Tensor, centres: Tensor, whiten: Tensor, means: Tensor, gains: Tensor, before: int
    ) -> None:
        super().__init__()
        self.before = before
        parts = {"log_weights": log_weights, "centres": centres, "whiten": whiten, "means": means, "gains": gains}
        for name, value in parts.items():
            self.register_buffer(name, value)

    def forward(self, known: Tensor) -> Tensor:
        """See :meth:`Shift.forward`; features are the conditions themselves."""
        white = (self.whiten @ (known.unsqueeze(-2) - self.centres).unsqueeze(-1)).squeeze(-1)
        log_det = self.whiten.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_weights = self.log_weights + log_det - 0.5 * white.square().sum(-1)
        means = self.means + (self.gains @ known.unsqueeze(-1).unsqueeze(-3)).squeeze(-1)
        shifts = torch.cat([torch.log_softmax(log_weights, -1), means.flatten(-2)], -1)
        return nn.functional.pad(shifts, (self.before, 0))


def build_shift(spec: dict[str, Any]) -> Shift:
    """The module that :meth:`Shift.spec` described."""
    options = dict(spec)
    kind = options.pop("kind", None)
    makers: dict[str, type[Shift]] = {"features": FeatureShift, "set": SetShift}
    if kind not in makers:
        raise ValueError(f"expected a condition's network of kind {sorted(makers)}, got {kind!r}")
    return makers[kind](**options)
