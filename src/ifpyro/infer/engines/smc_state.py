"""Where tempered SMC stands between two temperatures: what going on needs, in memory and in one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.files import read_tensors, reading, write_tensors
from ...flow.solver.fidelity import Evaluations, Level
from ..results.draws import check_same_density
from .guided_density import Target, Value
from .hamiltonian import Info
from .particle_moves import Moved, Mover, Stage
from .prior_draws import Population
from .tempering import Genealogy

KIND = "particles"


@dataclass(frozen=True)
class SMCState:
    """The particles after the moves of one temperature, the evidence so far, tuning and random state."""

    moved: Moved
    log_evidence: Tensor
    """Of every island, ``(islands,)``."""
    genealogy: Genealogy
    """Whose errors the evidence has so far."""
    prior_draws: int
    """Draws of the first population."""
    stages: list[Stage]
    """Of all temperatures so far."""
    pareto_k: float | None
    tuning: dict[str, Any]
    """Numbers of the mover and its guide."""
    direction: Tensor | None
    """Leading axis of the trajectory length's criterion."""
    generator: Tensor
    """Random state."""

    @property
    def beta(self) -> float:
        """Inverse temperature reached."""
        return self.moved.stage.beta

    def resume(self, mover: Mover) -> None:
        """Give a mover the tuning, and its generator the random state, that they had."""
        mover.step.step_size, mover.jumping = self.tuning["step_size"], self.tuning["jumping"]
        mover.length.resume(self.tuning["length"], self.direction)
        target = mover.target
        target.level, target.one_level = level_from_plain(self.tuning["level"]), self.tuning["one_level"]
        mover.generator.set_state(self.generator)

    def save(self, path: str | Path, sampler: dict[str, Any]) -> None:
        """Write it to a file, with what the sampler was asked for."""
        info = self.moved.info._asdict()
        tensors = {
            "q": self.moved.q,
            "log_prior": self.moved.fine.log_prior,
            "log_likelihood": self.moved.fine.log_likelihood,
            "pool.q": self.moved.pool.q,
            "pool.log_prior": self.moved.pool.fine.log_prior,
            "pool.log_likelihood": self.moved.pool.fine.log_likelihood,
            "ancestor": self.genealogy.ancestor,
            "error": self.genealogy.error,
            "log_evidence": self.log_evidence,
            "generator": self.generator,
            **{f"info.{name}": value for name, value in info.items() if isinstance(value, Tensor)},
        }
        if self.direction is not None:
            tensors["direction"] = self.direction
        header = {
            "sampler": sampler,
            "per_particle": self.moved.pool.per_particle,
            "prior_draws": self.prior_draws,
            "stages": [stage_to_plain(stage) for stage in self.stages],
            "pareto_k": self.pareto_k,
            "tuning": self.tuning,
            "num_steps": int(info["num_steps"]),
        }
        write_tensors(path, tensors, KIND, header)

    @classmethod
    def load(cls, path: str | Path, sampler: dict[str, Any], target: Target) -> "SMCState":
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            sampler: what the sampler is asked for now.
            target: the density that the particles must belong to.

        Raises:
            ValueError: if the file is damaged, or its particles are of another sampler, model or data.
        """
        tensors, header = read_tensors(path, KIND)
        device = getattr(target.density, "device", "cpu")
        with reading(path, "particles"):
            found = header["sampler"]
            other = {name: (found.get(name), value) for name, value in sampler.items() if found.get(name) != value}
            if other:
                told = "; ".join(f"{name} {there!r} there, {here!r} here" for name, (there, here) in other.items())
                raise ValueError(f"the particles in {path} are of another sampler: {told}; name another checkpoint")
            random_state = tensors.pop("generator")
            moved_to = {name: value.to(device) for name, value in tensors.items()}
            q = moved_to["q"]
            if q.shape != (sampler["num_particles"], target.density.dim) or not bool(q.isfinite().all()):
                raise ValueError(
                    f"the particles in {path} have shape {tuple(q.shape)}, this model needs "
                    f"{(sampler['num_particles'], target.density.dim)}"
                )
            fine = Value(moved_to["log_prior"], moved_to["log_likelihood"])
            visited = Value(moved_to["pool.log_prior"], moved_to["pool.log_likelihood"])
            pool = Population(moved_to["pool.q"], visited, int(header["per_particle"]))
            if not len(pool.q) == len(visited.log_prior) == len(q) * pool.per_particle:
                raise ValueError(f"the states in {path} are not {pool.per_particle} of each of {len(q)} particles")
            stages = [stage_from_plain(stage) for stage in header["stages"]]
            values = {name: moved_to.get(f"info.{name}") for name in Info._fields}
            info = Info(**{**values, "num_steps": int(header["num_steps"])})  # type: ignore[arg-type]
            state = cls(
                moved=Moved(q, fine, pool, info, stages[-1]),
                log_evidence=moved_to["log_evidence"],
                genealogy=Genealogy(moved_to["ancestor"], moved_to["error"]),
                prior_draws=int(header["prior_draws"]),
                stages=stages,
                pareto_k=header["pareto_k"],
                tuning=header["tuning"],
                direction=moved_to.get("direction"),
                generator=random_state,
            )
        check_same_density(target.fine(q).tempered(1.0), fine.tempered(1.0), f"the particles in {path}")
        return state


def state_of(
    mover: Mover,
    moved: Moved,
    log_evidence: Tensor,
    genealogy: Genealogy,
    prior_draws: int,
    stages: list[Stage],
    pareto_k: float | None,
) -> SMCState:
    """Where a sampler stands; nothing in it changes when the sampler goes on."""
    target, (length, direction) = mover.target, mover.length.state()
    tuning = {
        "step_size": mover.step.step_size,
        "jumping": mover.jumping,
        "length": length,
        "level": level_to_plain(target.level),
        "one_level": target.one_level,
    }
    random_state, evidence = mover.generator.get_state(), log_evidence.clone()
    return SMCState(moved, evidence, genealogy, prior_draws, list(stages), pareto_k, tuning, direction, random_state)


def level_to_plain(level: Level | None) -> Any:
    """A fidelity, or none, as JSON can hold it."""
    return {"evaluations": level.count} if isinstance(level, Evaluations) else level


def level_from_plain(value: Any) -> Level:
    """The fidelity of `level_to_plain`."""
    level: Level = Evaluations(int(value["evaluations"])) if isinstance(value, dict) else value
    return level


def stage_to_plain(stage: Stage) -> list[Any]:
    """A stage as JSON can hold it."""
    return [*stage[:-1], level_to_plain(stage.level)]


def stage_from_plain(value: list[Any]) -> Stage:
    """The stage of `stage_to_plain`."""
    return Stage._make([*value[:-1], level_from_plain(value[-1])])
