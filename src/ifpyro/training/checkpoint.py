"""Checkpoints: the whole state of a training in one file, so that resuming equals never stopping."""

from pathlib import Path

import torch
from torch import Tensor

from ..core.files import read_tensors, write_tensors
from .loop import Run


def save(run: Run, path: str | Path, seed: int) -> None:
    """Write the whole state to a checkpoint."""
    tensors = {f"net.{k}": v for k, v in run.net.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in run.average.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in run.best.items()}
    for number, optimiser in enumerate(run.optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{index}.{k}": v for k, v in state.items()}
    tensors |= run.resume_at or run.place()
    header = {
        "seed": seed,
        "shape": run.shape,
        "data": run.fingerprint,
        "step": run.step,
        "seconds": run.seconds,
        "best_loss": run.best_loss,
        "best_step": run.best_step,
        "history": run.history,
    }
    write_tensors(path, tensors, "checkpoint", header)


def restore(run: Run, path: str | Path, seed: int) -> None:
    """Continue from a checkpoint.

    Raises:
        ValueError: if it belongs to other data, another network or another seed.
    """
    tensors, header = read_tensors(path, "checkpoint")
    expected = {"seed": seed, "shape": run.shape, "data": run.fingerprint}
    found = {name: header.get(name) for name in expected}
    if found != expected:
        raise ValueError(
            f"the checkpoint {path} belongs to another training: expected {expected}, found {found}; pass its seed "
            "and data, or another file name"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        run.net.load_state_dict(part("net."))
        run.average.load_state_dict(part("average."))
    except RuntimeError as error:
        raise ValueError(f"the checkpoint {path} belongs to another network: {error}") from error
    run.best = {k: v.to(run.rows.device) for k, v in part("best.").items()}
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
    run.step, run.seconds = header["step"], header["seconds"]
    run.best_loss, run.best_step = header["best_loss"], header["best_step"]
    run.history = [(int(step), float(loss)) for step, loss in header["history"]]
