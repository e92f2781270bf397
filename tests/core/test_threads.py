"""What belongs to a whole process is given back, and threads get what they get alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch

import ifpyro
from flows_zoo import mixture_flow
from ifpyro.core.precision import full_precision
from ifpyro.core.randomness import seeded
from ifpyro.training import Recipe


@pytest.fixture(params=[True, False])
def users(request):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


def test_blocks_of_two_threads_that_overlap_give_the_setting_back(users):
    """The second begins before the first ends, and ends after it."""
    began, ended, seen = threading.Event(), threading.Event(), []

    def second():
        with full_precision():
            began.set()
            ended.wait(10)
            seen.append(torch.backends.cudnn.allow_tf32)

    with full_precision():
        thread = threading.Thread(target=second)
        thread.start()
        assert began.wait(10)
        assert torch.backends.cudnn.allow_tf32 is False
    seen.append(torch.backends.cudnn.allow_tf32)  # still full: the other needs it
    ended.set()
    thread.join(10)
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32 is users


def test_an_error_gives_the_setting_back(users):
    with pytest.raises(ZeroDivisionError), full_precision(), full_precision():
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 is users


def model(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def test_samplers_in_threads_find_what_they_find_alone():
    data = [torch.tensor([0.1 * k, 1.0]) for k in range(3)]

    def run(y):
        return ifpyro.SMC(model, 16, max_moves=4, seed=1, progress=False).run(y).get_samples()

    alone = [run(y) for y in data]
    with pyro.validation_enabled(True):
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(run, data))
        assert torch.distributions.Distribution._validate_args
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_trainings_in_threads_find_what_they_find_alone():
    rows = mixture_flow(2, torch.float32).sample(300, seed=0)
    options = {"recipe": Recipe(20, 32, 1, check_every=10), "network": {"width": 8, "blocks": 1}, "progress": False}

    def run(seed):
        return ifpyro.fit(rows, seed=seed, **options).state_dict()

    alone, state = [run(seed) for seed in (1, 2)], torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, (1, 2)))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_thread_may_borrow_the_random_state_twice():
    state = torch.get_rng_state()
    with seeded(1), seeded(2):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)
