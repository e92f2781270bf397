r"""Orthonormal axes completed to a basis that is never stored.

With the leading axes ``W_1`` of shape ``(D, r)``, signs ``S`` and the first ``r`` columns ``E`` of the identity,

.. math:: Q = I - M G M^T, \qquad M = W_1 S - E, \qquad G = (I - S W_{1,1:r}^T)^{-1}

is orthogonal and its first ``r`` columns are ``W_1 S``: a product of ``r`` reflections in compact form (Ballard et al.
2015, "Reconstructing Householder vectors from TSQR", for the signs). It costs ``4 D r`` operations a row.
"""

import torch
from torch import Tensor, nn


class Completion(nn.Module):
    """``Q`` with the signs ``S`` taken back: a square matrix whose first columns are the axes.

    Args:
        axes: ``W_1``, orthonormal columns, ``(D, r)`` with ``0 < r < D``.
    """

    mirror: Tensor
    core: Tensor
    sign: Tensor

    def __init__(self, axes: Tensor) -> None:
        super().__init__()
        exact, r = axes.detach().double().cpu(), axes.shape[1]
        sign = torch.geqrf(exact)[0].diagonal().sign()
        mirror = exact * sign
        core = torch.linalg.inv(torch.eye(r, dtype=torch.double) - mirror[:r].T)
        mirror[:r] -= torch.eye(r, dtype=torch.double)
        sign = torch.cat([sign, sign.new_ones(len(axes) - r)])
        for name, value in (("mirror", mirror), ("core", core), ("sign", sign)):
            self.register_buffer(name, value.to(axes), persistent=False)

    def rotate(self, u: Tensor) -> Tensor:
        """``u Q S`` for ``u`` of shape ``(..., D)``."""
        return (u - ((u @ self.mirror) @ self.core) @ self.mirror.T) * self.sign

    def rotate_back(self, a: Tensor) -> Tensor:
        """``a (Q S)^T`` for ``a`` of shape ``(..., D)``."""
        a = a * self.sign
        return a - ((a @ self.mirror) @ self.core.T) @ self.mirror.T
