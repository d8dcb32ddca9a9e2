"""Calls seen before: which are taken for one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import BF16, F16, F32, Case, make_call
from vision_mamba.ops import autograd, contract, use_backend
from vision_mamba.ops import known as known_calls
from vision_mamba.ops.backends import cuda
from vision_mamba.ops.known import Known

X, Y, A = torch.randn(2, 3), torch.randn(2, 3), torch.rand(4, 5)
CALL = (X, Y, A, None, True)


def run(addresses: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(addresses), X, Y


@pytest.fixture
def known() -> Known:
    known = Known(4, 3)
    known.add(run, "cuda", CALL, "more")
    return known


def test_the_same_kind_of_call_is_found(known: Known) -> None:
    other = X + 1
    found = known.find((other, *CALL[1:]), "more")
    assert found is not None and found[0].run is run and found[0].backend == "cuda"
    assert found[1] == [t.data_ptr() for t in (other, Y, A)]
    with torch.no_grad():
        assert known.find(CALL, "more") is not None


@pytest.mark.parametrize(
    "other",
    [
        (X.double(), Y, A, None, True),
        (torch.randn(2, 6)[:, ::2], Y, A, None, True),
        (X.to("meta"), Y, A, None, True),
        (torch.nn.Parameter(X), Y, A, None, True),
        (torch._neg_view(X), Y, A, None, True),
        (torch.randn(7)[1:].view(2, 3), Y, A, None, True),  # begins elsewhere
        (X, X, A, None, True),  # one tensor twice, at which torch's test stops
        (X, Y, A, A.clone(), True),
        (X, Y, A, None, False),
        (X, Y, A),
    ],
    ids=["type", "strides", "device", "class", "negation", "alignment", "twice", "tensor", "flag", "count"],
)
def test_another_is_not(known: Known, other: tuple) -> None:
    assert known.find(other, "more") is None


def test_tensors_may_begin_anywhere_at_the_same_offset() -> None:
    part, other, aligned = (torch.randn(9)[start : start + 6].view(2, 3) for start in (1, 1, 0))
    known = Known(4, 3)
    known.add(run, "cuda", (part, *CALL[1:]))
    assert known.find((other, *CALL[1:])) is not None and known.find((aligned, *CALL[1:])) is None


def test_what_else_decides(known: Known) -> None:
    assert known.find(CALL, "less") is None
    with use_backend("eager"):
        assert known.find(CALL, "more") is None
    with torch.inference_mode():
        assert known.find((torch.randn(2, 3), *CALL[1:]), "more") is None


@pytest.mark.parametrize("steps", [3, 35])
def test_a_table_is_read_before_a_call_is_taken_for_another(steps: int) -> None:
    call = make_call(Case(order="cross"))
    table = torch.arange(steps, dtype=torch.int32).repeat(call.routes, 1)
    assert autograd.operator._covered((*call._replace(indices=table), None)) == (steps == call.tokens)
    table = table.clone()
    table[1, 2] = call.tokens
    with pytest.raises(ValueError, match=r"indices must be -1 .*route 1, step 2"):
        autograd.operator._covered((*call._replace(indices=table), None))


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "_MOST", 3)
    known = Known(4, 3)
    for flag in range(5):
        known.add(run, "cuda", (*CALL[:4], flag))
    assert [known.find((*CALL[:4], flag)) is not None for flag in range(5)] == [False, False, True, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(order="cross", states=1, channels=64, rank=4, dtypes=(BF16,) * 4),
        Case(order="cross", states=1, channels=20, dtypes=(F16,) * 4, out_dtype=F32),
        Case(order="local_2", states=16, channels=24, state=True),  # with padding steps
        Case(grid=(1, 900), routes=1, batch=1, states=16, channels=32, dtypes=(BF16,) * 4),  # in segments
        Case(order="bidirectional", states=3, shared_x=False, layout="channels_first"),
        Case(routes=2, states=16, shared_x=False, merge=False),
    ],
    ids=str,
)
def test_a_call_run_again_gives_what_it_gives_anew(case: Case) -> None:
    call = make_call(case, device="cuda")
    other = call._replace(x=0.5 * call.x, dt=call.dt + 1)
    scan, known = torch.ops.vision_mamba.cross_selective_scan, autograd.operator.known
    with torch.no_grad():
        known.clear()
        scan(*call, "cuda")
        assert known.find((*call, "cuda"), False, contract.visits_all(call)) is not None
        again = scan(*other, "cuda")
        known.clear()
        cuda._forward_plans.clear()
        anew = scan(*other, "cuda")
    for a, b in zip(again, anew, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
