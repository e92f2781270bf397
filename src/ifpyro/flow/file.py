"""The file of a flow: its weights, and plain data that rebuilds the rest."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import read_tensors
from ..data.support import support_from_dict
from .axes.basis import Basis
from .axes.schedule import Schedule
from .axes.separable import SeparableAxes
from .flow import InflationaryFlow
from .networks.images import build_velocity
from .networks.velocity import Velocity
from .pretrained import restore
from .solver.grid import Grid


def load_flow(path: str | Path, *, network: Any = None, device: torch.device | str | None = None) -> InflationaryFlow:
    """Read a flow from a file written by :meth:`InflationaryFlow.save`.

    Args:
        path: the file.
        network: for a flow with a network of your own, an instance to receive its weights; for one made by
            :func:`ifpyro.from_denoiser`, the denoiser that was given there.
        device: where to put it; the CPU by default.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, foreign, from a newer version, or needs ``network``, or another one.
    """
    tensors, header = read_tensors(path, "flow")
    if network is None and header["network"] is None:
        raise ValueError(
            f"the flow in {path} has a network of its user's own; pass an instance as load(..., network=...)"
        )
    velocity: Velocity
    if header["network"] is not None and header["network"]["kind"] == "denoiser":
        velocity = restore(header["network"], network)
    else:
        velocity = network if network is not None else build_velocity(header["network"])
    dtype = tensors["basis.scale"].dtype
    flow = InflationaryFlow(
        _basis(tensors),
        Schedule.from_dict(header["schedule"]),
        velocity.to(dtype),
        event_shape=header["event_shape"],
        support=None if header["support"] is None else support_from_dict(header["support"]),
        grid=Grid(**{**header["grid"], "knots": tuple(header["grid"].get("knots", ()))}),
        coarse_steps=header["coarse_steps"],
        refinements=header["refinements"],
        report=header["report"],
    )
    try:
        flow.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the network: {error}") from error
    return flow.to(device) if device is not None else flow


def _basis(tensors: dict[str, Tensor]) -> Basis:
    rotation: Tensor | SeparableAxes
    if "basis.rotation" in tensors:
        rotation = tensors["basis.rotation"]
    else:
        count = sum(name.startswith("basis.rotation.factor_") for name in tensors)
        factors = [tensors[f"basis.rotation.factor_{k}"] for k in range(count)]
        rotation = SeparableAxes(factors, tensors["basis.rotation.order"])
    return Basis(tensors["basis.mean"], rotation, tensors["basis.scale"], tensors["basis.unit"])
