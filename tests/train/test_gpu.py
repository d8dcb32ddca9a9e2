"""Training on GPUs: what the tests beside this one see on a CPU holds there too."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import runs
from tests.train.runs import ROOT, STEPS
from vision_mamba.train.checkpoint import LAST
from vision_mamba.train.options import Config

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# What draws nothing at random, and an optimizer that makes nothing of the signs of gradients near 0.
PLAIN: dict[str, Any] = {"drop_path": 0.0, "mixup": 0.0, "no_aug": True, "epochs": 1, "opt": "sgd", "lr": 0.01}
HALF: dict[str, Any] = {"amp": True, "amp_dtype": "float16", "model_ema": True, "model_ema_decay": 0.5, "reprob": 0.5}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    runs.draw(tmp_path / "images", train=64, held_out=8)
    return tmp_path


def config(folder: Path, name: str, **options: Any) -> Config:
    common: dict[str, Any] = {"device": "cuda", "batch_size": 16, "workers": 2, "experiment": name}
    return runs.config(folder, **common | options)


def saved(config: Config) -> dict[str, Any]:
    return torch.load(config.run_dir / LAST, map_location="cpu", weights_only=True)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float = 1e-2, atol: float = 2e-4) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=rtol, atol=atol, msg=lambda told, name=name: f"{name}: {told}"
        )


@pytest.mark.parametrize("options", [{}, {"amp": True}, HALF], ids=["float32", "bfloat16", "float16"])
def test_a_run_that_is_killed_goes_on_and_ends_like_one_that_was_not(images: Path, options: dict[str, Any]) -> None:
    options = {"deterministic": True, **options}
    whole, killed = (config(images, name, recovery_interval=1, **options) for name in ("whole", "killed"))
    runs.fit(whole)
    process = runs.start(*runs.flags(killed), "--epochs", "200", "--sched", "constant", "--log-interval", "1")
    try:
        while not (killed.run_dir / LAST).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    at = saved(killed)
    assert at["epoch"] * 8 + at["batch"] > 0
    again = config(images, "killed", resume="auto", epochs=at["epoch"] + 1, sched="constant", **options)
    straight = config(images, "straight", epochs=at["epoch"] + 1, sched="constant", **options)
    runs.fit(again)
    runs.fit(straight)
    one, other = saved(again), saved(straight)
    assert one["epoch"] == other["epoch"] == at["epoch"] + 1
    assert runs.same(one["state_dict"], other["state_dict"])
    assert one["amp_scaler"] == other["amp_scaler"] and bool(one["amp_scaler"]) == ("amp_dtype" in options)
    assert all(bool(value.isfinite().all()) for value in saved(whole)["state_dict"].values())


def test_a_gpu_trains_like_a_cpu(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    both = [config(images, device, device=device, **PLAIN) for device in ("cpu", "cuda")]
    for each in both:
        runs.fit(each)
    close(*(saved(each)["state_dict"] for each in both))


def test_a_compiled_model_learns_the_same(images: Path) -> None:
    both = [config(images, str(name), torchcompile=name, **PLAIN) for name in (None, "inductor")]
    for each in both:
        runs.fit(each)
    close(*(saved(each)["state_dict"] for each in both))


def torchrun(config: Config, *words: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """tools/train.py on several GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["tests/train/parallel_worker.py", *runs.flags(config), *words]
    variables = runs.environment(**environment)
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=180)


@two_gpus
@pytest.mark.parametrize("options", [{}, {"fsdp": True}], ids=["ddp", "fsdp"])
def test_two_gpus_train_like_one_with_twice_the_batch(images: Path, options: dict[str, Any]) -> None:
    one = config(images, "one", **PLAIN)
    runs.fit(one)
    two = config(images, "two", batch_size=8, **PLAIN, **options)
    done = torchrun(two)
    assert done.returncode == 0, done.stderr
    close(saved(two)["state_dict"], saved(one)["state_dict"])
    assert saved(two)["processes"] == 2
    done = torchrun(two, "--epochs", "2", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert saved(two)["epoch"] == 2


@two_gpus
@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_a_process_that_dies_ends_the_job(images: Path, fault: str) -> None:
    run = config(images, "run", batch_size=8, recovery_interval=1)
    began = time.monotonic()
    done = torchrun(run, FAULT=f"1 {STEPS - 1}", FAULT_KIND=fault)
    # Half a minute of it torchrun waits for the process that is left, which waits for the dead one in a kernel.
    assert done.returncode != 0 and time.monotonic() - began < 170
    told = r"ZeroDivisionError: a fault on purpose" if fault == "raise" else r"Signal 9 \(SIGKILL\)|exitcode *: -9"
    assert re.search(told, done.stderr), done.stderr
    at = saved(run)
    assert (at["epoch"], at["batch"]) == (0, STEPS - 1), "the steps before are saved"
