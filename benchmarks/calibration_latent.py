"""Latent coverage (the paper's appendix C.2): do balls of the latent survive the journey to data space and back?

    python benchmarks/calibration_latent.py [--quick]

Balls ``|z|^2 <= r_p^2`` hold probability p of N(0, I). Points, Gaussian and evenly spread in each ball, are
decoded, encoded again, and counted; the mismatch is the largest change of a share over balls of 10 to 99%. Another
question: do the balls hold their share of held-out data? Flows are those of ``paper_flows.py``, trained with fixed
seeds if they are not in ``benchmarks/.cache``; the table goes to ``benchmarks/calibration.md``.
"""

import argparse

import torch

from calibration_common import write
from ifpyro.calibration import latent_coverage
from paper_flows import Key, data, flow_of

HELD_OUT, POINTS = 10_000, 5_000
ABOVE = [
    "### Balls in the latent (the paper's appendix C.2)",
    "",
    f"{POINTS:,} Gaussian points, and as many even ones in each ball of 10 to 99%; {HELD_OUT:,} held-out rows. "
    "Mismatch: largest change of a share of the points on the journey to data space and back, percentage points. "
    "Moved: root mean square of what the journey adds to a latent coordinate. Data off by: largest difference "
    "between a ball's share of held-out data and its level, percentage points; p: of latent lengths of the data "
    "having their chi distribution, by the exact simultaneous band at a hundred points. Seed 0; training seed 0.",
    "",
    "| set | flow | mismatch | moved | data off by | p |",
    "|---|---|---|---|---|---|",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="barely trained flows, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = list(ABOVE)
    print("\n".join(lines), flush=True)
    for name in ("circles", "S-curve"):
        x = data(name).held_out[:HELD_OUT]
        for kind in ("preserving", "reducing"):
            flow = flow_of(Key(name, kind), options.quick)
            found = latent_coverage(flow.encode, flow.decode, x, num=POINTS, seed=0)
            lines.append(
                f"| {name} | {kind} | {100 * found.mismatch:.3f} | {found.displacement:.0e} "
                f"| {100 * found.data_mismatch:.2f} | {found.data_p_value:.2g} |"
            )
            print(lines[-1], flush=True)
    if not options.quick:
        write("latent", lines)


if __name__ == "__main__":
    main()
