"""The command line: argument parsing only."""

import argparse
from collections.abc import Sequence

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``ifpyro``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ifpyro", description="Inflationary flows as Pyro priors.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="train on scanned digits, restore a half-hidden one, write pictures",
        description="Train a flow on the digits of scikit-learn, hide the lower half of a held-out one, and infer the "
        "posterior over the whole image. Writes PNGs, an ArviZ summary and the flow.",
    )
    demo.add_argument("--out", default="demo", help="folder to write to (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    demo.add_argument("--max-steps", type=int, default=None, help="fewer training steps, for a quick look")
    demo.add_argument("--particles", type=int, default=1024, help="SMC particles (default: %(default)s)")
    demo.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads of torch; these networks are small, and more threads gain little on an idle machine and lose "
        "much on a busy one (default: %(default)s)",
    )
    demo.add_argument("--quiet", action="store_true", help="no progress bars")

    options = parser.parse_args(arguments)
    import torch  # heavy imports only once the arguments are known to be right

    from .demo import run_demo

    torch.set_num_threads(options.threads)
    run_demo(
        options.out,
        seed=options.seed,
        max_steps=options.max_steps,
        particles=options.particles,
        progress=not options.quiet,
    )
    return 0
