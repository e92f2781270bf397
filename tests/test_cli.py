import pytest

from ifpyro.cli import main


def test_version_and_help(capsys):
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as stop:
            main([flag])
        assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inflate"])
    assert stop.value.code == 2
    assert "inflate" in capsys.readouterr().err


def test_demo_writes_what_it_promises(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--max-steps", "60", "--particles", "64", "--quiet"]) == 0
    for name in ("prior.png", "posterior.png", "summary.csv", "posterior.nc", "prior.safetensors"):
        assert (out / name).stat().st_size > 0, name
    assert "R-hat" in capsys.readouterr().out
