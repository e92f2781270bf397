"""Checkpoints: the whole state of a training in one file, so that resuming equals never stopping.

Beside the state a checkpoint holds what decided it: the data, the seed, the schedule, the recipe, the network, held-out
rows on their axes and what the network makes of them. A training that would be another one does not go on from it. How
long to train may change.
"""

import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import read_tensors, reading, write_tensors
from ..flow.axes.schedule import Schedule
from ..flow.networks.velocity import Velocity
from .loop import Best, Run

_WITNESSES = 64  # held-out rows whose coordinates, and velocities, must be the same


def identity(run: Run, schedule: Schedule, seed: int) -> dict[str, Any]:
    """What a training is, as far as plain data can say it."""
    return {
        "seed": seed,
        "rows and columns": [run.count, run.rows.dim],
        "data": run.fingerprint,
        "schedule": schedule.to_dict(),
        "recipe": asdict(run.recipe),
        "network": _described(run.net),
    }


def save(run: Run, path: str | Path, training: dict[str, Any]) -> None:
    """Write the whole state to a checkpoint.

    Args:
        run: the training.
        path: where to.
        training: its :func:`identity`.
    """
    tensors = {f"net.{k}": v for k, v in run.net.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in run.average.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in run.best.weights.items()}
    for number, optimiser in enumerate(run.optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{index}.{k}": v for k, v in state.items()}
    tensors |= run.resume_at or run.place()
    tensors |= {f"witness.{k}": v for k, v in _witnesses(run).items()}
    header = {
        "training": training,
        "step": run.step,
        "seconds": run.seconds,
        "best_loss": run.best.loss,
        "best_step": run.best.step,
        "history": run.history,
    }
    write_tensors(path, tensors, "checkpoint", header)


def restore(run: Run, path: str | Path, training: dict[str, Any]) -> None:
    """Continue from a checkpoint.

    Args:
        run: the training, which has not begun.
        path: the file.
        training: its :func:`identity`.

    Raises:
        ValueError: if the checkpoint is of another training; the message says in what they differ.
    """
    tensors, header = read_tensors(path, "checkpoint")
    with reading(path, "the state of a training"):
        _restore(run, path, training, tensors, header)


def _restore(run: Run, path: str | Path, training: dict[str, Any], tensors: dict[str, Tensor], header: Any) -> None:
    found = header.get("training", {})
    told = [_difference(name, found.get(name), _plain(value)) for name, value in training.items()]
    if any(told):
        raise ValueError(
            f"the checkpoint {path} belongs to another training: {'; '.join(filter(None, told))}; ask for the same "
            "again, or name another file"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        run.net.load_state_dict(part("net."))
        run.average.load_state_dict(part("average."))
        witnesses = _witnesses(run)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint {path} belongs to another network: {error}") from error
    for name, mine in witnesses.items():
        theirs = tensors[f"witness.{name}"].to(mine)
        if theirs.shape != mine.shape or not torch.allclose(
            theirs, mine, rtol=1e-2, atol=1e-3 * float(mine.abs().max())
        ):
            what = "basis, own_units or held-out rows" if name == "rows" else "network, which gives other velocities"
            raise ValueError(
                f"the checkpoint {path} belongs to another training: another {what}; ask for the same again, or name "
                "another file"
            )
    best = {k: v.to(run.rows.device) for k, v in part("best.").items()}
    if {k: v.shape for k, v in best.items()} != {k: v.shape for k, v in run.net.state_dict().items()}:
        raise ValueError(f"the best weights in {path} do not fit the network")
    for number, optimiser in enumerate(run.optimisers):
        state = optimiser.state_dict()
        for name, value in part(f"optimiser.{number}.").items():
            index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = value
        if header["step"] and len(state["state"]) != sum(len(group["params"]) for group in state["param_groups"]):
            raise ValueError(f"the checkpoint {path} belongs to another recipe; pass its recipe, or another file name")
        optimiser.load_state_dict(state)
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng_cuda"], run.rows.device)
    run.rows.go_to(tensors["position"].tolist())
    run.resume_at = run.place()
    run.step, run.seconds = int(header["step"]), float(header["seconds"])
    run.best = Best(float(header["best_loss"]), int(header["best_step"]), best)
    run.history = [(int(step), float(loss)) for step, loss in header["history"]]


def _difference(name: str, there: Any, here: Any) -> str:
    """What a checkpoint has in place of something of this training; nothing if it has the same."""
    if there == here:
        return ""
    if isinstance(there, dict) and isinstance(here, dict):  # long: what differs will do
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        there, here = ({key: side.get(key) for key in keys} for side in (there, here))
    return f"other {name}, {there} there, {here} here"


def _described(network: Velocity) -> Any:
    """A network as plain data: what rebuilds it, or how a user's own shows itself."""
    return network.spec() or {
        "class": type(network).__qualname__,
        "text": re.sub(r" at 0x[0-9a-f]+", "", repr(network)),
    }


def _witnesses(run: Run) -> dict[str, Tensor]:
    """Held-out rows on the axes of the training, and what its averaged network makes of noised ones."""
    every = -(-len(run.held_out) // _WITNESSES)
    rows, noise, t, theta = (x[:_WITNESSES] for x in run.validation)
    network = run.average.eval()
    with torch.no_grad():
        velocity = network(theta.cos() * rows[:, : run.dim] + theta.sin() * noise, run.embed(network, t, rows))
    return {"rows": run.held_out[::every], "velocity": velocity}


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def train(
    run: Run,
    path: str | Path | None,
    schedule: Schedule,
    seed: int,
    max_steps: int,
    max_seconds: float | None,
    progress: bool,
) -> str:
    """Train, from the checkpoint if there is one, and write it if there is a path; says why training stopped."""
    training, pool = identity(run, schedule, seed), run.pool
    if path is not None and pool.share_bytes(b"yes" if Path(path).exists() else b"no") == b"yes":
        restore(run, path, training)
    writes = None if path is None or pool.rank else partial(save, run, path, training)
    return run.train(max_steps, max_seconds, progress, writes)
