"""The paper, reproduced: toy sets, what a latent means, diagnostics. One command for all tables, in one run.

    python benchmarks/paper.py [--only SECTION ...] [--quick] [--jobs 2]

"The paper" is de Albuquerque & Pearson, NeurIPS 2024, arXiv 2407.08843. Flows are trained once, with fixed seeds and
numbers of steps, by ``--jobs`` processes of one thread each, and kept in ``benchmarks/.cache``. Tables are printed, and
replace those of the same sections in ``benchmarks/paper.md``; ``--quick`` trains next to nothing and writes nothing.
"""

import argparse
import time
from pathlib import Path

import torch

import paper_diagnostics
import paper_latents
import paper_toy
from results import write_section

RESULTS = Path(__file__).parent / "paper.md"
SECTIONS = {**paper_toy.SECTIONS, **paper_latents.SECTIONS, **paper_diagnostics.SECTIONS}
HEADER = "# The paper, reproduced\n\nWritten by `python benchmarks/paper.py`; seeds are in the scripts.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="barely trained flows, nothing written")
    parser.add_argument("--jobs", type=int, default=2, help="processes that train (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    if any(name in paper_toy.SECTIONS for name in options.only):
        paper_toy.train_all(options.quick, options.jobs)
    found = {}
    for name in options.only:
        began = time.perf_counter()
        found[name] = SECTIONS[name](options.quick)
        print(f"({name}: {time.perf_counter() - began:.0f} s)\n", flush=True)
    print(f"all: {time.perf_counter() - start:.0f} s")
    if not options.quick:
        if not RESULTS.exists():
            RESULTS.write_text(HEADER)
        for name, lines in found.items():
            write_section(RESULTS, name, lines)


if __name__ == "__main__":
    main()
