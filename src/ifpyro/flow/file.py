"""The file of a flow: its weights, and plain data that rebuilds the rest."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import check_device, check_path, check_type
from ..core.files import read_tensors, reading
from ..data.conditions import Conditions
from ..data.support import support_from_dict
from .axes.basis import Basis
from .axes.schedule import Schedule
from .axes.separable import SeparableAxes
from .conditional import ConditionalFlow
from .flow import InflationaryFlow
from .networks.conditional import ConditionalVelocity
from .networks.images import build_velocity
from .networks.shifts import ModuleShift, Shift, build_shift
from .networks.velocity import Velocity
from .pretrained import restore
from .solver.grid import Grid

_MOST = 10**6  # of what is counted in a file


@torch.inference_mode(False)  # a flow that is loaded inside such a block is of use outside too
def load_flow(
    path: str | Path,
    *,
    network: Any = None,
    condition_network: nn.Module | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Read a flow from a file written by :meth:`InflationaryFlow.save` or :meth:`ConditionalFlow.save`.

    Args:
        path: the file.
        network: for a flow with a network of your own, an instance to receive its weights; for one made by
            :func:`ifpyro.from_denoiser`, the denoiser that was given there.
        condition_network: for a conditional flow with a module of your own for its conditions, an instance to receive
            its weights.
        device: where to put it; the CPU by default.

    Returns:
        An :class:`InflationaryFlow`, or a :class:`ConditionalFlow` where one was saved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, foreign, from a newer version, or needs ``network``, or another one.

    Example:
        >>> trained = ifpyro.fit(flow.sample(200, seed=0), max_steps=10, seed=0, progress=False)
        >>> trained.save("prior.safetensors")
        >>> again = ifpyro.load("prior.safetensors")
        >>> torch.equal(again.sample(5, seed=0), trained.sample(5, seed=0))
        True
    """
    device = check_device(device, meta=True)
    tensors, header = read_tensors(check_path("load", path), "flow")
    with reading(path, "a flow"):
        spec = header["network"]
        if spec is not None and not isinstance(spec, dict):
            raise ValueError(f"expected a network as plain data, got {spec!r}")
        shift_spec = None
        if "condition" in header:
            spec, shift_spec = header["network"]["inner"], header["network"]["shift"]
        if network is None and spec is None:
            raise ValueError(
                f"the flow in {path} has a network of its user's own; pass an instance as load(..., network=...)"
            )
        _check_basis(tensors)
        options = _options(header)
        schedule, basis = Schedule.from_dict(header["schedule"]), _basis(tensors)
    velocity: Velocity
    if spec is not None and spec.get("kind") == "denoiser":
        velocity = restore(spec, network, path)
    elif network is not None:
        check_type("load: network", network, Velocity, "an instance of the Velocity whose weights the file holds")
        velocity = network
    else:
        with reading(path, "a flow"):
            _check_finite(tensors, "velocity.")
            velocity = build_velocity(dict(spec or {}))
    velocity = velocity.to(basis.scale.dtype)
    with reading(path, "a flow"):
        flow: InflationaryFlow | ConditionalFlow
        if "condition" in header:
            conditions = Conditions.from_spec(header["condition"]).to(basis.scale.dtype)
            shift = _shift(shift_spec, conditions, condition_network, tensors, path)
            both = ConditionalVelocity(velocity, shift).to(basis.scale.dtype)
            flow = ConditionalFlow(conditions, basis, tensors["coefficient"], schedule, both, **options)
        else:
            flow = InflationaryFlow(basis, schedule, velocity, **options)
        flow.exact_up_to = _count(header.get("exact_up_to", flow.exact_up_to), "exact_up_to", 0, most=2**63)
        flow.autocast = _dtype(header.get("autocast"))
        free = basis.scale.new_zeros(1, flow.latent_dim)
        x, log_det = flow.chart.constrain(free, True)
        if not bool((x.sum() + log_det).isfinite()):
            raise ValueError("the bounds of its support are too large for its dtype")
    try:
        flow.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the network: {error}") from error
    if network is None:
        with reading(path, "a flow"), torch.no_grad():
            like = basis.scale.new_zeros(1, flow.latent_dim)
            found = flow.velocity(like, flow.velocity.embed(like.new_full((1,), 0.5, dtype=torch.double)))
            if found.shape != like.shape or not bool(found.isfinite().all()):
                raise ValueError(f"the network maps {tuple(like.shape)} to {tuple(found.shape)}, or to NaN")
    return flow.to(device) if device is not None else flow


def _shift(
    spec: dict[str, Any] | None,
    conditions: Conditions,
    module: nn.Module | None,
    tensors: dict[str, Tensor],
    path: str | Path,
) -> Shift:
    if spec is not None:
        return build_shift(spec)
    if module is None:
        raise ValueError(
            f"the flow in {path} has a module of its user's own for conditions; pass an instance as load(..., "
            "condition_network=...)"
        )
    size, outputs = tensors["velocity.shift.out.weight"].shape
    return ModuleShift(module, conditions.shape, outputs, size)


def _options(header: dict[str, Any]) -> dict[str, Any]:
    """What a header says of a flow beside its network, schedule and axes."""
    shape, grid, report = header["event_shape"], header["grid"], header["report"]
    _count(grid["steps"], "steps", 1)
    if not isinstance(shape, list) or not isinstance(report, dict):
        raise ValueError(f"expected an event shape and a report, got {shape!r} and {type(report).__name__}")
    return {
        "event_shape": [_count(size, "event_shape", 1) for size in shape],
        "support": None if header["support"] is None else support_from_dict(header["support"]),
        "grid": Grid(**{**grid, "knots": tuple(map(float, grid.get("knots", ())))}),
        "coarse_steps": _count(header["coarse_steps"], "coarse_steps", 1),
        "refinements": _count(header["refinements"], "refinements", 0),
        "report": report,
    }


def _count(value: Any, name: str, least: int, most: int = _MOST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"expected {name} to be an integer of at least {least}, and not absurd, got {value!r}")
    return value


def _dtype(name: Any) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, name) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"expected autocast to be the name of a dtype, got {name!r}")
    return found


def _check_basis(tensors: dict[str, Tensor]) -> None:
    """Refuse axes that are no axes, which a right checksum does not show."""
    mean, scale, unit = (tensors[f"basis.{name}"] for name in ("mean", "scale", "unit"))
    dim = len(scale)
    if scale.dtype not in (torch.float32, torch.float64) or any(x.shape != (dim,) for x in (mean, scale, unit)):
        raise ValueError(f"expected mean, scale and unit of {dim} axes, got {[tuple(x.shape) for x in (mean, unit)]}")
    if not bool((scale > 0).all() & (unit > 0).all()):
        raise ValueError("expected positive scales and units of the axes")
    _check_finite(tensors, "basis.")
    for name, value in tensors.items():
        wanted = torch.long if name == "basis.rotation.order" else scale.dtype
        if name.startswith("basis.") and value.dtype != wanted:
            raise ValueError(f"expected {name} to be {wanted}, got {value.dtype}")
    rotation = tensors.get("basis.rotation")
    if rotation is not None and (rotation.ndim != 2 or len(rotation) != dim or rotation.shape[1] > dim):
        raise ValueError(f"expected a rotation of {dim} columns, got {tuple(rotation.shape)}")
    order = tensors.get("basis.rotation.order")
    if order is not None and not torch.equal(order.sort().values, torch.arange(dim)):
        raise ValueError(f"expected an order of {dim} axes")


def _check_finite(tensors: dict[str, Tensor], prefix: str) -> None:
    for name, value in tensors.items():
        if name.startswith(prefix) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity")


def _basis(tensors: dict[str, Tensor]) -> Basis:
    rotation: Tensor | SeparableAxes
    if "basis.rotation" in tensors:
        rotation = tensors["basis.rotation"]
    else:
        count = sum(name.startswith("basis.rotation.factor_") for name in tensors)
        factors = [tensors[f"basis.rotation.factor_{k}"] for k in range(count)]
        rotation = SeparableAxes(factors, tensors["basis.rotation.order"])
    return Basis(tensors["basis.mean"], rotation, tensors["basis.scale"], tensors["basis.unit"])
