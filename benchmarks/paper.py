"""The paper, reproduced: toy sets, what a latent means, diagnostics. One command for all tables, in one run.

    python benchmarks/paper.py [SECTION ...] [--train [DATA ...]] [--quick] [--jobs 2]

"The paper" is de Albuquerque & Pearson, NeurIPS 2024, arXiv 2407.08843. Flows are trained once, with fixed seeds and
numbers of steps, and kept in ``benchmarks/.cache``; they, and then the sections, are shared out among ``--jobs``
processes of one thread each. Tables are printed, and replace those of the same sections in ``benchmarks/paper.md``.
The work can be done piecewise, by naming sections; ``--train`` trains flows (of the data named) and stops there.
``--quick`` takes the same way with a few barely trained flows and few rows, and writes nothing.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import paper_diagnostics
import paper_latents
import paper_posterior
import paper_toy
from paper_flows import Key, flow_of, is_cached
from results import machine, read_sections, write_section

RESULTS = Path(__file__).parent / "paper.md"
HEADER = """# The paper, reproduced

Written by `python benchmarks/paper.py`; seeds are in the scripts. The paper: de Albuquerque & Pearson, NeurIPS 2024,
[arXiv 2407.08843](https://arxiv.org/abs/2407.08843). The tutorials
[inflationary flows](../tutorials/04_inflationary_flows.ipynb) and
[what a latent means](../tutorials/06_what_a_latent_means.ipynb) explain what is measured here.
"""
TOOK = "Processor seconds, without training: "
SECTIONS: dict[str, tuple[Callable[[bool], Iterator[str]], Callable[[bool], list[Key]]]] = {
    "toys": (paper_toy.toys, paper_toy.keys),
    "gaps": (paper_latents.gaps, paper_latents.gap_keys),
    "dimensions": (paper_latents.dimensions, paper_latents.dimension_keys),
    "pixels": (paper_latents.pixels, partial(paper_latents.keys, "digits, pixels")),
    "logits": (paper_latents.logits, partial(paper_latents.keys, "digits, logits")),
    "breast_cancer": (paper_latents.breast_cancer, partial(paper_latents.keys, "breast cancer")),
    "wine": (paper_latents.wine, partial(paper_latents.keys, "wine")),
    "posterior": (paper_posterior.posterior, paper_posterior.keys),
    "residuals": (paper_diagnostics.residuals, paper_diagnostics.residual_keys),
    "neighbours": (paper_diagnostics.neighbours, paper_diagnostics.neighbour_keys),
}
"""Name -> the lines of a section, and the flows it needs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"all by default: {', '.join(SECTIONS)}")
    parser.add_argument("--train", nargs="*", metavar="DATA", help="train the flows of these data, or all, and stop")
    parser.add_argument("--quick", action="store_true", help="barely trained flows, nothing written")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    options = parser.parse_args()
    names = options.sections or list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"expected sections among {list(SECTIONS)}, got {sorted(unknown)}")
    torch.set_num_threads(1)
    start = time.perf_counter()
    keys = flows_of(names, options.quick)
    if options.quick:
        for name in names:
            lines, seconds = section((name, True))
            print("\n".join(lines), f"\n({name}: {seconds:.0f} s)\n", flush=True)
    else:
        fresh = not any(map(is_cached, keys))
        for key, seconds in share_out(
            trained, [k for k in keys if not options.train or k.data in options.train], options.jobs
        ):
            print(f"{key.data}, {key.schedule}, seed {key.seed}: trained in {seconds:.0f} s", flush=True)
        if options.train is None:
            write(names, options.jobs)
            whole = fresh and len(names) == len(SECTIONS)
            took = time.perf_counter() - start
            write_section(RESULTS, "cost", list(cost(took if whole else None, options.jobs)))
    print(f"all: {time.perf_counter() - start:.0f} s")


def write(names: Sequence[str], jobs: int) -> None:
    """Run sections, print them, and replace them in the results file."""
    if not RESULTS.exists():
        RESULTS.write_text("\n".join([HEADER, *(f"<!-- {name} -->\n\n<!-- end -->\n" for name in [*SECTIONS, "cost"])]))
    for (name, _), (lines, seconds) in share_out(section, [(name, False) for name in names], jobs):
        lines = [*lines, "", f"{TOOK}{seconds:.0f}."]
        print("\n".join(lines), "\n", flush=True)
        write_section(RESULTS, name, lines)


def cost(took: float | None, jobs: int) -> Iterator[str]:
    """Processor time of all flows and of the sections in the results file; and the seconds that all of it took at once.

    Args:
        took: seconds of a run that trained every flow and made every section, or None for less.
        jobs: its processes.
    """
    keys = flows_of(SECTIONS, False)
    flows = [trained(key) for key in keys if is_cached(key)]
    found = read_sections(RESULTS)
    own = {name: int(text.rpartition(TOOK)[2].rstrip(".")) for name, text in found.items() if TOOK in text}
    yield "## What it took\n"
    yield (
        f"{machine('scikit-learn')} Processor minutes: {sum(flows) / 60:.1f} for the training of {len(flows)} of "
        f"{len(keys)} flows, {sum(own.values()) / 60:.1f} for {len(own)} of {len(SECTIONS)} sections."
    )
    if took is not None:
        yield f"\nAll of it in one run of {jobs} processes, nothing cached: {took / 60:.1f} minutes by the clock."


def flows_of(names: Iterable[str], quick: bool) -> list[Key]:
    """Every flow that sections need, once, in a fixed order."""
    return list(dict.fromkeys(key for name in names for key in SECTIONS[name][1](quick)))


def trained(key: Key) -> float:
    """Train a flow that is not in the cache; the processor seconds that its training took."""
    return float(flow_of(key, False).report["processor_seconds"])


def section(which: tuple[str, bool]) -> tuple[list[str], float]:
    """The lines of a section, by its name and whether it is a quick run; and processor seconds."""
    name, quick = which
    start = time.process_time()
    lines = list(SECTIONS[name][0](quick))
    return lines, time.process_time() - start


def share_out(function: Callable, items: Sequence, jobs: int) -> Iterator[tuple]:
    """Items with their results, as they come from several processes of one thread each."""
    if jobs == 1 or len(items) < 2:
        for item in items:
            yield item, function(item)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(function, item): item for item in items}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


if __name__ == "__main__":
    main()
