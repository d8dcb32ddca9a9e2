"""The Triton backend: its kernels under the interpreter, its refusals, and on a GPU the sweep over all cases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import BF16, F16, F32, F64, Case, make_call, run
from tests.tolerances import assert_close
from vision_mamba.ops import BackendError, registry
from vision_mamba.ops.backends import triton
from vision_mamba.ops.backends.triton import Tile

HERE = Path(__file__).parent
ALL = cases.options() + cases.shapes() + cases.types() + cases.layouts()
TILES = [(room, forward, triton.BACKWARD[room]) for room, forward in triton.FORWARD.items()]


def gpu() -> torch.device:
    return torch.device(torch.accelerator.current_accelerator().type, 0)


def assert_matches(found: dict[str, Tensor], case: Case) -> None:
    reference = run(cases.double(make_call(case)), "reference")
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert_close(name, found[name], tensor)


def test_kernels_under_the_interpreter() -> None:
    """In a process of its own, since Triton decides at import whether to interpret."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        command, env=environment, cwd=HERE.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert outcome.returncode == 0, outcome.stdout[-8000:]


def test_says_why_it_can_not_run() -> None:
    assert "TRITON_INTERPRET=1" in str(registry.get("triton").unavailable(torch.device("cpu")))
    with pytest.raises(BackendError, match=r"'triton' refuses this call: its tensors are on cpu"):
        run(make_call(Case()), "triton")
    assert "float64" in str(triton.BACKEND.refuses(make_call(Case(dtypes=(F64,) * 4))))
    assert "rank 300, over 256" in str(triton.BACKEND.refuses(make_call(Case(rank=300))))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    triton._unavailable.cache_clear()
    assert "pip install triton" in str(triton._unavailable(torch.device("cuda")))
    triton._unavailable.cache_clear()


@pytest.mark.parametrize("states", [1, 2, 3, 16, 17, 64, 200, 256])
def test_saved_states_follow_the_tile_of_the_backward_pass(states: int) -> None:
    saved = triton.BACKEND.new_saved(make_call(Case(states=states)))
    steps = triton.tile_for(triton.BACKWARD, states).steps
    room = 1 << (states - 1).bit_length()
    assert saved.shape == (2, 2, -(-35 // steps), 20, room) and saved.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_the_reference(case: Case, poisoned: None) -> None:
    assert_matches(run(make_call(case, device=gpu()), "triton"), case)


@pytest.mark.gpu
@pytest.mark.parametrize(("states", "forward", "backward"), TILES, ids=str)
def test_every_tile(states: int, forward: Tile, backward: Tile, poisoned: None) -> None:
    """With more channels than one program takes, and a last block that is not full."""
    channels = 2 * max(forward.channels, backward.channels) + 3
    case = Case(states=states, channels=channels, order="local_2", batch=1, state=True, dtypes=(BF16,) * 4)
    assert_matches(run(make_call(case, device=gpu()), "triton"), case)


@pytest.mark.gpu
@pytest.mark.parametrize("states", [1, 3, 16, 64, 256])
def test_segments(states: int, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """A long route in few sequences, as it comes and uncut."""
    case = Case(grid=(1, 700), batch=1, routes=1, channels=21, states=states, state=True, dtypes=(BF16,) * 4)
    call, tile = make_call(case, device=gpu()), triton.tile_for(triton.BACKWARD, states)
    assert triton._segments(call, tile, tile.steps) == 30
    assert_matches(run(call, "triton"), case)
    monkeypatch.setattr(triton, "_PROGRAMS", 1)
    assert triton._segments(call, tile, tile.steps) == 1
    assert_matches(run(call, "triton"), case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_few_sequences(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Tokens side by side, of sequences that the tiles for few take: steps past the last whole tile, channels too."""
    case = Case(
        grid=(1, 711), batch=2, routes=1, channels=37, states=16, state=True, layout="channels_first",
        dtypes=(dtype,) * 4,
    )  # fmt: skip
    call = make_call(case, device=gpu())
    monkeypatch.setattr(triton, "_WARPS", 16)
    assert triton._tiles(call) == (triton.FEW_FORWARD[16], triton.FEW_BACKWARD[16])
    monkeypatch.setattr(triton, "_PROGRAMS", 1)  # are enough, so routes stay uncut
    assert_matches(run(call, "triton"), case)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "together"), [(F32, 4), (F16, 2), (BF16, 4)], ids=str)
@pytest.mark.parametrize("order", ["cross", "local_2"])
def test_routes_in_turn(
    order: str, dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """One program adds up the routes that it takes, past padding steps too."""
    case = Case(grid=(9, 19), batch=3, states=1, routes=4, channels=70, order=order, dtypes=(dtype,) * 4)
    call = make_call(case, device=gpu())
    monkeypatch.setattr(triton, "_PROGRAMS", 1)
    monkeypatch.setattr(triton, "_SHORT_ROUTE", 1000)
    assert triton._together(call, triton.FORWARD[1], 1, call.new_output()) == together
    assert_matches(run(call, "triton"), case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("rank", [3, 16, 17, 48, 200])
@pytest.mark.parametrize("states", [1, 16])
def test_low_rank(states: int, rank: int, dtype: torch.dtype, poisoned: None) -> None:
    """More channels and tokens than one program multiplies, and a last block of each that is not full."""
    case = Case(grid=(9, 19), states=states, channels=70, rank=rank, order="bidirectional", dtypes=(dtype,) * 4)
    assert_matches(run(make_call(case, device=gpu()), "triton"), case)


@pytest.mark.gpu
def test_decays_close_to_one_over_thousands_of_steps() -> None:
    """An exponential that is wrong by 1e-8 on average shows in the gradient of A."""
    case = Case(grid=(1, 6085), batch=2, routes=1, channels=4, states=16)
    call = make_call(case, device=gpu())
    call = call._replace(A=call.A * 1e-3)
    reference = run(cases.double(call), "reference")
    for name, tensor in run(call, "triton").items():
        assert_close(name, tensor, reference[name])


@pytest.mark.gpu
@pytest.mark.parametrize("states", [1, 16])
def test_bitwise_deterministic(states: int) -> None:
    call = make_call(Case(order="cross", rank=4, states=states, channels=70, batch=3), device=gpu())
    first = run(call, "triton")
    for _ in range(20):
        for name, tensor in run(call, "triton").items():
            assert torch.equal(tensor, first[name]), name
