"""Names that files and ArviZ do not allow, and guides that see a part of the data only."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.autoname import scope
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from ifpyro import to_arviz


def scoped(y):
    with scope(prefix="part"):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    chain = pyro.sample("chain", dist.Normal(0.0, 1.0))
    draw = pyro.sample("draw", dist.Normal(0.0, 1.0))
    with scope(prefix="part"), pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(x + chain + draw, 1.0), obs=y)


def test_names_that_files_do_not_allow_are_changed(tmp_path):
    draws = {name: torch.randn(2, 5) for name in ("part/x", "chain", "draw")}
    data = to_arviz(draws, model=scoped, args=(torch.zeros(3),), dims={"part/y": ["row"]}, progress=False)
    assert {"part.x", "chain_", "draw_"} <= set(data["posterior"].data_vars)
    assert data["posterior"]["part.x"].dims == ("chain", "draw")
    assert "part.y" in data["log_likelihood"].data_vars
    data.to_netcdf(str(tmp_path / "posterior.nc"))


def local(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y), subsample_size=3) as rows:
        x = pyro.sample("x", dist.Normal(loc, 10.0))
        pyro.sample("y", dist.Normal(x, 0.1), obs=y[rows])


def test_a_guide_that_sees_a_part_of_its_rows_does_not_mix_them_up():
    """Its draws would be those of other rows in every run: means 17, 17, 16, 17 for 0, 3, ..., 33."""
    y = 3.0 * torch.arange(12.0)
    guide = AutoNormal(local)
    svi = SVI(local, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(y)
    with pytest.raises(ValueError, match=r"plates \['rows'\] of the guide show another part .* draws of \['x'\]"):
        to_arviz(svi, args=(y,), num_samples=4, progress=False)
    pyro.clear_param_store()
