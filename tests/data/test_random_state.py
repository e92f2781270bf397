"""Reading data leaves torch's random state alone."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ifpyro.data.sources import open_source

ROWS = torch.arange(40.0).reshape(20, 2)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_loaders_that_shuffle_do_not_move_the_global_stream(batch_size):
    source = open_source(DataLoader(TensorDataset(ROWS), batch_size=batch_size, shuffle=True), 0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    passes = [torch.cat([rows for _, rows in source.one_pass(number)]) for number in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(passes[0], passes[2])  # a pass can be repeated
    assert not torch.equal(passes[0], passes[1])  # and another is another
    assert all(torch.equal(rows.sort(0).values, ROWS) for rows in passes)
