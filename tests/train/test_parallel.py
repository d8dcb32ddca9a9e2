"""Two processes on one CPU train as one does, stop and go on together, and end together when one dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import runs
from tests.train.runs import ROOT, STEPS
from tests.train.test_resume import Stopping
from vision_mamba.train import parallel
from vision_mamba.train.checkpoint import LAST
from vision_mamba.train.errors import ConfigError, Interrupted
from vision_mamba.train.options import Config
from vision_mamba.train.progress import Progress
from vision_mamba.train.run import prepare, train

Job = tuple[Config, int | None]  # and the step after which one process is asked to stop
PLAIN: dict[str, Any] = {"drop_path": 0.0, "mixup": 0.0, "no_aug": True}  # what draws nothing at random


def work(rank: int, ports: list[int], jobs: list[Job]) -> None:
    """One process' part of some runs."""
    os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    for port, (config, stop) in zip(ports, jobs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        progress: Progress = Stopping(stop if rank == 1 and stop else 10**6, 15)
        try:
            train(config, prepare(config), progress)
            assert stop is None
        except Interrupted as stopped:
            assert stop is not None and stopped.signum == 15, "one was asked, both stop"


def together(jobs: list[Job]) -> None:
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in jobs]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in free]
    context = multiprocessing.get_context("forkserver")  # a process without threads of its own, which imports once
    context.set_forkserver_preload(["tests.train.test_parallel"])
    processes = [context.Process(target=work, args=(rank, ports, jobs), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, and of one with batches twice as large."""
    folder = tmp_path_factory.mktemp("parallel")
    runs.draw(folder / "images")

    def config(name: str, **options: Any) -> Config:
        return runs.config(folder, **{"batch_size": 2, "model_ema": True, "experiment": name, **options})

    jobs: list[Job] = []
    for name, options in (("ddp", {}), ("fsdp", {"fsdp": True})):
        jobs += [(config(f"{name}_plain", **PLAIN, **options), None), (config(name, **options), None)]
        jobs += [(config(f"{name}_stopped", **options), STEPS + 1)]
        jobs += [(config(f"{name}_stopped", resume="auto", **options), None)]
    jobs.append((config("accumulated", **PLAIN, batch_size=1, grad_accum_steps=2), None))
    together(jobs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs.fit(config("one", **PLAIN, batch_size=4))
    torch.set_num_threads(threads)
    return folder


def saved(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "output" / name / LAST, weights_only=True)


@pytest.mark.parametrize("name", ["ddp_plain", "fsdp_plain", "accumulated"])
def test_two_processes_train_like_one_with_twice_the_batch(folder: Path, name: str) -> None:
    two, one = saved(folder, name), saved(folder, "one")
    for key in ("state_dict", "state_dict_ema"):
        assert two[key].keys() == one[key].keys()
        for weight in one[key]:
            torch.testing.assert_close(two[key][weight], one[key][weight], rtol=2e-3, atol=2e-5, msg=f"{key} {weight}")
    assert two["metric"] == one["metric"]
    assert two["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_stopped_parallel_run_ends_like_one_that_was_not(folder: Path, name: str) -> None:
    whole, stopped = saved(folder, name), saved(folder, f"{name}_stopped")
    assert whole["epoch"] == stopped["epoch"] == 2 and whole["processes"] == 2
    for key in ("state_dict", "state_dict_ema"):
        assert runs.same(whole[key], stopped[key])
    assert not runs.same(whole["state_dict"], saved(folder, f"{name}_plain")["state_dict"]), "randomness has a say"


def test_one_process_goes_on_from_shares_put_together(folder: Path, one_thread: None) -> None:
    config = runs.config(folder, experiment="alone", epochs=3, resume=str(folder / "output" / "fsdp" / LAST))
    config.run_dir.mkdir()
    assert runs.fit(config).epoch == 3


@pytest.mark.parametrize(
    ("error", "parts"), [(None, True), (Interrupted(15, "last.pth"), True), (ZeroDivisionError("alone"), False)]
)
def test_processes_part_together_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, parts: bool
) -> None:
    """NCCL waits for all of them, and they may wait for one that failed."""
    parted = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    joined = {"device": "cpu", "global_rank": 1, "world_size": 2}
    monkeypatch.setattr(parallel, "init_distributed_device_so", lambda device: joined)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: parted.append(True))
    with contextlib.suppress(ZeroDivisionError, Interrupted), parallel.world_on(torch.device("cpu")) as world:
        assert (world.rank, world.size) == (1, 2)
        if error is not None:
            raise error
    assert bool(parted) == parts


def test_sharing_out_wants_several_processes(drawn: Path) -> None:
    with pytest.raises(ConfigError, match=r"--fsdp: there is one process; start several with torchrun."):
        runs.fit(runs.config(drawn, fsdp=True))


def test_a_process_that_dies_ends_the_job_with_its_traceback(drawn: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=0"]
    words += [
        "tests/train/parallel_worker.py",
        *runs.flags(runs.config(drawn, batch_size=2, workers=1, recovery_interval=1)),
    ]
    environment = runs.environment(FAULT=f"1 {STEPS - 1}")
    started = time.monotonic()
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and time.monotonic() - started < 200
    assert re.search(r"ZeroDivisionError: a fault on purpose", done.stderr), done.stderr
    position = torch.load(drawn / "output" / "run" / LAST, weights_only=True)
    assert (position["epoch"], position["batch"]) == (0, STEPS - 1), "the steps before are saved"
