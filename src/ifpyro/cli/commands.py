"""What the commands of ``ifpyro`` do, once their arguments are parsed. Each returns its exit code."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..checks.checking import check
from ..core.figures import check_picture, save_figure
from ..core.files import check_writable, write_atomically
from ..core.pool import Pool
from ..data.files import load_rows, open_data
from ..flow.axes.schedule import Schedule
from ..flow.conditional import ConditionalFlow
from ..flow.file import load_flow
from ..training import fit

OK, FAILED, INTERRUPTED = 0, 1, 130

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "preserving": Schedule.preserving,
    "details_first": Schedule.details_first,
    "reducing": Schedule.reducing,
}

SAMPLE_BATCH = 4096
"""Draws decoded at a time."""

CHECK_ROWS = 100_000
"""Most training rows that ``ifpyro check --train`` loads."""


def parse_schedule(text: str) -> Schedule:
    """``name`` or ``name:number:number``, such as ``details_first:2`` or ``reducing:8:0.5``.

    Raises:
        ValueError: if there is no such schedule, or it takes other numbers.
    """
    name, *numbers = text.split(":")
    if name not in SCHEDULES:
        raise ValueError(f"--schedule expects {', '.join(SCHEDULES)}, with numbers after colons, got {text!r}")
    try:
        values: list[Any] = [float(number) for number in numbers]
        if name == "reducing" and values and values[0].is_integer():
            values[0] = int(values[0])
        return SCHEDULES[name](*values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--schedule expects preserving, details_first[:POWER] or reducing:KEEP[:GAP], got {text!r} ({error})"
        ) from error


def read_array(path: str, key: str | None = None) -> np.ndarray:
    """An array of a ``.npy`` or ``.npz`` file, in memory, as pairs need it.

    Raises:
        ValueError: if the file is of another kind, or an archive of several arrays without a key.
    """
    if Path(path).suffix not in (".npy", ".npz"):
        raise ValueError(f"samples and conditions in pairs are read from .npy and .npz files, got {path}")
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    if key is None and len(found.files) > 1:
        raise ValueError(f"{path} holds several arrays, {found.files}; choose one with --key")
    return np.asarray(found[key or found.files[0]])


def run_fit(options: Any) -> int:
    """``ifpyro fit``: one process, or one of several under ``torchrun`` or ``accelerate launch``."""
    out = check_writable(options.out)
    checkpoint = Path(options.checkpoint or f"{out}.checkpoint")
    check_writable(checkpoint)
    if checkpoint.absolute() == out.absolute():
        raise ValueError(f"expected --checkpoint and --out to be two files, got {out} for both")
    schedule: Schedule | None = parse_schedule(options.schedule)
    pool = Pool.join()
    try:
        if checkpoint.exists() and not options.resume:
            raise ValueError(
                f"there is a checkpoint of an unfinished training in {checkpoint}; add --resume to go on with it, or "
                "remove it"
            )
        device = options.device or (str(pool.device) if pool.size > 1 else None)
        condition: Any = None
        if options.condition is None:
            data = open_data(options.data, key=options.key, size=options.size, grey=options.grey, seed=options.seed)
        else:
            data, condition = read_array(options.data, options.key), read_array(options.condition)
            if options.schedule == "details_first":  # by default; a conditional flow finds its noise floor then
                schedule = None
        validation: Any = options.validation
        try:
            validation = float(validation)
        except ValueError:
            given = open_data(validation, key=options.key, size=options.size, grey=options.grey, seed=options.seed + 1)
            validation = load_rows(given, CHECK_ROWS, options.seed)
        with graceful(pool):
            flow = fit(
                data,
                condition=condition,
                labels=True if options.labels else None,
                schedule=schedule,
                network=options.network,
                validation=validation,
                max_steps=options.max_steps,
                max_seconds=options.max_seconds,
                support=options.support,
                seed=options.seed,
                device=device,
                progress=not options.quiet,
                tolerance=options.tolerance,
                checkpoint=checkpoint,
                pool=pool,
                basis=options.basis,
            )
        interrupted = flow.report["training"]["stopped"] == "interrupted"
        if pool.rank == 0:
            flow.save(out)
            if not interrupted and options.checkpoint is None:
                checkpoint.unlink(missing_ok=True)
            if not options.quiet:
                print(_told(flow, out))
            if interrupted:
                print(f"interrupted: go on with the same command and --resume ({checkpoint})", file=sys.stderr)
        return INTERRUPTED if interrupted else OK
    finally:
        pool.leave()


def run_sample(options: Any) -> int:
    """``ifpyro sample``."""
    out = check_writable(options.out)
    if out.suffix not in (".npy", ".npz"):
        raise ValueError(f"--out expects a file that ends in .npy or .npz, got {out}")
    flow = load_flow(options.flow, device=options.device)
    if isinstance(flow, ConditionalFlow) != (options.given is not None):
        raise ValueError("--given expects the condition of a conditional flow, and such a flow needs one")
    if options.given is not None:
        flow = flow.given(read_array(options.given))
    generator = torch.Generator(device=flow.device).manual_seed(options.seed)
    parts = []
    with tqdm(total=options.num, disable=options.quiet, desc="sample", unit="row") as bar, torch.no_grad():
        for start in range(0, options.num, SAMPLE_BATCH):
            rows = min(SAMPLE_BATCH, options.num - start)
            z = torch.randn(
                rows, *flow.batch_shape, flow.latent_dim, generator=generator, dtype=flow.dtype, device=flow.device
            )
            parts.append(flow.decode(z).cpu().numpy())
            bar.update(rows)
    draws = np.concatenate(parts)
    write_atomically(out, lambda file: np.save(file, draws) if out.suffix == ".npy" else np.savez(file, x=draws))
    if not options.quiet:
        print(f"{out}: {len(draws)} draws of shape {tuple(flow.event_shape)}")
    return OK


def run_check(options: Any) -> int:
    """``ifpyro check``: prints the table; fails if a row of it does."""
    for path in (options.json, options.flow if options.store else None):
        if path is not None:
            check_writable(path)
    if options.picture is not None:
        check_picture(options.picture)
    flow = load_flow(options.flow, device=options.device)
    size = options.size or (flow.event_shape[1:] if len(flow.event_shape) == 3 else None)
    grey = len(flow.event_shape) == 3 and flow.event_shape[0] == 1

    def read(path: str, rows: int) -> Any:
        return load_rows(open_data(path, key=options.key, size=size, grey=grey, seed=options.seed), rows, options.seed)

    train = None if options.train is None else read(options.train, CHECK_ROWS)
    condition = None if options.condition is None else read_array(options.condition)
    held_out = read(options.held_out, options.rows) if condition is None else read_array(options.held_out, options.key)
    result = check(
        flow,
        held_out,
        condition=condition,
        train=train,
        rows=options.rows,
        level=options.level,
        seed=options.seed,
        store=options.store,
    )
    if options.json is not None:
        write_atomically(options.json, lambda file: file.write((result.to_json() + "\n").encode()))
    if options.picture is not None:
        save_figure(result.plot(), options.picture)
    if options.store:
        flow.save(options.flow)
    print(str(result).splitlines()[-1] if options.quiet else result)
    return OK if result.passed else FAILED


def run_demo(options: Any) -> int:
    """``ifpyro demo``."""
    from .demo import run_demo as demo

    demo(
        options.out,
        seed=options.seed,
        max_steps=options.max_steps,
        particles=options.particles,
        progress=not options.quiet,
    )
    return OK


@contextmanager
def graceful(pool: Pool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a training after its current step; a second Ctrl-C ends everything at once."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)
        pool.interrupted = True
        if pool.rank == 0:
            print("\nstopping: the best flow so far and a checkpoint will be written", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(flow: Any, out: Path) -> str:
    report = flow.report["training"]
    return (
        f"{out}: {report['rows']} rows of shape {tuple(flow.event_shape)}, {report['steps']} steps in "
        f"{report['seconds']:.0f} s ({report['stopped']}), validation loss {report['validation_loss']:.4f} (Gaussian "
        f"{report['validation_loss_gaussian']:.4f}), {flow.report['numerics']['evaluations']} evaluations a decode"
    )
