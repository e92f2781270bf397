"""``amortise``: from a Pyro model to a posterior for every data set."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..core.arguments import check_count
from ..training import fit
from .posterior import AmortisedPosterior
from .simulations import Joint, usable


def amortise(
    model: Callable[..., Any],
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    observed: Sequence[str] | None = None,
    num_simulations: int = 10_000,
    drop_invalid: bool = False,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    **options: Any,
) -> AmortisedPosterior:
    """Train the posterior of a Pyro model for all data sets at once, on simulations from the model itself.

    The flow is over the model's unconstrained latents, so that supports, several sites and discrete latents that are
    summed out need no care. ``given(y)`` draws from it at once; ``refine(y)`` makes one posterior, or many, exact.

    Args:
        model: A Pyro model.
        args: Its positional arguments, data of the right shape among them; their values do not matter.
        kwargs: Its keyword arguments.
        observed: The sites that are data, where the model is called without them.
        num_simulations: Simulations to train on.
        drop_invalid: Leave out simulations with NaN or infinity, which are an error by default.
        seed: Of simulations and training; a fresh one is drawn by default.
        batch_size: Most simulations at once.
        progress: Show progress bars.
        options: For :func:`ifpyro.fit`, such as ``max_seconds``, ``network`` or ``condition_network``.

    Returns:
        The amortised posterior.

    Raises:
        ModelError: If the model has no observed site, or cannot be simulated.
        ValueError: If simulations hold NaN or infinity, or for arguments out of range.
    """
    if set(options) & {"condition", "labels", "sets", "support"}:
        raise ValueError("amortise makes the condition itself, in unconstrained space: leave out labels, sets, support")
    check_count("num_simulations", num_simulations, 32)
    seed = torch.Generator().seed() % 2**31 if seed is None else check_count("seed", seed, 0)
    joint = Joint.of(model, args, kwargs or {}, observed, seed)
    q, data = joint.simulate(num_simulations, seed, progress, batch_size)
    q, data, invalid = usable(q, data, drop_invalid)
    columns = joint.columns(data, (len(q),))
    flow = fit(q, condition=columns, seed=seed, progress=progress, **options)
    flow.report["simulations"] = {"count": len(q), "invalid": invalid}
    return AmortisedPosterior(joint, flow, seed)
