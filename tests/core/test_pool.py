"""Two processes find what one finds. They talk over gloo on this machine, as under ``torchrun``."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ifpyro
import jobs_for_pools
from flows_zoo import mixture_flow
from ifpyro import Pool
from ifpyro.cli.main import main
from ifpyro.core.errors import PoolError
from ifpyro.core.pool import _backend, _Processes
from ifpyro.flow.solver.fidelity import Evaluations
from ifpyro.infer.engines.distributed import _code, _level

MINUTES = 300  # processes on a busy machine may take long to start


def environment(**more):
    here = Path(jobs_for_pools.__file__).parent
    path = os.pathsep.join([str(here), str(Path(ifpyro.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_two_processes(name, folder):
    """Exit codes and what was printed."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, jobs_for_pools.__file__, name, str(folder)],
            env=environment(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        printed = [process.communicate(timeout=MINUTES)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which two processes have worked."""
    folder = tmp_path_factory.mktemp("pool")
    codes, printed = in_two_processes("fail,train,infer", folder)
    assert codes == [0, 0], printed
    return folder


def test_training_in_two_processes_is_training_in_one(home, tmp_path):
    alone = jobs_for_pools.train(Pool(), tmp_path)
    for name, flow in alone.items():
        pooled = ifpyro.load(home / f"{name}2")
        report, other = flow.report["training"], pooled.report["training"]
        assert other["processes"] == 2
        if name == "timed":
            assert other["stopped"] == "max_seconds"
            continue
        losses, others = ([loss for _, loss in r["history"]] for r in (report, other))
        if name == "dropout":  # drawn by every process for itself: the same up to noise
            assert others == pytest.approx(losses, rel=0.02)
            continue
        assert others == pytest.approx(losses, rel=1e-4)
        for key, value in flow.state_dict().items():
            torch.testing.assert_close(pooled.state_dict()[key], value, rtol=1e-3, atol=1e-4)
    resumed, whole = ifpyro.load(home / "resumed2"), ifpyro.load(home / "memory2")
    assert resumed.report["training"]["steps"] == whole.report["training"]["steps"] == 30


def test_inference_in_two_processes_is_inference_in_one(home, tmp_path):
    model = jobs_for_pools.flow_model()
    for name, alone in jobs_for_pools.infer(Pool(), tmp_path).items():
        empty = ifpyro.SMC(model, 64) if name == "smc" else ifpyro.MCMC(alone.kernel, 1)
        pooled = empty.restore(home / f"{name}2", jobs_for_pools.Y)
        torch.testing.assert_close(pooled.positions(), alone.positions(), rtol=0, atol=1e-2)
        assert pooled.attributes.keys() == alone.attributes.keys()
        assert pooled.get_samples()["x"].shape == alone.get_samples()["x"].shape
        data = ifpyro.to_arviz(pooled, progress=False)
        assert data.posterior["x"].shape == (*alone.positions().shape[:2], 2)
        if name == "hmc":
            assert pooled.attributes["step_size"] == pytest.approx(alone.attributes["step_size"], rel=1e-2)


def test_a_model_that_fails_in_another_process_fails_here(home):
    """The job went on after that."""
    assert "process 1: ArithmeticError: too cold" in (home / "error0").read_text()
    assert "the first process failed" in (home / "error1").read_text()


def test_a_process_that_dies_ends_the_run_and_leaves_the_draws(tmp_path):
    codes, printed = in_two_processes("die", tmp_path)
    assert codes[1] == 3
    assert codes[0] != 0
    assert re.search(r"another process failed in sampling.*process 0 of 2 lost touch", printed[0])
    model = jobs_for_pools.breaking_model(Pool(), 100, None)  # breaks in a second process alone
    kept = ifpyro.MCMC(ifpyro.HMC(model), 1).restore(tmp_path / "draws", jobs_for_pools.Y)
    chains, draws, dim = kept.positions().shape
    assert (chains, dim) == (6, 2)
    assert draws >= 10


def test_tensors_travel_where_a_backend_meets_them(monkeypatch):
    """Told by the names of backends: there may be no GPU here."""
    pool = _Processes.__new__(_Processes)
    pool.device = torch.device("meta")  # stands for a GPU
    x = torch.arange(6.0).reshape(2, 3).T
    for backend, place in (("cpu:gloo,cuda:nccl", "cpu"), ("gloo", "cpu"), ("nccl", "meta")):
        monkeypatch.setattr("ifpyro.core.pool.dist.get_backend_config", lambda backend=backend: backend)
        carried = pool._carried(x)
        assert carried.device.type == place
        assert carried.is_contiguous()
        assert carried.data_ptr() != x.data_ptr()


def test_backends_that_torch_does_not_know():
    for wrong in ("glo", "cpu:gloo,cuda:ncl", ""):
        with pytest.raises(ValueError, match=r"backend expects names among .*gloo.*, got"):
            Pool.join(backend=wrong)
    assert Pool.join(backend="cpu:gloo,cuda:nccl").size == 1


def test_processes_that_share_a_gpu_meet_on_the_processor(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for gpus, here, expected in ((0, None, None), (4, None, None), (1, None, "gloo"), (2, "2", None), (2, "3", "gloo")):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        if here is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert _backend() == expected


def test_fit_under_torchrun_is_fit(tmp_path):
    """The same command, launched twice: one file, the same flow; a torchrun job can be resumed like any other."""
    np.save(tmp_path / "x.npy", mixture_flow(2, torch.float32).sample(600, seed=0).numpy())
    options = ["--network", "width=16,blocks=1,dropout=0.0", "--max-steps", "20", "--quiet"]
    arguments = ["fit", str(tmp_path / "x.npy"), *options, "--out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [*launcher, str(free_port()), "-m", "ifpyro", *arguments, str(tmp_path / "two")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=MINUTES)
    assert done.returncode == 0, done.stderr
    assert main([*arguments, str(tmp_path / "one")]) == 0
    one, two = ifpyro.load(tmp_path / "one"), ifpyro.load(tmp_path / "two")
    assert two.report["training"]["processes"] == 2
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], value, rtol=1e-3, atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one", "two", "x.npy"]


def test_alone_a_pool_changes_nothing():
    pool, x = Pool.join(), torch.arange(6.0)
    assert (pool.rank, pool.size) == (0, 1)
    for same in (pool.sum(x), pool.rows(x), pool.blocks(x, 6), pool.share(x), x[pool.mine(6)]):
        assert same is x or torch.equal(same, x)
    assert pool.totals([1.0, 2.0]) == [1.0, 2.0]
    assert pool.share_bytes(b"a") == b"a"
    pool.first_error(None)
    with pytest.raises(KeyError):
        pool.first_error(KeyError("k"))


@pytest.mark.parametrize("level", ["fine", "coarse", 1, 7, Evaluations(1), Evaluations(7)])
def test_a_fidelity_travels_as_one_number(level):
    assert _level(_code(level)) == level


def test_a_half_described_job_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(PoolError, match="RANK, MASTER_ADDR, MASTER_PORT is not set; start them with torchrun"):
        Pool.join()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_training_on_two_gpus(tmp_path):
    np.save(tmp_path / "x.npy", mixture_flow(2, torch.float32).sample(600, seed=0).numpy())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    arguments = ["-m", "ifpyro", "fit", str(tmp_path / "x.npy"), "--out", str(tmp_path / "flow"), "--max-steps", "40"]
    done = subprocess.run([*launcher, str(free_port()), *arguments], env=environment(), timeout=MINUTES)
    assert done.returncode == 0
    assert ifpyro.load(tmp_path / "flow").report["training"]["processes"] == 2
