"""Seconds until the answer is right: our engines beside everything else that could sample the same posterior.

    python benchmarks/peers_posterior.py [--only moons scurve digits] [--peers NAME ...] [--cap 90] [--table]

The three posteriors of posterior.py, with the same trained flow (for the samplers in JAX: the same weights, checked to
1e-5). Every sampler runs in a process of its own on one core; its clock counts processor seconds from the first line
that knows the problem, so compilation and warm-up count and imports do not.

*Right within 2%*: for every coordinate of ``x`` the distribution function of all draws so far differs from that of a
long reference by at most 0.02 at the reference's 19 quantiles from 5% to 95%, and for digits the share of every class
(by a classifier) by at most 0.02; from then on, to the end of the run. In the plane and in space the one unobserved
coordinate separates the modes, so its distribution function holds their weights. Samplers that are run to the end
before they say anything (SMC) get several sizes, and the seconds of the smallest right one. References: 400,000 prior
draws weighted by the likelihood; for digits two long runs of SMC, pooled by evidence (``--reference``).

Peers: importance sampling from the prior; Pyro's NUTS, one chain, with the same flow, and with a zuko NSF as the prior
(its prior differs a little, so its error has a floor); NumPyro's NUTS (64 chains, vectorized); BlackJAX's ChEES-HMC (64
chains) and adaptive tempered SMC; and our own HMC's sampling phase written in JAX, started and tuned by ours, whose
seconds until then are charged to it.
"""

import argparse
import contextlib
import json
import multiprocessing
import queue
import time
from typing import Any

import torch

import posterior
from peers_reference import OBSERVED, judge, reference
from peers_samplers import SAMPLERS, Clock, TimeIsUp
from results import CACHE, RESULTS, machine, write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(OBSERVED), choices=list(OBSERVED))
    parser.add_argument("--peers", nargs="*", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--cap", type=float, default=90.0, help="processor seconds for every sampler")
    parser.add_argument("--reference", action="store_true", help="make the references, and stop")
    parser.add_argument("--table", action="store_true", help="only make the tables again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        if options.reference:
            reference(name)
            continue
        for peer in [] if options.table else options.peers:
            found = judge(name, race(name, peer, options.cap))
            print(name, peer, json.dumps(found), flush=True)
            (CACHE / f"posterior-{name}-{peer}.json").write_text(json.dumps(found))
        lines = table(name)
        print("\n".join(lines))
        write_section(RESULTS, f"posterior-{name}", lines)


def race(name: str, peer: str, cap: float) -> list[dict[str, Any]]:
    """All blocks that a sampler reported within its processor seconds."""
    context = multiprocessing.get_context("spawn")
    channel: Any = context.Queue()
    process = context.Process(target=_child, args=(name, peer, cap, channel), daemon=True)
    process.start()
    blocks: list[dict[str, Any]] = []
    deadline = time.monotonic() + 4 * cap + 60
    while time.monotonic() < deadline:
        try:
            block = channel.get(timeout=1)
        except queue.Empty:
            if not process.is_alive():
                break
            continue
        if block is None:
            break
        blocks.append(block)
    process.terminate()
    process.join()
    return blocks


def _child(name: str, peer: str, cap: float, channel: Any) -> None:
    torch.set_num_threads(1)
    problem = posterior.PROBLEMS[name](False)
    with contextlib.suppress(TimeIsUp):
        SAMPLERS[peer](name, problem, Clock(cap, channel.put))
    channel.put(None)
    channel.close()
    channel.join_thread()


TITLES = {
    "moons": "Moons: second coordinate observed, sd 0.2",
    "scurve": "S-curve: two of three coordinates observed, sd 0.1",
    "digits": "Digits: upper half of 8x8 pixels observed, sd 0.1",
}


def table(name: str) -> list[str]:
    """One line a sampler, from all that is in the cache."""
    lines = [
        f"## Posterior peers. {TITLES[name]}\n",
        "| sampler | right within 5%, s | within 2%, s | seconds run | last error | ESS | ESS/s | R-hat |\n"
        + "|---" * 8
        + "|",
    ]
    for peer in SAMPLERS:
        path = CACHE / f"posterior-{name}-{peer}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        if not found["blocks"]:
            lines.append(f"| {peer} | – | – | no draw within its time | – | – | – | – |")
            continue

        def text(value: float | None, digits: int) -> str:
            return "–" if value is None else f"{value:.{digits}f}"

        ess = found.get("ess")
        rate = None if ess is None else ess / found["seconds"]
        lines.append(
            f"| {peer} | {text(found['right 0.05'], 1)} | {text(found['right 0.02'], 1)} | {found['seconds']:.0f} "
            f"| {found['errors'][-1][1]:.3f} | {text(ess, 0)} | {text(rate, 1)} | {text(found.get('r_hat'), 3)} |"
        )
    lines.append(
        f"\n`python benchmarks/peers_posterior.py --only {name}`; seed 0; "
        f"{machine('pyro-ppl', 'zuko', 'jax', 'numpyro', 'blackjax')}"
    )
    return lines


if __name__ == "__main__":
    main()
