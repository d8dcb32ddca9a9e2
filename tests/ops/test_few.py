"""Few sequences: every way to share out their steps against the float64 reference on a GPU, and the choice of one."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from tests.cases import BF16, F16, F32, Case, make_call, run
from tests.ops.test_cuda import expected
from tests.tolerances import assert_close
from vision_mamba.ops import autograd
from vision_mamba.ops.backends import backward_cuda, forward_cuda, nvrtc
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.known import Known

HALF = (BF16,) * 4
ONE = Case(channels=24, states=1, order="cross", rank=6, dtypes=HALF, grid=(14, 14), batch=1, state=True)
SEVERAL = Case(channels=10, states=4, dtypes=HALF, grid=(1, 200), shared_x=False, merge=False, layout="channels_first")

TOGETHER = Case(channels=128, states=16, order="bidirectional", rank=6, dtypes=HALF, grid=(1, 100), batch=1, state=True)
LONG = Case(
    channels=32, states=4, dtypes=HALF, grid=(1, 1200), shared_x=False, merge=False, layout="channels_first", state=True
)


def few_cases() -> list[Case]:
    """Odd lengths, types, layouts, padding steps, partial routes, more than one round, numbers of states."""
    found = [
        Case(channels=channels, states=states, order="cross", rank=rank, dtypes=HALF, grid=grid, state=grid[0] % 2 == 1)
        for grid in ((1, 1), (5, 7), (28, 28))
        for channels, rank in ((96, 0), (20, 6), (8, 48))
        for states in (1, 16)
    ]
    mixed = ((F32, F32, F32, F32), (F16, F16, F16, F16), (F16, BF16, F32, F16), (BF16, F32, F16, F32))
    found += [
        Case(channels=30, states=s, order="cross", grid=(9, 11), dtypes=t, state=True) for t in mixed for s in (1, 5)
    ]
    found += [
        Case(channels=12, states=states, grid=(1, length), shared_x=False, merge=False, dtypes=(dtype,) * 4,
             layout="channels_first", state=True)
        for states, dtype in ((1, F32), (4, BF16), (16, F16), (64, BF16))
        for length in (197, 1024)
    ]  # fmt: skip
    found += [Case(channels=160, states=s, routes=3, grid=(1, 33), skip=False, bias=False, dtypes=HALF) for s in (1, 8)]
    found += [Case(channels=40, states=s, order="local_2", grid=(9, 11), dtypes=HALF, softplus=False) for s in (1, 2)]
    return [*found, Case(channels=16, states=1, order="cross", grid=(130, 131), rank=4, dtypes=HALF, batch=1)]


def anew(monkeypatch: pytest.MonkeyPatch) -> list[few.Few]:
    """All sequences are few, and plans are made for this test alone; returns what they launch."""
    monkeypatch.setattr(few, "takes", lambda *_: True)
    monkeypatch.setattr(forward_cuda, "runners", {})
    monkeypatch.setattr(backward_cuda, "plans", {})
    monkeypatch.setattr(autograd.operator, "known", Known(10, 5))
    launched, forward, backward = list[few.Few](), few.forward, few.backward
    monkeypatch.setattr(few, "forward", lambda types, how: launched.append(how) or forward(types, how))
    monkeypatch.setattr(few, "backward", lambda types, how, *more: launched.append(how) or backward(types, how, *more))
    return launched


@pytest.mark.gpu
@pytest.mark.parametrize("case", few_cases(), ids=str)
def test_few_match_the_reference(case: Case, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = anew(monkeypatch)
    found = run(make_call(case, device="cuda"), "cuda")
    assert len(launched) == 2
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)
    again = run(make_call(case, device="cuda"), "cuda")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def ways() -> list[tuple[Case, few.Few, bool]]:
    found = []
    for case in (ONE, SEVERAL, TOGETHER, LONG):
        call = make_call(case)
        merge = case.merge and call.routes > 1
        for back in (False, True):
            out = call.new_output() if not back else torch.empty_like(call.x)
            for how in few.options(call, merge, 16, case.order is None and not case.merge, back, out):
                small = case.channels < 64 or how.together > 1 or how.warps == 8
                if how.shared(call, back) <= 227 * 1024 and small and (how.chain or case is not LONG):
                    found.append((case, how, back))
    return found


def _label(value) -> str:
    if isinstance(value, few.Few):
        return f"{value.warps}x{value.cluster}x{value.together}s{value.steps}{'chain' * value.chain}"
    return str(value) if not isinstance(value, Case) else f"n{value.states}c{value.channels}"


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "how", "back"), ways(), ids=_label)
def test_every_way(case: Case, how: few.Few, back: bool, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if how.cluster * how.together > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("blocks are joined from compute capability 9.0 on")
    usual = few.choose

    def alike(other: few.Few) -> bool:
        return all(
            getattr(other, n) == getattr(how, n) for n in ("warps", "cluster", "together", "steps", "chain", "merge")
        )

    def choose(call, ways, going_back, processors, limit):
        found = list(ways)
        if going_back == back:
            found = [one for one in found if alike(one)]
        return usual(call, iter(found), going_back, processors, limit)

    launched = anew(monkeypatch)
    monkeypatch.setattr(few, "choose", choose)
    found = run(make_call(case, device="cuda"), "cuda")
    assert len(launched) == 2 and alike(launched[back])
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)
    again = run(make_call(case, device="cuda"), "cuda")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


@pytest.mark.gpu
@pytest.mark.parametrize("case", [ONE, TOGETHER], ids=str)
def test_step_sizes_that_are_not_aligned(case: Case, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a low rank that are cut out of a projection and begin at any of its columns."""
    launched = anew(monkeypatch)
    call = make_call(case, device="cuda")
    wide = torch.empty(*call.dt.shape[:-1], case.rank + 3, dtype=call.dt.dtype, device="cuda")
    wide[..., 1:-2] = call.dt
    found = run(call._replace(dt=wide[..., 1:-2]), "cuda")
    assert len(launched) == 2
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)


@pytest.mark.gpu
@pytest.mark.parametrize("states", [16, 64])
def test_backward_alone(states: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what the wide kernels have saved, as many steps apart."""
    launched = anew(monkeypatch)
    monkeypatch.setattr(few, "takes", lambda *_: False)
    case = dataclasses.replace(TOGETHER, states=states, rank=6 if states == 16 else 0, grid=(1, 200))
    found = run(make_call(case, device="cuda"), "cuda")
    assert len(launched) == 1
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)


@pytest.mark.gpu
def test_a_table_changed_unseen_ends_the_launch() -> None:
    """Where blocks of a cluster wait for as many shares as there are tokens, and a route has a token twice."""
    code = """
import torch
from tests.cases import make_call
from tests.ops.test_few import ONE
call = make_call(ONE, device="cuda")
for _ in range(2):
    torch.ops.vision_mamba.cross_selective_scan(*call, "cuda")
    torch.cuda.synchronize()
    call.indices.data.zero_()  # behind the count of what is written into a tensor
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode and "CUDA error" in done.stderr, done.stderr[-2000:]


@pytest.mark.gpu
def test_a_chain_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay numbers its blocks anew."""
    launched = anew(monkeypatch)
    monkeypatch.setattr(few, "choose", lambda call, ways, *_: next(h for h in ways if h.chain and h.warps == 4))
    call = make_call(dataclasses.replace(LONG, grid=(1, 4000), state=False), device="cuda")
    leaves = call._replace(**{n: getattr(call, n).clone().requires_grad_() for n in ("x", "A")})
    dy = torch.randn_like(call.new_output())

    def both() -> tuple[torch.Tensor, ...]:
        y, _ = torch.ops.vision_mamba.cross_selective_scan(*leaves, "cuda")
        return y.detach(), *torch.autograd.grad(y, (leaves.x, leaves.A), dy)

    want = both()
    assert [how.chain for how in launched] == [True, True]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for _ in range(3):
        for tensor in found:
            tensor.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


def published() -> list[tuple[Case, bool]]:
    vmamba = ((56, 96, 6), (28, 192, 12), (14, 384, 24), (7, 768, 48))
    found = [
        Case(channels=channels, states=1, order="cross", rank=rank, dtypes=HALF, grid=(side, side), batch=1)
        for side, channels, rank in vmamba
    ]
    vim = Case(channels=768, states=16, order="bidirectional", rank=24, dtypes=HALF, grid=(1, 197), batch=1)
    return [(case, back) for case in (*found, vim) for back in (False, True)]


@pytest.mark.parametrize("joined", [1, 16], ids=["blocks alone", "clusters"])
@pytest.mark.parametrize(("case", "back"), published(), ids=str)
def test_a_choice_fits(case: Case, back: bool, joined: int) -> None:
    """Of published models' layers at batch 1: within a block's shared memory, in few rounds."""
    call, limit = make_call(case), (227 if joined > 1 else 163) * 1024
    merge = joined > 1 or case.tokens < 1000  # a block alone has no room for the sum over a large map
    ways = list(few.options(call, merge, joined, False, back, call.new_output()))
    assert len(set(ways)) == len(ways) and all(way.possible() for way in ways)
    how = few.choose(call, iter(ways), back, 132, limit)
    assert how is not None and how.shared(call, back) <= limit and how.joined <= joined
    assert -(-call.steps // (64 * how.route_warps)) <= (4 if joined > 1 else 13)
    assert few.choose(call, iter(ways), back, 132, 1024) is None


def test_what_is_few() -> None:
    assert few.takes(1, 4 * 96, 3136) and few.takes(16, 2 * 768, 197)  # VMamba-T's first stage and Vim-S at batch 1
    assert not few.takes(1, 8 * 4 * 96, 3136) and not few.takes(16, 8 * 2 * 768, 197)  # and at batch 8
    assert few.takes(4, 256, 65536) and not few.takes(4, 1024, 65536) and not few.takes(64, 1, 1)
    assert few.goes_back(16, 8 * 2 * 768, 197) and few.goes_back(64, 256, 784)
    assert not few.goes_back(16, 128 * 2 * 768, 197) and not few.goes_back(16, 8 * 768, 6085)
    assert not few.goes_back(20, 256, 197)  # the wide kernels save other numbers of them


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize("chain", [False, True], ids=["cluster", "chain"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_nvrtc_compiles(back: bool, chain: bool) -> None:
    call = make_call(LONG if chain else ONE)
    ways = few.options(call, not chain, 8, chain, back, call.x)
    how = next(
        h
        for h in ways
        if h.chain == chain and h.warps == 4 and h.cluster * h.together == (4 if back else 4 - 3 * chain)
    )
    types = ("Bfloat",) * 5
    wanted = few.backward(types, how, "Bfloat", "Bfloat", "Bfloat") if back else few.forward(types, how)
    code, report = nvrtc.compile_source(wanted, 90)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    assert code[:4] == b"\x7fELF" and spilled and sum(spilled) <= (32 if back else 0)
