"""Amortised posteriors on the tasks of sbibm (Lueckmann et al. 2021), and what refining makes of them.

    python benchmarks/sbibm.py --data PATH [--only two_moons ...] [--simulations 1000 10000] [--observations 1 2 3 4 5]

PATH holds ``tasks.py`` (Pyro models of the tasks, with observations and reference draws). For every task and number of
simulations one posterior is trained, and for every observation three sets of draws are compared with the reference:
*amortised*, the flow's own; *refined*, weighted and where needed tempered from it; *SMC*, tempered from the prior.
C2ST by sbibm's definition, 0.5 is perfect. Seconds are processor seconds.
"""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

import ifpyro
from results import machine, show, write_section

TARGET = Path(__file__).parent / "sbibm.md"
NAMES = ("two_moons", "gaussian_mixture", "gaussian_linear", "bernoulli_glm", "slcp", "sir", "lotka_volterra")
UNIFORM = {"two_moons": (2, 1.0), "gaussian_mixture": (2, 10.0), "slcp": (5, 3.0)}
"""Tasks whose likelihood is a factor: number of parameters, and half the width of their prior."""


class Scored(TorchDistribution):
    """Noise with a density and a way to draw it, which a factor has not.

    Args:
        task: Name of the task.
        tasks: The module of the tasks.
        theta: Parameters, ``(*batch, D)``.
        shape: Of the data.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, task: str, tasks: Any, theta: Tensor, shape: torch.Size) -> None:
        self.task, self.tasks, self.theta = task, tasks, theta
        super().__init__(theta.shape[:-1], shape, validate_args=False)

    @property
    def support(self) -> Any:
        """Real data."""
        return dist.constraints.independent(dist.constraints.real, len(self.event_shape))

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Scored":
        """Of a larger batch."""
        return Scored(self.task, self.tasks, self.theta.expand(*batch_shape, -1), self.event_shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        """Data given the parameters."""
        theta = self.theta.expand(*sample_shape, *self.theta.shape)
        if self.task == "two_moons":
            return self.tasks.TwoMoons.simulate(theta)
        if self.task == "gaussian_mixture":
            width = torch.where(torch.rand(theta.shape[:-1]) < 0.5, 1.0, 0.1).unsqueeze(-1)
            return theta + width * torch.randn_like(theta)
        first, second = theta[..., 2] ** 2, theta[..., 3] ** 2
        share = torch.tanh(theta[..., 4])
        z = torch.randn(*theta.shape[:-1], 4, 2)
        one = first.unsqueeze(-1) * z[..., 0]
        other = second.unsqueeze(-1) * (
            share.unsqueeze(-1) * z[..., 0] + (1 - share**2).sqrt().unsqueeze(-1) * z[..., 1]
        )
        return theta[..., None, :2] + torch.stack([one, other], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        """The likelihood."""
        theta = self.theta
        if self.task == "two_moons":
            return self.tasks.TwoMoons.log_lik(theta, x)
        if self.task == "gaussian_mixture":
            parts = [dist.Normal(theta, s).to_event(1).log_prob(x) for s in (1.0, 0.1)]
            return torch.stack(parts, -1).logsumexp(-1) - torch.tensor(2.0).log()
        first, second, share = theta[..., 2] ** 2, theta[..., 3] ** 2, torch.tanh(theta[..., 4])
        covariance = torch.stack(
            [
                torch.stack([first**2 + 1e-6, share * first * second], -1),
                torch.stack([share * first * second, second**2 + 1e-6], -1),
            ],
            -1,
        )
        normal = dist.MultivariateNormal(theta[..., None, :2], covariance.unsqueeze(-3), validate_args=False)
        return normal.log_prob(x).sum(-1)


def model_of(task: str, tasks: Any) -> Any:
    """A task as a Pyro model that can be simulated."""
    if task not in UNIFORM:
        return tasks.MODELS[task]
    dim, half = UNIFORM[task]

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Uniform(-half * torch.ones(dim), half * torch.ones(dim)).to_event(1))
        pyro.sample("y", Scored(task, tasks, theta, y.shape), obs=y)

    return model


def load(path: Path) -> Any:
    """The module of the tasks."""
    spec = importlib.util.spec_from_file_location("tasks", path / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def thinned(draws: Tensor, count: int) -> Tensor:
    """At most ``count`` of the draws, evenly."""
    return draws[torch.linspace(0, len(draws) - 1, min(count, len(draws))).long()]


def measure(task: str, tasks: Any, simulations: int, options: argparse.Namespace) -> list[str]:
    """Rows of the table for one task and one number of simulations."""
    model = model_of(task, tasks)
    template = tasks.data(task, 1)
    began = time.process_time()
    posterior = ifpyro.amortise(
        model,
        args=(template,),
        num_simulations=simulations,
        seed=0,
        progress=False,
        max_steps=options.steps,
        drop_invalid=True,
    )
    training = time.process_time() - began
    rows = []
    for k in options.observations:
        y = tasks.data(task, k)
        reference = thinned(tasks.reference(task, k), options.draws)
        began = time.process_time()
        amortised = posterior.given(y).sample(len(reference), seed=k)["theta"]
        drawing = time.process_time() - began
        began = time.process_time()
        refined = posterior.refine(y, options.particles, seed=k)
        refining = time.process_time() - began
        began = time.process_time()
        smc = ifpyro.SMC(model, options.particles, seed=k, progress=False).run(y)
        tempering = time.process_time() - began
        few = thinned(reference, options.particles)
        scores = [
            tasks.c2st(reference, amortised),
            tasks.c2st(few, thinned(refined.get_samples()["theta"], len(few))),
            tasks.c2st(few, thinned(smc.get_samples()["theta"], len(few))),
        ]
        rows.append(
            f"| {task} | {simulations} | {k} | {scores[0]:.3f} | {scores[1]:.3f} | {scores[2]:.3f} | "
            f"{refined.pareto_k if refined.pareto_k is not None else float('nan'):.2f} | {len(refined.stages)} | "
            f"{len(smc.stages)} | {refined.log_evidence:.3f} ± {refined.log_evidence_se:.3f} | "
            f"{smc.log_evidence:.3f} ± {smc.log_evidence_se:.3f} | {training:.0f} | {drawing:.2f} | {refining:.1f} | "
            f"{tempering:.1f} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with tasks.py and its data")
    parser.add_argument("--only", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--simulations", nargs="*", type=int, default=[1_000, 10_000])
    parser.add_argument("--observations", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--draws", type=int, default=10_000, help="reference draws and draws that are compared")
    parser.add_argument("--particles", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=None, help="most steps of training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = load(options.data)
    head = (
        "| task | simulations | observation | C2ST amortised | refined | SMC | Pareto k | temperatures refined | SMC | "
        "log-evidence refined | SMC | s training | s draws | s refining | s SMC |"
    )
    for task in options.only:
        for simulations in options.simulations:
            lines: list[str] = []
            show(lines, f"## {task}, {simulations} simulations\n")
            show(lines, machine("pyro-ppl", "scikit-learn"))
            draws = f"{options.draws} draws for the amortised posterior, {options.particles} particles for the others"
            show(lines, f"C2ST with {draws}; steps of training at most {options.steps or 'as the recipe says'}.\n")
            lines += [head, "|---" * 15 + "|", *measure(task, tasks, simulations, options)]
            write_section(TARGET, f"{task}-{simulations}", lines)


if __name__ == "__main__":
    main()
