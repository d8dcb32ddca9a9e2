"""What is particular to the C++ kernel: instruction sets, threads, memory, its build and life without it."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import BF16, F16, Case, make_call, run
from tests.tolerances import assert_close
from vision_mamba import ops
from vision_mamba.ops import registry
from vision_mamba.ops.backends import cpu
from vision_mamba.ops.backends.sources import source_dir
from vision_mamba.ops.call import GRADIENTS

needs_kernel = pytest.mark.skipif(not cpu.levels(), reason="the C++ kernel is not built")
ROOT = Path(__file__).parents[2]

# Enough work for several threads, channels that fill no whole number of registers or chunks, and both ways of summing
# routes: over a result that one thread owns, and over partial results of several.
WIDE = Case(grid=(1, 130), batch=2, channels=150, states=5, order="bidirectional", state=True)
LOW_RANK = Case(grid=(12, 11), batch=1, channels=100, states=1, order="cross", rank=7)


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    return run(cases.double(make_call(case)), "reference")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize(
    "case",
    [
        WIDE,
        LOW_RANK,
        Case(states=23, order="local_2", shared_x=False, merge=False, layout="channels_first", grid=(1, 70)),
        Case(states=1, dtypes=(F16,) * 4, layout="channels_first", grid=(1, 70), channels=40),
        Case(states=16, dtypes=(BF16,) * 4, rank=5, order="cross", channels=40, out_dtype=F16),
        Case(states=2, dtypes=(F16, BF16, F16, BF16), order="atrous_2", merge=False, out_dtype=BF16, channels=17),
    ],
    ids=str,
)
def test_every_instruction_set(case: Case, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    for name, tensor in run(make_call(case), "cpu").items():
        assert_close(name, tensor, expected(case)[name])


@needs_kernel
@pytest.mark.parametrize("level", cpu.levels())
def test_elementary_functions(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of one state, laid out so that y is softplus(dt) at the first and exp(A) at the second."""
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    count = 4001

    def scan(dt: Tensor, A: Tensor, softplus: bool) -> Tensor:
        x = torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(1, 2, count)
        ones = torch.ones(1, 2, 1, 1)
        call = (x, dt, A.view(1, count, 1), ones, ones, None, None, None, None, None, softplus)
        return torch.ops.vision_mamba.cross_selective_scan(*call, backend="cpu")[0][0]

    raw = torch.linspace(-80, 80, count)
    y = scan(raw.expand(1, 2, 1, count).transpose(1, 2).reshape(1, 2, 1, count), torch.zeros(count), True)[0]
    exact = torch.log1p(torch.exp(-raw.double().abs())) + raw.double().clamp(min=0)
    assert ((y - exact) / exact).abs().max() < 5e-7

    rates = torch.linspace(-80, 2, count)
    y = scan(torch.ones(1, 2, 1, count), rates, False)[1]
    exact = rates.double().exp()
    # The argument itself is rounded, which counts for more the larger it is.
    assert ((y - exact) / exact / (1 + rates.abs())).abs().max() < 2e-7
    assert (scan(torch.ones(1, 2, 1, count), torch.full((count,), -200.0), False)[1] == 0).all()
    assert (scan(torch.ones(1, 2, 1, count), torch.zeros(count), False)[1] == 1).all()


@needs_kernel
@pytest.mark.parametrize("level", cpu.levels())
def test_slow_decays_carry_no_bias(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of a thousand steps multiplies what exp(x) - 1 has of systematic error near 0."""
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    torch.manual_seed(0)
    steps, ones = torch.rand(1, 4096, 1, 32) * 2e-3, torch.ones(1, 4096, 1, 1)

    def scan(t: torch.dtype, backend: str) -> Tensor:
        call = (torch.ones(1, 4096, 32), steps, -torch.ones(1, 32, 1), ones, ones)
        y, _ = torch.ops.vision_mamba.cross_selective_scan(
            *(a.to(t) for a in call), *(None,) * 5, False, backend=backend
        )
        return y[:, -1]

    exact = scan(torch.float64, "eager")
    assert ((scan(torch.float32, "cpu") - exact) / exact).mean().abs() < 5e-7


@needs_kernel
@pytest.mark.parametrize("case", [WIDE, LOW_RANK, Case(channels=200, states=16, grid=(1, 70), layout="channels_first")])
def test_threads_change_no_bit(case: Case, threads: None) -> None:
    call = make_call(case)
    torch.set_num_threads(1)
    alone = run(call, "cpu")
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for name, tensor in run(call, "cpu").items():
            assert torch.equal(tensor, alone[name]), f"{name} with {count} threads"


@needs_kernel
def test_whether_states_are_saved_changes_no_bit() -> None:
    call = make_call(WIDE)
    y, last = torch.ops.vision_mamba.cross_selective_scan(*call, "cpu")
    found = run(call, "cpu")
    assert torch.equal(y, found["y"]) and torch.equal(last, found["last_state"])


@needs_kernel
@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize(
    "case",
    [
        LOW_RANK,
        Case(grid=(1, 67), channels=37, states=3, order="bidirectional", merge=False, state=True),
        Case(grid=(1, 67), channels=37, layout="channels_first", shared_x=False, merge=False, dtypes=(BF16,) * 4),
        Case(grid=(5, 7), order="atrous_2", shared_x=False, merge=False, dtypes=(F16,) * 4, states=17),
    ],
    ids=str,
)
def test_writes_all_of_its_outputs_and_nothing_else(case: Case, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that the backend allocates lies in the middle of a larger one; all of it starts as one odd value."""
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    call = make_call(case)
    guarded: list[tuple[Tensor, Tensor]] = []
    margin, mark = 512, -61440.0  # exact in every type, and larger than any result here

    def new(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        length = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
        whole = torch.full((length + 2 * margin,), mark, dtype=dtype)
        guarded.append((whole, torch.as_strided(whole, size, stride, margin)))
        return guarded[-1][1]

    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def like(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        plan = empty_like(tensor, device="meta")
        return new(tuple(plan.shape), plan.stride(), dtype or tensor.dtype)

    def fresh(tensor: Tensor, size: object, *, dtype: torch.dtype | None = None) -> Tensor:
        plan = new_empty(tensor, size, dtype=dtype, device="meta")
        return new(tuple(plan.shape), plan.stride(), plan.dtype)

    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(Tensor, "new_empty", fresh)
    y, last, saved = cpu.BACKEND.forward(call, True)
    dlast = torch.randn(last.shape) if case.state else None
    cpu.BACKEND.backward(call, saved, torch.randn(y.shape).to(y.dtype), dlast)
    monkeypatch.undo()
    assert len(guarded) >= 3 + 5
    for whole, inside in guarded:
        assert (whole[:margin] == mark).all() and (whole[whole.numel() - margin :] == mark).all()
        assert not (inside == mark).any()


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "case",
    [
        Case(grid=(1, 512), batch=8, channels=384, states=16, shared_x=False, merge=False, layout="channels_first"),
        Case(grid=(56, 56), batch=8, channels=96, states=1, rank=6, order="cross"),
        Case(grid=(28, 28), batch=8, channels=192, states=16, order="cross", dtypes=(BF16,) * 4),
    ],
    ids=str,
)
def test_backward_needs_less_than_twice_its_inputs(case: Case) -> None:
    """Peak memory beyond what stood before and the gradients themselves."""
    call = make_call(case)
    tensors = [getattr(call, name) for name in GRADIENTS if getattr(call, name) is not None]
    inputs = sum(t.numel() * t.element_size() for t in tensors)
    y, _, saved = cpu.BACKEND.forward(call, True)
    dy = torch.randn_like(y)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    grads = cpu.BACKEND.backward(call, saved, dy, None)
    extra = _status("VmHWM") - before
    assert any(grad is not None for grad in grads)
    assert extra < 2 * inputs + inputs, f"{extra / inputs:.2f} times the inputs, of which 1 for the gradients"


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def _child(queue: multiprocessing.Queue[float]) -> None:
    queue.put(_total())


def _total() -> float:
    """Forward alone: autograd's own threads do not survive a fork where it has used an accelerator."""
    return float(torch.ops.vision_mamba.cross_selective_scan(*make_call(WIDE), "cpu")[0].double().sum())


@needs_kernel
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")
def test_runs_after_a_fork(threads: None) -> None:
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    expected = _total()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0


@needs_kernel
def test_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, "altivec")
    with pytest.raises(ops.BackendError, match=r"VISION_MAMBA_CPU_LEVEL is 'altivec', but this machine has .*baseline"):
        run(make_call(Case()), "cpu")


@needs_kernel
def test_float64_is_refused() -> None:
    with pytest.raises(ops.BackendError, match=r"computes in float32 .* Backends that accept it: eager, reference"):
        run(make_call(Case(dtypes=(torch.float64,) * 4)), "cpu")


def test_other_devices_are_refused() -> None:
    reason = ops.available_backends("meta")["cpu"]
    assert reason == "it runs on the CPU alone, and the tensors are on meta."


@pytest.fixture
def reopened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library is looked for again, in the test and after it."""
    cpu._load.cache_clear()
    cpu.levels.cache_clear()
    yield
    monkeypatch.undo()
    cpu._load.cache_clear()
    cpu.levels.cache_clear()


def test_without_the_library(reopened: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The reason and the fix are said, and the slower path is taken with one warning."""
    monkeypatch.setattr(cpu, "EXTENSION_SUFFIXES", [])
    reason = ops.available_backends("cpu")["cpu"]
    assert reason is not None and "there is no C++ kernel" in reason and "install one (g++ or clang++)" in reason
    with pytest.raises(ops.BackendError, match="there is no C"):
        run(make_call(Case()), "cpu")
    monkeypatch.setattr(registry, "_announced", set())
    call = make_call(Case())
    with caplog.at_level(logging.WARNING, logger="vision_mamba"):
        for _ in range(2):
            torch.ops.vision_mamba.cross_selective_scan(*call)
    (record,) = caplog.records
    assert "'eager', a slow one" in record.getMessage() and "there is no C++ kernel" in record.getMessage()


@needs_kernel
def test_a_library_of_other_sources_is_refused(reopened: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ABI", cpu._ABI + 1)
    reason = ops.available_backends("cpu")["cpu"]
    assert reason is not None and "built from another version of the sources; reinstall" in reason


def test_sources_are_found() -> None:
    assert (source_dir() / "params.h").is_file() and (source_dir() / "cpu" / "level.cpp").is_file()


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not run from a checkout")
def test_building_without_a_compiler_succeeds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build"]
    command += ["--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")]
    environment = os.environ | {"CC": str(tmp_path / "none"), "CXX": str(tmp_path / "none")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lib" / "vision_mamba" / "_csrc" / "params.h").is_file()
    assert (tmp_path / "lib" / "vision_mamba" / "ssm" / "state_spaces.md").is_file()
    assert (tmp_path / "lib" / "vision_mamba" / "ops" / "call.py").is_file()
    assert not list((tmp_path / "lib").rglob("_cpu*"))
