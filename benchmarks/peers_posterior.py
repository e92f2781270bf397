"""Seconds until the answer is right: our engines beside everything else that could sample the same posterior.

    python benchmarks/peers_posterior.py [--only moons scurve digits] [--peers NAME ...] [--cap 60] [--table]

The three posteriors of posterior.py, with the same trained flow (for the samplers in JAX: the same weights, checked to
1e-5). Every sampler runs in a process of its own on one core; its clock counts processor seconds from the first line
that knows the problem, so compilation and warm-up count and imports do not.

*Right within 2%*: for the coordinates of ``x`` that were not observed, the distribution functions of all draws so far
differ from those of a long reference by at most 0.02 at the reference's 19 quantiles from 5% to 95% (the largest gap of
each coordinate, averaged over coordinates), and for digits the share of every class (by a classifier) by at most 0.02;
from then on, to the end of the run. In the plane and in space one coordinate is not observed, and separates the modes:
its distribution function holds their weights. Samplers that are run to the end before they say anything (SMC) get
several sizes, and the seconds of the smallest right one. References, with an error of their own that the table states:
importance sampling from a mixture fitted to SMC's draws, and for digits two long runs of HMC.

Peers: importance sampling from the prior; Pyro's NUTS, one chain, with the same flow, and with a zuko NSF as the prior,
in data space and in its latent space (its posterior is another one, and is what these rows are judged by in the plane
and in space; on digits nothing exact reaches it, and they are judged by ours); NumPyro's NUTS (64 chains, vectorized,
trees of depth 5 at most); BlackJAX's ChEES-HMC (64 chains, 16 leapfrog steps at most) and adaptive tempered SMC; and
our own HMC's sampling phase written in JAX, started and tuned by ours, with the same guide, whose seconds until then
are charged to it. Peers warm up for 60 transitions; ours, which SMC starts and tunes, for 20. NumPyro and BlackJAX do
so in one compiled call, which cannot be looked into: a warm-up that outlasts the cap gives no draw.
"""

import argparse
import json
import multiprocessing
import queue
import signal
import traceback
from typing import Any

import torch

import posterior
from peers_nsf import DATA, LATENT, NSFPosterior, nsf_reference
from peers_reference import ERRORS, OBSERVED, judge, reference, reference_error
from peers_samplers import SAMPLERS, Clock, TimeIsUp
from results import CACHE, RESULTS, machine, write_section

OURS = ("ifpyro SMC", "ifpyro HMC", "ifpyro elliptical slice")
WITHOUT_PACKAGE = ("ifpyro HMC in JAX", "importance sampling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(OBSERVED), choices=list(OBSERVED))
    parser.add_argument("--peers", nargs="*", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--cap", type=float, default=60.0, help="processor seconds for every sampler")
    parser.add_argument("--reference", action="store_true", help="make the references, and stop")
    parser.add_argument("--table", action="store_true", help="only make the tables again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        if options.reference:
            reference(name)
            continue
        for peer in [] if options.table else options.peers:
            right = None
            if peer in (DATA, LATENT):
                NSFPosterior(name, peer)  # trained before its clock starts
                right = nsf_reference(name)
            found = judge(name, race(name, peer, options.cap), right) | {"cap": options.cap}
            print(name, peer, json.dumps(found), flush=True)
            (CACHE / f"posterior-{name}-{peer}.json").write_text(json.dumps(found))
        lines = table(name)
        print("\n".join(lines))
        write_section(RESULTS, f"posterior-{name}", lines)


def race(name: str, peer: str, cap: float) -> list[dict[str, Any]]:
    """All blocks that a sampler reported within its processor seconds.

    Raises:
        RuntimeError: if it failed.
    """
    context = multiprocessing.get_context("spawn")
    channel: Any = context.Queue()
    process = context.Process(target=_child, args=(name, peer, cap, channel), daemon=True)
    process.start()
    blocks: list[dict[str, Any]] = []
    while True:
        try:
            block = channel.get(timeout=1)
        except queue.Empty:
            if not process.is_alive():
                if process.exitcode != -signal.SIGXCPU:  # that is a compiled call that outlasted the limit
                    raise RuntimeError(f"{peer} ended on {name} with status {process.exitcode}") from None
                break
            continue
        if block is None:
            break
        if isinstance(block, str):
            raise RuntimeError(f"{peer} failed on {name}:\n{block}")
        blocks.append(block)
    process.terminate()
    process.join()
    return blocks


def _child(name: str, peer: str, cap: float, channel: Any) -> None:
    torch.set_num_threads(1)
    problem = posterior.PROBLEMS[name](False)
    try:
        SAMPLERS[peer](name, problem, Clock(cap, channel.put))
    except TimeIsUp:
        pass
    except Exception:
        channel.put(traceback.format_exc())
    channel.put(None)
    channel.close()
    channel.join_thread()


TITLES = {
    "moons": "Moons: second coordinate observed, sd 0.2",
    "scurve": "S-curve: two of three coordinates observed, sd 0.1",
    "digits": "Digits: upper half of 8x8 pixels observed, sd 0.1",
}


NOTES = {
    "moons": (
        "ChEES, 64 chains from the prior, shrinks its step until the worst chain accepts; without the bound on its",
        "trajectories its warm-up lasted longer than the cap. With a trained NSF as the prior NUTS draws soon, but one",
        "chain seldom changes its mode, in the space of the data or of the latents.",
    ),
    "scurve": (
        "Gradient moves do not cross between the pieces of this posterior: chains that started in the prior keep the",
        "weights they came with.",
    ),
    "digits": (
        "The reference is HMC of ours, with other seeds. Chains from the prior do meet here, and ChEES is right",
        "too. Most of our time passes before the first draw, with SMC, which finds the starts, and the warm-up. In",
        "the long run our HMC in JAX has twice the effective draws a second, once it is compiled. BlackJAX's SMC",
        "did not finish its smallest run, of 1,024 particles.",
    ),
}


def table(name: str) -> list[str]:
    """One line a sampler, from all that is in the cache."""
    lines = [
        f"## Posterior peers. {TITLES[name]}\n",
        "| sampler | right within 5%, s | within 2%, s | last error | ESS | ESS/s | R-hat |",
        "|---" * 7 + "|",
    ]
    results = {}
    for peer in SAMPLERS:
        path = CACHE / f"posterior-{name}-{peer}.json"
        if path.exists():
            results[peer] = json.loads(path.read_text())
            lines.append(f"| {peer} | {cells(results[peer])} |")
    lines.append(f"\n{verdict(results)} The reference's own error: {reference_error(name):.4f}.")
    lines += ["", *NOTES[name]]
    lines.append(
        f"\n`python benchmarks/peers_posterior.py --only {name}`; seed 0; "
        f"{machine('pyro-ppl', 'zuko', 'jax', 'numpyro', 'blackjax')}"
    )
    return lines


def cells(found: dict[str, Any]) -> str:
    """The figures of one sampler."""
    not_within = f"not within {found['cap']:.0f}"
    if not found["blocks"]:
        return f"{not_within} | {not_within} | no draw | – | – | –"

    def text(value: float | None, digits: int, otherwise: str = "–") -> str:
        return otherwise if value is None else f"{value:.{digits}f}"

    ess = found.get("ess")
    rate = None if ess is None else ess / found["seconds"]
    right = " | ".join(text(found[f"right {level}"], 1, not_within) for level in ERRORS)
    return f"{right} | {found['errors'][-1][1]:.3f} | {text(ess, 0)} | {text(rate, 1)} | {text(found.get('r_hat'), 3)}"


def verdict(results: dict[str, dict[str, Any]]) -> str:
    """How much sooner our best is right within 2% than the best installed peer, and than ours in JAX."""

    def soonest(chosen: list[str]) -> tuple[float, str]:
        """Seconds, and whether that is only a bound."""
        times = [(results[p]["right 0.02"], "") for p in chosen if results[p].get("right 0.02") is not None]
        return min(times, default=(max(results[p]["cap"] for p in chosen), "more than "))

    ours = [p for p in results if p in OURS]
    if not ours or soonest(ours)[1]:
        return "Ours is not right within 2% in its time."
    best = soonest(ours)[0]
    parts = [f"Ours is right within 2% after {best:.1f} s"]
    for label, chosen in (
        ("the best installed peer", [p for p in results if p not in (*OURS, *WITHOUT_PACKAGE)]),
        ("importance sampling from the prior", [p for p in results if p == "importance sampling"]),
        ("our HMC in JAX", [p for p in results if p == "ifpyro HMC in JAX"]),
    ):
        if chosen:
            seconds, bound = soonest(chosen)
            parts.append(f"{label} needs {bound}{seconds / best:.1f} times as long")
    return f"{'; '.join(parts)}."


if __name__ == "__main__":
    main()
