"""The Triton kernels in numpy, on tiny scans; test_triton.py runs this file under TRITON_INTERPRET=1.

The interpreter takes milliseconds an operation: one case each for the paths through the kernels, with small tiles. The
tiles that a GPU gets, and the sweep over all cases, are tests marked gpu.
"""

from __future__ import annotations

import pytest
import torch

from tests import cases
from tests.cases import F16, F32, Case, make_call, run
from tests.tolerances import assert_close
from vision_mamba.ops import registry
from vision_mamba.ops.backends import triton
from vision_mamba.ops.backends.triton import Product, Tile

TINY = [
    # One state: all options on; padding steps; several blocks of channels.
    Case(grid=(2, 3), batch=1, channels=5, states=1, order="local_2", rank=2, state=True),
    # Several states, of which some are but room, the tile cut short by the last steps; every option off.
    Case(
        grid=(1, 5), channels=3, states=3, batch=1, shared_x=False, merge=False, skip=False, bias=False, softplus=False,
    ),
    # Steps past several tiles, low rank, partial routes, two formats, tokens at stride 1.
    Case(
        grid=(2, 3), batch=1, channels=5, states=2, order="atrous_2", rank=3, state=True, shared_x=False,
        dtypes=(F32, F16, F16, F32), layout="channels_first",
    ),
    # Half precision throughout, two batch items. Not bfloat16, to which the interpreter cuts instead of rounding.
    Case(grid=(1, 3), channels=2, states=1, dtypes=(F16,) * 4, order="bidirectional"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "FORWARD", {1: Tile(2, 2, 2), 256: Tile(2, 1, 2, parts=2, warps=2)})
    monkeypatch.setattr(triton, "BACKWARD", {1: Tile(1, 2, 4), 256: Tile(1, 2, 4, parts=2)})
    monkeypatch.setattr(triton, "LOW_RANK", {256: Product(4, 4)})
    monkeypatch.setattr(triton, "_LEAST_RANK", 2)
    monkeypatch.setattr(triton, "_RANK_INSIDE", 2)  # of the cases above, one goes into the scan and one does not


@pytest.mark.parametrize("case", TINY, ids=str)
def test_matches_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(triton, "_PROGRAMS", 1)  # are enough, so routes of one state are taken in turn
    monkeypatch.setattr(triton, "_CHUNKS", 1)
    found, reference = run(make_call(case), "triton"), run(cases.double(make_call(case)), "reference")
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert_close(name, found[name], tensor)


@pytest.mark.parametrize(("states", "rank", "steps"), [(1, 0, 11), (3, 0, 11), (1, 2, 11)])
def test_segments(states: int, rank: int, steps: int, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """A route in three pieces, of which the last is short, of low rank too."""
    monkeypatch.setattr(triton, "_SHORTEST_SEGMENT", 1)
    call = make_call(Case(grid=(1, steps), batch=1, routes=1, channels=2, states=states, rank=rank, state=True))
    tile = triton.tile_for(triton.BACKWARD, states)
    assert triton._segments(call, tile, tile.steps) == 3
    found, reference = run(call, "triton"), run(cases.double(call), "reference")
    for name, tensor in reference.items():
        assert_close(name, found[name], tensor)


def test_few_sequences(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Tokens side by side, of sequences that the tiles for few take; two saved states a tile of the forward pass."""
    monkeypatch.setattr(triton, "FEW_FORWARD", {256: Tile(1, 2, 4, parts=2)})
    monkeypatch.setattr(triton, "FEW_BACKWARD", {256: Tile(1, 1, 2, parts=2, warps=2)})
    monkeypatch.setattr(triton, "_WARPS", 3)
    monkeypatch.setattr(triton, "FORWARD", {256: Tile(2, 2, 2, parts=2)})
    case = Case(grid=(1, 7), batch=1, routes=1, channels=5, states=3, state=True, layout="channels_first")
    call = make_call(case)
    assert triton._tiles(call) == (triton.FEW_FORWARD[256], triton.FEW_BACKWARD[256])
    found, reference = run(call, "triton"), run(cases.double(call), "reference")
    for name, tensor in reference.items():
        assert_close(name, found[name], tensor)


@pytest.mark.parametrize("raw", [-80.0, -20.0, 80.0])
def test_extreme_step_sizes(raw: float) -> None:
    """softplus(-80) is 1.8e-35, to seven digits: dB, dC and y are proportional to it."""
    call = make_call(Case(grid=(1, 3), batch=1, channels=2, states=2, routes=1, bias=False, skip=False))
    call = call._replace(dt=torch.full_like(call.dt, raw))
    found, reference = run(call, "triton"), run(cases.double(call), "reference")
    for name in ("y", "dx", "dB", "dC", "ddt"):
        assert_close(name, found[name], reference[name])


def test_only_by_name() -> None:
    call = make_call(Case(states=1))
    assert registry.get("triton").unavailable(call.x.device) is None
    assert registry.choose(call, None).name != "triton"
    assert registry.choose(call, "triton").name == "triton"
