import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import ifpyro
from flows_zoo import mixture_flow
from ifpyro.cli import commands as jobs
from ifpyro.cli.commands import parse_schedule
from ifpyro.cli.main import main
from ifpyro.core.pool import Pool
from ifpyro.data.files import ImageFolder, load_rows, open_data
from ifpyro.flow.axes.schedule import Schedule

FIT = ["--network", "width=16,blocks=1", "--max-steps", "30", "--quiet"]
MINUTES = 300  # a process on a busy machine may take long to start


@pytest.fixture(scope="module")
def x():
    return mixture_flow(2, torch.float32).sample(900, seed=0).numpy()


@pytest.fixture(scope="module")
def home(x, tmp_path_factory):
    """A folder with samples, held-out samples and a flow that was trained on the command line."""
    folder = tmp_path_factory.mktemp("cli")
    np.save(folder / "x.npy", x[:600])
    np.save(folder / "held_out.npy", x[600:])
    assert main(["fit", str(folder / "x.npy"), "--out", str(folder / "flow"), *FIT]) == 0
    return folder


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], *([command, "--help"] for command in ("fit", "sample", "check"))):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.count("examples:") == 4
    for command in ("fit", "sample", "check", "demo"):
        assert f"ifpyro {command}" in out


@pytest.mark.parametrize(
    "arguments", [["inflate"], ["fit", "x.npy"], ["fit", "x.npy", "--out", "f", "--max-steps", "-1"], []]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: ifpyro" in capsys.readouterr().err


def test_fit_is_the_library_and_leaves_no_checkpoint(x, home):
    flow = ifpyro.load(home / "flow")
    same = ifpyro.fit(x[:600], seed=0, network={"width": 16, "blocks": 1}, max_steps=30, progress=False)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    assert not (home / "flow.checkpoint").exists()


def test_fit_options(x, tmp_path, capsys):
    y = 1 / (1 + np.exp(-x))
    np.savez(tmp_path / "y.npz", y=y, other=x)
    out = tmp_path / "flow"
    arguments = ["fit", str(tmp_path / "y.npz"), "--key", "y", "--out", str(out), "--schedule", "reducing:1:0.5"]
    arguments += ["--network", "width=16,blocks=1,dropout=1e-1", "--max-steps", "30"]
    arguments += ["--support", "unit,positive", "--seed", "5", "--validation", "0.2", "--tolerance", "0.01"]
    assert main(arguments) == 0
    flow = ifpyro.load(out)
    assert flow.velocity.dropout_rate == 0.1
    assert flow.schedule == Schedule.reducing(1, 0.5)
    assert flow.log_prob([[0.5, 2.0], [1.5, 2.0], [0.5, -1.0]]).isfinite().tolist() == [True, False, False]
    report = flow.report["training"]
    assert (report["seed"], report["validation_rows"], report["steps"]) == (5, 180, 30)
    assert re.search(r"720 rows of shape \(2,\), 30 steps in \d+ s \(max_steps\)", capsys.readouterr().out)


def test_schedules_by_name():
    assert parse_schedule("details_first") == Schedule.details_first()
    assert parse_schedule("details_first:2") == Schedule.details_first(2.0)
    assert parse_schedule("reducing:3") == Schedule.reducing(3)


def test_sample_is_seeded(home, tmp_path):
    for name, seed in (("a.npy", "1"), ("b.npz", "1"), ("c.npy", "2")):
        out = str(tmp_path / name)
        assert main(["sample", str(home / "flow"), "--out", out, "-n", "50", "--seed", seed, "--quiet"]) == 0
    a, c = np.load(tmp_path / "a.npy"), np.load(tmp_path / "c.npy")
    assert a.shape == (50, 2)
    assert (a == np.load(tmp_path / "b.npz")["x"]).all()
    assert (a != c).any()


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (3.0, 1)])
def test_check_says_and_keeps_what_it_found(tmp_path, capsys, shift, code):
    """A flow of a Gaussian, trained for a step, is right for Gaussian data and wrong for shifted ones."""
    rng = np.random.default_rng(0)
    ifpyro.fit(rng.normal(size=(4000, 2)), max_steps=1, seed=0, progress=False).save(tmp_path / "flow")
    np.save(tmp_path / "y.npy", rng.normal(size=(150, 2)) + shift)
    outputs = ["--json", str(tmp_path / "check.json"), "--picture", str(tmp_path / "check.png"), "--store"]
    options = outputs if shift else ["--quiet"]
    assert main(["check", str(tmp_path / "flow"), str(tmp_path / "y.npy"), *options]) == code
    printed = capsys.readouterr().out
    if not shift:
        assert re.match(r"(pass|warn): \d+ pass", printed)
        assert printed.count("\n") == 1
        return
    found = json.loads((tmp_path / "check.json").read_text())
    assert any(row["verdict"] == "fail" for row in found["rows"])
    assert all(row["name"] in printed for row in found["rows"])
    assert (tmp_path / "check.png").stat().st_size > 10_000
    assert ifpyro.load(tmp_path / "flow").report["check"]["rows"] == found["rows"]


WRONG = {
    "no file": (["fit", "nowhere.npy", "--out", "{d}/f"], "expected data at nowhere.npy, found nothing there"),
    "no folder": (["fit", "{d}/x.npy", "--out", "{d}/no/f"], "there is no folder"),
    "foreign file": (["fit", "{d}/x.txt", "--out", "{d}/f"], "a folder of images, got"),
    "broken npy": (["fit", "{d}/broken.npy", "--out", "{d}/f"], "cannot be read as a NumPy file"),
    "pickled npy": (["fit", "{d}/objects.npy", "--out", "{d}/f"], "cannot be read as a NumPy file"),
    "NaN": (["fit", "{d}/nan.npy", "--out", "{d}/f"], r"rows \[7\]; drop or impute"),
    "which array": (["fit", "{d}/two.npz", "--out", "{d}/f"], r"\(--key\), found several: a, b"),
    "schedule": (["fit", "{d}/x.npy", "--out", "{d}/f", "--schedule", "sideways"], "preserving, details_first, reduc"),
    "schedule's numbers": (["fit", "{d}/x.npy", "--out", "{d}/f", "--schedule", "reducing"], "reducing:KEEP"),
    "no images": (["fit", "{d}/empty", "--out", "{d}/f"], "expected a folder with images"),
    "no flow": (["sample", "{d}/x.npy", "--out", "{d}/y.npy"], "cannot be read as safetensors"),
    "wrong ending": (["sample", "{flow}", "--out", "{d}/y.txt"], r"ends in .npy or .npz"),
    "wrong shape": (["check", "{flow}", "{d}/wide.npy"], r"shape \(N, 2\), as the flow was trained on"),
    "few rows": (["check", "{flow}", "{d}/few.npy"], "at least 32 rows of held_out, got 20"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_exits_with_2_and_one_line(x, home, tmp_path, capsys, case):
    arguments, message = WRONG[case]
    for name, data in {"x": x, "wide": np.zeros((50, 3)), "few": x[:20]}.items():
        np.save(tmp_path / f"{name}.npy", data)
    spoilt = x.copy()
    spoilt[7, 0] = np.nan
    np.save(tmp_path / "nan.npy", spoilt)
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=x, b=x)
    (tmp_path / "x.txt").write_text("1 2")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "empty").mkdir()
    arguments = [text.format(d=tmp_path, flow=home / "flow") for text in arguments]
    assert main([*arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_second_ctrl_c_ends_everything_at_once():
    before, pool = signal.getsignal(signal.SIGINT), Pool()
    with jobs.graceful(pool):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # launchers repeat themselves
            signal.raise_signal(number)
            assert pool.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_fit_writes_the_best_flow_and_resumes(home, tmp_path):
    """The real thing: a process, a signal, and the same command again; the result is that of one run."""
    out, arguments = tmp_path / "flow", ["fit", home / "x.npy", "--network", "width=16,blocks=1", "--out"]
    command = [sys.executable, "-m", "ifpyro", *arguments, out, "--max-steps", "4000"]
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(list(map(str, command)), stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + MINUTES
    while not re.search(rb"fit: .*\| [1-9]\d*/4000", (tmp_path / "err").read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(MINUTES) == 130
    assert b"--resume" in (tmp_path / "err").read_bytes()
    stopped = ifpyro.load(out).report["training"]
    assert stopped["stopped"] == "interrupted"
    assert 0 < stopped["steps"] < 4000
    assert (tmp_path / "flow.checkpoint").exists()
    again = ["--max-steps", str(stopped["steps"] + 10), "--quiet"]
    assert main([*map(str, arguments), str(out), *again]) == 2  # without --resume nothing is thrown away
    assert main([*map(str, arguments), str(out), *again, "--resume"]) == 0
    resumed = ifpyro.load(out).report["training"]
    assert resumed["steps"] == stopped["steps"] + 10
    assert resumed["history"][: len(stopped["history"]) - 1] == stopped["history"][:-1]
    assert not (tmp_path / "flow.checkpoint").exists()


def test_image_folder(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    for i, values in enumerate(pixels):
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    Image.fromarray(pixels[0].repeat(2, 0).repeat(2, 1)).save(tmp_path / "twice.png")
    (tmp_path / "notes.txt").write_text("no image")
    folder = open_data(tmp_path)
    assert isinstance(folder, ImageFolder)
    assert len(folder) == 4
    assert folder[1].shape == (3, 6, 5)
    assert torch.equal(folder[1], open_data(tmp_path)[1])  # its noise is the same at every reading
    assert ((256 * folder[1]).floor() == torch.as_tensor(pixels[1]).permute(2, 0, 1)).all()
    assert folder[3].shape == (3, 6, 5)
    assert open_data(tmp_path, size=(4, 4), grey=True)[0].shape == (1, 4, 4)
    assert load_rows(folder, 2, 0).shape == (2, 3, 6, 5)


def test_zarr(x, home, tmp_path, monkeypatch):
    """In memory while small, else in chunks; trained on as from memory up to the choice of held-out rows."""
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w")
    for name in ("x", "y"):
        stored = group.create_array(name, shape=x.shape, chunks=(100, 2), dtype="float32")
        stored[...] = x
    assert (open_data(tmp_path / "x.zarr", key="x") == x).all()
    monkeypatch.setattr("ifpyro.data.files.IN_MEMORY", 100)
    assert (np.sort(load_rows(open_data(tmp_path / "x.zarr", key="x"), 10**6, 0), 0) == np.sort(x, 0)).all()
    assert main(["fit", str(tmp_path / "x.zarr"), "--key", "x", "--out", str(tmp_path / "flow"), *FIT]) == 0
    report = ifpyro.load(tmp_path / "flow").report["training"]
    assert report["rows"] + report["validation_rows"] == 900


def test_demo_writes_what_it_promises(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--max-steps", "60", "--particles", "64", "--quiet"]) == 0
    for name in ("prior.png", "posterior.png", "summary.csv", "posterior.nc", "prior.safetensors"):
        assert (out / name).stat().st_size > 0, name
    assert "R-hat" in capsys.readouterr().out
