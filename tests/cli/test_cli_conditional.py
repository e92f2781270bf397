"""Conditional flows from the command line."""

import numpy as np
import pytest

from conditional_zoo import pairs
from ifpyro.cli.main import main


@pytest.fixture
def files(tmp_path):
    x, c = pairs(400)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "c.npy", c.numpy())
    np.save(tmp_path / "c0.npy", c[0].numpy())
    np.save(tmp_path / "some.npy", c[:3].numpy())
    return tmp_path


def test_fit_sample_check(files, capsys):
    flow = str(files / "flow.safetensors")
    fit = [
        "fit",
        str(files / "x.npy"),
        "--condition",
        str(files / "c.npy"),
        "--out",
        flow,
        "--max-steps",
        "2",
        "--quiet",
    ]
    assert main(fit) == 0
    out = str(files / "draws.npy")
    sample = ["sample", flow, "--out", out, "-n", "7", "--quiet"]
    assert main([*sample, "--given", str(files / "c0.npy")]) == 0
    assert np.load(out).shape == (7, 2)
    assert main([*sample, "--given", str(files / "some.npy")]) == 0
    assert np.load(out).shape == (7, 3, 2)
    assert main(sample) == 2
    assert "--given expects" in capsys.readouterr().err
    code = main(["check", flow, str(files / "x.npy"), "--condition", str(files / "c.npy"), "--rows", "100", "--quiet"])
    assert code in (0, 1)
    assert main(["fit", str(files), "--condition", str(files / "c.npy"), "--out", flow]) == 2
    assert ".npy" in capsys.readouterr().err
