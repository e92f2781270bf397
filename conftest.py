"""What the examples of docstrings and of the pages may use without making it.

The modules ``ifpyro``, ``torch``, ``pyro``, ``pyro.distributions as dist`` and ``numpy as np``, and ``flow``, the exact
flow of two round clusters in the plane. `docs/reference/index.md` tells the reader.
"""

from collections.abc import Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ifpyro


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest) -> Iterator[None]:
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    flow = ifpyro.InflationaryFlow.from_gaussian_mixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.1 * torch.eye(2).expand(2, 2, 2)
    )
    modules = {"ifpyro": ifpyro, "torch": torch, "np": np, "pyro": pyro, "dist": dist}
    request.getfixturevalue("doctest_namespace").update(modules, flow=flow)
    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))  # for files that they write
    state = torch.random.get_rng_state()
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    torch.set_num_threads(1)
    yield
    torch.random.set_rng_state(state)
