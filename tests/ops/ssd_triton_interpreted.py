"""The Triton kernels of the state-space dual scan in numpy, on small scans; test_ssd_triton.py runs this file.

The interpreter takes milliseconds an operation: one case each for the paths through the kernels, in small chunks. The
tiles that a GPU gets, and the sweep over all cases, are tests marked gpu.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops import ssd_cases
from tests.ops.ssd_cases import F16, F32, SsdCase, make_call, run
from tests.tolerances import RELATIVE_RMS, assert_close, relative_rms
from vision_mamba.ops.backends import ssd_triton, ssd_triton_backward
from vision_mamba.ops.backends.ssd_triton import Tile
from vision_mamba.ops.ssd_operator import registry

SMALL = [
    # Several chunks and blocks of channels, both ways, an initial state.
    SsdCase(grid=(1, 37), batch=1, channels=20, heads=2, groups=1, routes=2, descending=1, state=True),
    # Tokens in groups, a table with padding steps, every other option.
    SsdCase(grid=(3, 5), batch=1, order="local_2", state=True, skip="channels", limits=(0.3, 1.0), merge=False),
    # Routes that leave tokens out, their sum, each its own x; options off.
    SsdCase(grid=(3, 6), batch=1, heads=1, groups=1, order="atrous_2", shared_x=False, skip=None, bias=False,
            softplus=False),
    # Half precision, one chunk. Not bfloat16, to which the interpreter cuts instead of rounding.
    SsdCase(grid=(1, 13), channels=16, states=16, heads=2, groups=2, dtypes=(F16,) * 4),
    SsdCase(grid=(1, 9), batch=1, heads=2, groups=1, dtypes=(F16, F32, F16, F16), layout="channels_first",
            out_dtype=F32),
    # Without an order.
    SsdCase(grid=(1, 21), causal=False, heads=2, groups=1, state=True, limits=(0.3, 1.0)),
    SsdCase(grid=(2, 6), causal=False, batch=1, order="atrous_2", skip="channels"),
    SsdCase(grid=(1, 1), state=True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for tables in (ssd_triton.FORWARD, ssd_triton.BACKWARD):
        monkeypatch.setitem(tables, 16, {(256, 128): Tile(16, 16)})
        monkeypatch.setitem(tables, 32, {(256, 128): Tile(16, 16)})
    ssd_triton._plan.cache_clear()


def assert_matches(case: SsdCase) -> None:
    """To the bound of the type of the factors, or of the result where that is coarser."""
    call = make_call(case)
    factors = F32 if F32 in (call.x.dtype, call.B.dtype, call.C.dtype) else F16
    found, reference = run(call, "triton"), run(ssd_cases.double(call), "reference")
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        bound = max(RELATIVE_RMS[factors], RELATIVE_RMS[found[name].dtype])
        assert relative_rms(found[name], tensor) <= bound, name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_reference(case: SsdCase, poisoned: None) -> None:
    assert_matches(case)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("steps", [65, 97])
def test_segments(causal: bool, steps: int, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Few sequences on many processors: the route is cut, and the heads of a group are shared out."""
    for module in (ssd_triton, ssd_triton_backward):
        monkeypatch.setattr(module, "_processors", lambda device: 4)
    monkeypatch.setattr(ssd_triton, "_SEGMENT", 1)
    assert_matches(SsdCase(grid=(1, steps), batch=1, heads=2, groups=1, channels=3, state=True, causal=causal))


def test_the_rounding_of_states_does_not_add_up() -> None:
    """Summed over all steps, an error of 2^-12 of each state comes to more than that of a half-precision result."""
    call = make_call(SsdCase(grid=(1, 40), batch=1, heads=2, groups=1, channels=16, states=16, dtypes=(F16,) * 4))
    call = call._replace(dt=call.dt - 4)
    found, reference = run(call, "triton"), run(ssd_cases.double(call), "reference")
    for name in ("dA", "dD", "ddt_bias"):
        assert relative_rms(found[name], reference[name]) <= 1e-5, name


@pytest.mark.parametrize("seed", [0, 7])
def test_gradients_of_rates_sum_no_terms_that_cancel(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strong decays in a long chunk: as running sums of rows less columns dA would err by more than 1e-5."""
    monkeypatch.setitem(ssd_triton.BACKWARD, 32, {(256, 128): Tile(64, 16)})
    ssd_triton._plan.cache_clear()
    call = make_call(SsdCase(grid=(1, 64), batch=1, heads=1, groups=1, channels=1, states=1), seed)
    call = call._replace(A=torch.full_like(call.A, -4.0))
    found, reference = run(call, "triton"), run(ssd_cases.double(call), "reference")
    assert relative_rms(found["dA"], reference["dA"]) <= 2e-6


@pytest.mark.parametrize("skip", ["heads", "channels"])
def test_wide_heads_in_parts(skip: str, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(ssd_triton, "_MAX_CHANNELS", 4)
    types = (F16,) * 4 if skip == "heads" else (F32,) * 4
    assert_matches(SsdCase(grid=(1, 18), channels=9, heads=2, groups=2, state=True, skip=skip, dtypes=types))


def test_only_by_name() -> None:
    call = make_call(SsdCase())
    assert registry.get("triton").unavailable(call.x.device) is None
    assert registry.choose(call, None).name != "triton" and registry.choose(call, "triton").name == "triton"


def test_strong_decays_keep_their_digits() -> None:
    call = make_call(SsdCase(grid=(1, 16), batch=1, heads=2, groups=1, softplus=False, bias=False, skip=None))
    dt = torch.full_like(call.dt, 100.0)
    dt[:, ::2] = 1e-2
    call = call._replace(dt=dt, A=torch.full_like(call.A, -8.0))
    found, reference = run(call, "triton"), run(ssd_cases.double(call), "reference")
    for name, tensor in reference.items():
        assert_close(name, found[name], tensor)
