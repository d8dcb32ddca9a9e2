"""The forward wave kernel: long routes in the classic layout, whose tiles a column's warps take in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import cases
from tests.cases import BF16, F16, F32, Case, make_call, run
from tests.tolerances import assert_close
from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.backends import gpu, nvrtc, wave_cuda
from vision_mamba.ops.known import Known

LONG = Case(
    states=16, routes=1, batch=1, channels=48, grid=(1, 333), shared_x=False, merge=False, layout="channels_first"
)


def routes() -> list[Case]:
    """Columns full of channels and not, tiles of steps and not, fewer of them than warps, every option and type."""
    half = (BF16,) * 4
    found = [replace(LONG, dtypes=(dtype,) * 4, state=state) for dtype in (BF16, F16, F32) for state in (False, True)]
    found += [
        replace(LONG, grid=(1, n), channels=c, states=states, dtypes=half, state=True)
        for n, c, states in ((2, 16, 16), (8, 41, 16), (40, 20, 9), (197, 64, 12), (2100, 60, 16))
    ]
    found += [replace(LONG, routes=2, channels=50, dtypes=half, skip=False, bias=False, softplus=False, state=True)]
    found += [replace(LONG, routes=3, grid=(1, 50), dtypes=t) for t in ((BF16, F32, F32, BF16), (F32, F16, BF16, F32))]
    found += [replace(LONG, shared_x=True, merge=True, batch=2, dtypes=half)]
    return [*found, replace(LONG, dtypes=(F16, BF16, BF16, F16), out_dtype=F32)]


@pytest.mark.gpu
@pytest.mark.parametrize("every, columns", [(1, 1), (1, 3), (2, 2), (4, 3)])
@pytest.mark.parametrize("case", routes(), ids=str)
def test_wave_forward_matches_the_reference(
    case: Case, every: int, columns: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    wave = kernels.wave_forward
    monkeypatch.setattr(kernels, "wave_forward", lambda *how: launched.append(how) or wave(*how))
    monkeypatch.setattr(kernels, "wave_forward_columns", lambda *_: columns)
    if every == 4:  # tiles between two saved states, as the kernels for few sequences want it where they go back
        monkeypatch.setattr(few, "takes", lambda *_: False)
    else:
        monkeypatch.setattr(few, "takes_call", lambda *_, **__: False)
        monkeypatch.setattr(kernels, "wide_every", lambda *_: every)
    monkeypatch.setattr("vision_mamba.ops.backends.backward_cuda.plans", {})
    monkeypatch.setattr("vision_mamba.ops.autograd.operator.known", Known(10, 5))
    monkeypatch.setattr("vision_mamba.ops.backends.forward_cuda.runners", {})
    expected = run(cases.double(make_call(case)), "reference")
    found = run(make_call(case, device="cuda"), "cuda")
    assert launched
    for name, reference in expected.items():
        assert_close(name, found[name], reference)
    again = run(make_call(case, device="cuda"), "cuda")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("change", "multiprocessors", "taken"),
    [
        (dict(), 8, True),
        (dict(), 13, False),  # too few columns
        (dict(grid=(1, 127)), 8, False),  # too few steps
        (dict(layout="plain"), 8, False),
        (dict(states=8), 8, False),
        (dict(states=9), 8, True),
        (dict(rank=4), 8, False),
        (dict(merge=True, routes=2, batch=1), 8, False),
        (dict(routes=2, batch=1), 8, True),
        (dict(order="forward"), 8, False),
    ],
    ids=str,
)
def test_wave_forward_is_chosen(
    change: dict[str, Any], multiprocessors: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda _: (8, 0))
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: multiprocessors)
    monkeypatch.setattr(nvrtc, "kernel", lambda wanted, _: wanted)
    monkeypatch.setattr(wave_cuda, "is_in_order", lambda call: call.indices is None)
    monkeypatch.setattr(few, "takes_call", lambda *_, **__: False)
    call = make_call(replace(replace(LONG, batch=2, channels=96, grid=(1, 128)), **change))
    plan = wave_cuda.forward(call, call.new_output(), 0)
    assert (plan is not None) == taken
    if plan is not None:
        assert plan.scan.kernel.name == "wave_forward" and plan.scan.grid == 6
    monkeypatch.setattr(gpu, "capability", lambda _: (7, 5))
    assert wave_cuda.forward(call, call.new_output(), 0) is None


def test_columns_share_out_the_device() -> None:
    """As many to a block as leave the fewest multiprocessors waiting for others."""
    found = {count: kernels.wave_forward_columns(128, count, 132) for count in (131, 132, 133, 264, 265, 396, 432, 768)}
    assert found == {131: 0, 132: 1, 133: 2, 264: 2, 265: 3, 396: 3, 432: 2, 768: 3}
