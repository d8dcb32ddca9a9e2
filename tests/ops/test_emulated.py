"""The CUDA kernels on a CPU, without a GPU: small scans, each way that a plan can take.

The whole sweep is in test_cuda.py, test_few.py and test_wave*.py, for a GPU; here are a few cases of each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cases
from tests.cases import BF16, F16, F32, Case, make_call
from tests.ops import test_wave
from tests.ops.emulated import COMPILER, FLAGS, built, emulated, in_cpp, run
from tests.tolerances import assert_close
from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.backends import gpu, wide_cuda
from vision_mamba.ops.call import ScanCall

__all__ = ["emulated"]  # a fixture
HALF = (BF16,) * 4
LONG = replace(test_wave.LONG, grid=(1, 67))


takes_call = few.takes_call


@pytest.fixture(autouse=True)
def many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequences are few, but in tests that say so."""
    monkeypatch.setattr(few, "takes_call", lambda *_, **__: False)


def check(case: Case, used: set[str], *names: str, change: Callable[[ScanCall], ScanCall] = lambda call: call) -> None:
    """Against the reference, in every tensor, by kernels some of which have these names; twice the same."""
    found, reference = run(change(make_call(case))), cases.run(cases.double(make_call(case)), "reference")
    assert used >= set(names) and used
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert_close(name, found[name], tensor)
    again = run(change(make_call(case)))
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


#: Of these tests, what goes to ThreadSanitizer: each kernel in which warps wait for single others. Of walk_merged whole
#: tiles: for steps past the end of a route lanes read sums that others change, and use nothing of them.
RACES = [
    "test_walks_that_add_up_routes[way2-0]",
    "test_two_routes_share_a_warp[(5, 7)-6-5]",
    "test_two_routes_share_a_warp[(5, 7)-0-2]",
    "test_many_sequences_of_several_states[in order-0-dtype4]",
    "test_waves[3-short]",
    "test_waves[1-float32]",
    "test_blocks_add_up_what_others_leave[(1, 70)-2-dtype0]",
]

OPTIONS = [case for case in cases.options() if case.states in (1, 16)]
SHAPES = [case for case in cases.shapes() if case.tokens < 300 and case.states in (1, 3, 16, 64)]


@pytest.mark.parametrize("case", OPTIONS + SHAPES + cases.layouts()[::3], ids=str)
def test_matches_the_reference(case: Case, emulated: set[str], poisoned: None) -> None:
    check(case, emulated)


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("pieces", ["whole", "segments"])
def test_walks(pieces: str, rank: int, emulated: set[str], poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "walks", lambda *_: True)
    monkeypatch.setattr(kernels, "fills", lambda *_: False)
    monkeypatch.setattr(kernels, "wide_segments", lambda *_: (1, 0) if pieces == "whole" else (3, 1))
    case = Case(channels=64, states=1, batch=1, order="cross", rank=rank, dtypes=HALF, grid=(5, 7), state=True)
    check(case, emulated, "walk_forward", "walk_backward")


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("way", [(1, 1, 2, "Bfloat"), (2, 1, 2, "Float"), (1, 2, 1, "Bfloat"), (2, 2, 1, "Bfloat")])
def test_walks_that_add_up_routes(
    way: tuple[int, int, int, str], rank: int, emulated: set[str], poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_, turns, stages, sums = way
    how = kernels.Merged(run_, turns, stages, 8, rank=rank, sums=sums)
    monkeypatch.setattr(kernels, "walks", lambda *_: True)
    monkeypatch.setattr(kernels, "fills", lambda *_: True)
    monkeypatch.setattr(kernels, "merged", lambda *_: how)
    monkeypatch.setattr(kernels, "paired", lambda *_: None)
    monkeypatch.setattr(kernels, "wide_segments", lambda *_: (1, 0))
    grid = (5, 7) if rank else (4, 8)
    case = Case(channels=64, states=1, batch=1, order="cross", rank=rank, dtypes=HALF, grid=grid, state=True)
    check(case, emulated, "walk_merged")


@pytest.mark.parametrize("turns", [1, 2, 5])
@pytest.mark.parametrize("rank", [0, 2, 6, 8])
@pytest.mark.parametrize("grid", [(5, 7), (4, 8), (3, 5)], ids=str)
def test_two_routes_share_a_warp(
    grid: tuple[int, int], rank: int, turns: int, emulated: set[str], poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "walks", lambda *_: True)
    monkeypatch.setattr(kernels, "fills", lambda *_: True)
    monkeypatch.setattr(kernels, "merged", lambda *_: kernels.Merged(1, 2, 1, 8, rank=rank, sums="Bfloat"))
    monkeypatch.setattr(kernels, "paired", lambda *_: kernels.Paired(rank, turns))
    monkeypatch.setattr(kernels, "wide_segments", lambda *_: (1, 0))
    given = grid == (5, 7)
    case = Case(
        channels=64, states=1, batch=2, order="cross", rank=rank, grid=grid, dtypes=HALF, state=given, bias=given
    )
    if grid == (3, 5):
        case = replace(case, shared_x=False, dtypes=HALF if rank else (F16, F16, F32, F16), out_dtype=BF16)
    check(case, emulated, "walk_paired")


@pytest.mark.parametrize(
    ("routes", "rank", "dtype"),
    [
        *((routes, rank, BF16) for routes in ("together", "in turn", "in order", "in segments") for rank in (0, 24)),
        ("in turn", 6, BF16),
        *(("together", rank, dtype) for rank in (0, 24) for dtype in (F16, F32)),
    ],
)
def test_many_sequences_of_several_states(
    routes: str, rank: int, dtype: torch.dtype, emulated: set[str], poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide_cuda, "_forward_tile", lambda call, _: kernels.forward_tiles(call.states)[True])
    monkeypatch.setattr(wide_cuda, "_in_turn", lambda *_: routes == "in turn")
    monkeypatch.setattr(wide_cuda, "_in_order", lambda *_: routes == "in order")
    monkeypatch.setattr(kernels, "MANY", 0)
    monkeypatch.setattr(kernels, "LEAN", routes == "together")
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 1)
    monkeypatch.setattr(kernels, "wide_segments", lambda *_: (3, 1) if routes == "in segments" else (1, 3))
    case = Case(channels=64, states=16, order="bidirectional", rank=rank, dtypes=(dtype,) * 4, grid=(1, 37), state=True)
    check(case, emulated, "wide_backward")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(LONG, dtypes=HALF, state=True), id="bfloat16"),
        pytest.param(replace(LONG, dtypes=(F16,) * 4, state=True), id="float16"),
        pytest.param(replace(LONG, dtypes=(F32,) * 4, state=True), id="float32"),
        pytest.param(replace(LONG, grid=(1, 33), channels=100, dtypes=HALF, state=True), id="short"),
        pytest.param(
            replace(LONG, routes=2, channels=52, dtypes=HALF, skip=False, bias=False, softplus=False), id="bare"
        ),
    ],
)
@pytest.mark.parametrize("columns", [1, 3])
def test_waves(case: Case, columns: int, emulated: set[str], poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "wave_forward_columns", lambda *_: columns)
    monkeypatch.setattr(kernels, "wave_fills", lambda *_: True)
    check(case, emulated, "wave_forward", "wave_backward")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("grid", "routes"), [((1, 70), 2), ((1, 270), 1)], ids=str)
def test_blocks_add_up_what_others_leave(
    grid: tuple[int, int],
    routes: int,
    dtype: torch.dtype,
    emulated: set[str],
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two items of the batch, two blocks each, tiles of several levels of which they count."""
    monkeypatch.setattr(kernels, "wave_forward_columns", lambda *_: 1)
    monkeypatch.setattr(kernels, "wave_fills", lambda *_: True)
    case = replace(LONG, batch=2, routes=routes, channels=52, grid=grid, dtypes=(dtype,) * 4, state=True)
    check(case, emulated, "wave_backward")
    if routes > 1:  # the gradients of B and C are written in pieces, as they lie then
        check(case, emulated, change=lambda call: call._replace(B=call.B.contiguous(), C=call.C.contiguous()))


@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize("way", ["block", "cluster", "groups", "chain"])
def test_few_sequences(
    way: str, states: int, emulated: set[str], poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block alone, a cluster for a group of channels, one for several where there is one, and blocks in a chain."""
    usual, chosen = few.choose, list[bool]()

    def is_wanted(how: few.Few) -> bool:
        joined = "chain" if how.chain else "groups" if how.together > 1 else "cluster" if how.cluster > 1 else "block"
        return joined == way

    def choose(call: ScanCall, ways: Iterable[few.Few], *more: Any) -> few.Few:
        ways = list(ways)
        how = usual(call, [how for how in ways if is_wanted(how)] or ways, *more)
        chosen.append(is_wanted(how))
        return how

    monkeypatch.setattr(few, "takes_call", takes_call)
    monkeypatch.setattr(few, "takes", lambda *_: True)
    monkeypatch.setattr(few, "choose", choose)
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 132)
    case = Case(channels=32, states=states, batch=1, order="cross", rank=6, dtypes=HALF, grid=(9, 11), state=True)
    if way == "chain":
        case = replace(LONG, channels=32, states=states, grid=(1, 1100), dtypes=HALF, state=True)
    check(case, emulated, "few_forward", "few_backward")
    assert chosen and chosen[-1]  # going back


def test_a_barrier_that_some_never_reach_ends_the_program(emulated: set[str]) -> None:
    code = """#include "runtime.h"
    int main() { emulated::run([] { if (threadIdx.x < 32) __syncthreads(); }, 1, 64, 0); }"""
    outcome = subprocess.run([str(built(code))], capture_output=True, text=True)
    assert outcome.returncode < 0 and "all threads wait" in outcome.stderr


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        ("emulated::shared()[65] = 0;", "a write behind its shared memory"),
        ("emulated::read<unsigned>(emulated::shared() + 2);", "a read that is not aligned"),
    ],
)
def test_what_a_gpu_would_not_take_ends_the_program(work: str, sentence: str, emulated: set[str]) -> None:
    code = f"""#include "runtime.h"
    int main() {{ emulated::run([] {{ {work} }}, 1, 32, 64); }}"""
    outcome = subprocess.run([str(built(code))], capture_output=True, text=True)
    assert outcome.returncode < 0 and sentence in outcome.stderr


def test_every_statement_in_assembly_is_known_or_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"no rule says what this does: asm\(\"bfe"):
        in_cpp('asm("bfe.u32 %0, %1, 0, 8;" : "=r"(r) : "r"(a));')
    assert in_cpp('asm volatile("" : "+r"(value));') == ";"


def test_threads_wait_before_they_read_what_others_write() -> None:
    """Some of the tests above with ThreadSanitizer, for which only barriers order what threads do, not that they run in
    lockstep or in turn: what compute-sanitizer's racecheck does not follow where warps hand over to each other."""
    if not COMPILER:
        pytest.skip("no C++ compiler: CXX names none, and g++ is not on the path")
    runtime = subprocess.run([*COMPILER, "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{COMPILER[0]} comes without ThreadSanitizer's library, libtsan.so")
    environment = os.environ | {
        FLAGS: "-fsanitize=thread -g",
        "LD_PRELOAD": runtime,
        "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
    }
    tests = [f"{__file__}::{name}" for name in RACES]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-n0", "-p", "no:cacheprovider", *tests]
    outcome = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    races = re.findall(r"SUMMARY: ThreadSanitizer: (.*)", outcome.stdout)
    assert outcome.returncode == 0 and not races, "\n".join(races) or outcome.stdout[-6000:]
