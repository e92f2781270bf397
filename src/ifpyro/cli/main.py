"""The command line: argument parsing only."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ..core.version import __version__

SUPPORTS = ("real", "positive", "nonnegative", "unit", "unit_interval", "simplex", "circular")

_MAIN = """\
examples:
  ifpyro fit samples.npy --out prior.safetensors
  ifpyro check prior.safetensors held_out.npy
  ifpyro sample prior.safetensors --out draws.npy --num 10000
  ifpyro demo

exit codes: 0 all is well; 1 a check failed; 2 the arguments or the input are wrong (one line on stderr says what);
70 ifpyro itself failed (with a traceback); 130 interrupted, after writing what there was"""

_FIT = """\
DATA is one of
  x.npy            an array of shape (rows, ...); one larger than memory is read piece by piece
  x.npz            the same, in an archive (--key if it holds several)
  x.zarr           a zarr array or group (--key)
  photographs/     a folder of images: scaled, cut to --size, dequantised to (0, 1), channels first

examples:
  ifpyro fit table.npy --out table.safetensors
  ifpyro fit rates.npy --out rates.safetensors --support positive --schedule preserving
  ifpyro fit theta.npy --condition y.npy --out posterior.safetensors
  ifpyro fit photographs/ --out photographs.safetensors --size 16 16 --max-seconds 1800
  torchrun --nproc-per-node 4 -m ifpyro fit big.npy --out big.safetensors
  accelerate launch -m ifpyro fit big.npy --out big.safetensors

Ctrl-C or SIGTERM writes the best flow so far and a checkpoint; the same command with --resume goes on where it
stopped, and ends with what it would have found uninterrupted. Several processes find what one finds, sooner."""

_SAMPLE = """\
examples:
  ifpyro sample prior.safetensors --out draws.npy --num 10000 --seed 1
  ifpyro sample posterior.safetensors --given y0.npy --out draws.npy --num 1000"""

_CHECK = """\
HELD_OUT are data that training has not seen (a file or folder as for ifpyro fit). The table says of each question
what was measured, what would warn and what fails; the exit code is 1 if a row fails.

examples:
  ifpyro check prior.safetensors held_out.npy
  ifpyro check prior.safetensors held_out.npy --train samples.npy --json check.json --picture check.png"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``ifpyro``; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        import torch  # heavy imports only once the arguments are known to be right

        from . import commands as jobs

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        run = {"fit": jobs.run_fit, "sample": jobs.run_sample, "check": jobs.run_check, "demo": jobs.run_demo}
        return run[options.command](options)
    except KeyboardInterrupt:
        print("ifpyro: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if options.traceback:
            raise
        print(f"ifpyro {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"ifpyro {options.command}: there is not enough memory", file=sys.stderr)
        return 2
    except Exception:
        # Never 1, which means that a check failed.
        traceback.print_exc()
        print(f"ifpyro {options.command}: this is a fault of ifpyro; please report it", file=sys.stderr)
        return 70


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ifpyro",
        description="Inflationary flows as Pyro priors: train on samples, check, draw.",
        epilog=_MAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_fit(commands)
    _add_check(commands)
    _add_sample(commands)
    _add_demo(commands)
    return parser


def _add_fit(commands: Any) -> None:
    fit = _command(commands, "fit", "train a flow on samples", "Train an inflationary flow on samples.", _FIT)
    fit.add_argument("data", metavar="DATA", help="file or folder with the samples; see below")
    fit.add_argument("--out", required=True, metavar="FLOW", help="file to write the flow to")
    fit.add_argument(
        "--condition",
        default=None,
        metavar="FILE",
        help="what each sample is to depend on, .npy or .npz: makes the flow conditional; DATA is such a file then too",
    )
    fit.add_argument("--labels", action="store_true", help="the conditions are integers that name classes")
    fit.add_argument(
        "--schedule",
        default="details_first",
        metavar="NAME[:NUMBERS]",
        help="which axes turn into noise first: details_first[:POWER], preserving, or reducing:KEEP[:GAP] "
        "(default: %(default)s)",
    )
    fit.add_argument(
        "--basis",
        default="auto",
        choices=("auto", "pca", "separable", "low_rank", "identity"),
        help="the axes: all principal ones, those of an image's dimensions, the leading ones, or the columns "
        "themselves (default: by their number)",
    )
    fit.add_argument(
        "--support",
        default="real",
        type=_support,
        metavar="NAME[,NAME...]",
        help=f"what all samples obey, of all columns or of each: {', '.join(SUPPORTS)} (default: %(default)s)",
    )
    fit.add_argument(
        "--validation",
        default="0.1",
        metavar="FRACTION|DATA",
        help="fraction held out for early stopping, or a file with held-out rows (default: %(default)s)",
    )
    fit.add_argument(
        "--network", type=_network, default=None, metavar="NAME=NUMBER,...", help="such as width=256,blocks=3"
    )
    fit.add_argument("--max-steps", type=_count, default=None, metavar="N", help="most optimiser steps")
    fit.add_argument("--max-seconds", type=float, default=None, metavar="S", help="most seconds of training")
    fit.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="accepted error of the solver, in standard deviations of the data (default: %(default)s)",
    )
    fit.add_argument(
        "--checkpoint",
        default=None,
        metavar="FILE",
        help="written every half minute and when interrupted (default: FLOW.checkpoint, removed at the end)",
    )
    fit.add_argument("--resume", action="store_true", help="go on from the checkpoint if there is one")
    _add_reading(fit)
    _add_common(fit, threads=None)


def _add_check(commands: Any) -> None:
    check = _command(
        commands, "check", "whether a flow can be trusted", "Measure whether a flow can be trusted.", _CHECK
    )
    check.add_argument("flow", metavar="FLOW", help="file written by ifpyro fit")
    check.add_argument("held_out", metavar="HELD_OUT", help="file or folder with data that training has not seen")
    check.add_argument(
        "--condition", default=None, metavar="FILE", help="conditions of HELD_OUT, .npy, for a conditional flow"
    )
    check.add_argument("--train", default=None, metavar="DATA", help="the training data, for over-fitting")
    check.add_argument("--rows", type=_count, default=2000, metavar="N", help="most rows used (default: %(default)s)")
    check.add_argument(
        "--level",
        type=float,
        default=0.01,
        help="probability that a correct flow gets any tested row wrong (default: %(default)s)",
    )
    check.add_argument("--json", default=None, metavar="FILE", help="write the result as JSON")
    check.add_argument("--picture", default=None, metavar="FILE", help="write the picture, as PNG, PDF or SVG")
    check.add_argument("--store", action="store_true", help="keep the result in the flow's file")
    _add_reading(check)
    _add_common(check, threads=None)


def _add_sample(commands: Any) -> None:
    sample = _command(commands, "sample", "draw from a flow", "Draw from a flow.", _SAMPLE)
    sample.add_argument("flow", metavar="FLOW", help="file written by ifpyro fit")
    sample.add_argument("--out", required=True, metavar="FILE", help=".npy, or .npz (the array is called x)")
    sample.add_argument(
        "--given", default=None, metavar="FILE", help="condition of a conditional flow, .npy: one, or many in rows"
    )
    sample.add_argument("--num", "-n", type=_count, default=1000, metavar="N", help="draws (default: %(default)s)")
    _add_common(sample, threads=None)


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        "train on scanned digits, restore a half-hidden one, write pictures",
        "Train a flow on the digits of scikit-learn, hide the lower half of a held-out one, and infer the posterior "
        "over the whole image. Writes PNGs, an ArviZ summary and the flow.",
        None,
    )
    demo.add_argument("--out", default="demo", help="folder to write to (default: %(default)s)")
    demo.add_argument("--max-steps", type=_count, default=None, help="fewer training steps, for a quick look")
    demo.add_argument("--particles", type=_count, default=1024, help="SMC particles (default: %(default)s)")
    _add_common(demo, threads=1)


def _command(commands: Any, name: str, summary: str, description: str, epilog: str | None) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter,
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", default=None, help="which array of a .npz or zarr group")
    parser.add_argument(
        "--size", type=_count, nargs=2, default=None, metavar=("H", "W"), help="size to which images are brought"
    )
    parser.add_argument("--grey", action="store_true", help="read images with one channel")


def _add_common(parser: argparse.ArgumentParser, threads: int | None) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    if parser.prog.split()[-1] != "demo":
        parser.add_argument("--device", default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--threads",
        type=_count,
        default=threads,
        help="CPU threads of torch; small networks gain little from more than one, and lose much on a busy machine"
        + (" (default: %(default)s)" if threads else ""),
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars, and only what was asked for")
    parser.add_argument("--traceback", action="store_true", help="show where in the program an error came up")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_count.__name__ = "positive integer"


def _support(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(SUPPORTS):
        raise ValueError
    return names if len(names) > 1 else names[0]


_support.__name__ = f"support among {', '.join(SUPPORTS)}, or one a column, with commas"


def _network(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",")]
    return {name.strip(): _number(value) for name, _, value in pairs}


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


_network.__name__ = "list of name=number"
