"""Calls seen before: which are taken for one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vision_mamba.ops import known as known_calls
from vision_mamba.ops import use_backend
from vision_mamba.ops.known import Known

X, Y, A = torch.randn(2, 3), torch.randn(2, 3), torch.rand(4, 5)


def run(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tensors[0], tensors[1], tensors[2]


@pytest.fixture
def known() -> Known:
    known = Known()
    known.add(run, (X, Y, A, None, True), "more")
    return known


def test_the_same_kind_of_call_is_found(known: Known) -> None:
    found = known.find((X + 1, Y, A, None, True), "more")
    assert found is not None and found[0] is run and len(found[1]) == 3
    with torch.no_grad():
        assert known.find((X, Y, A, None, True), "more") is not None


@pytest.mark.parametrize(
    "other",
    [
        (X.double(), Y, A, None, True),
        (torch.randn(2, 6)[:, ::2], Y, A, None, True),
        (X.to("meta"), Y, A, None, True),
        (torch.nn.Parameter(X), Y, A, None, True),
        (torch._neg_view(X), Y, A, None, True),
        (torch.randn(7)[1:].view(2, 3), Y, A, None, True),  # begins elsewhere
        (X, Y, A, A.clone(), True),
        (X, Y, A, None, False),
        (X, Y, A),
        (X, X, A, None, True),  # one tensor twice, at which torch's test stops
    ],
    ids=["type", "strides", "device", "class", "negation", "alignment", "tensor", "flag", "count", "twice"],
)
def test_another_is_not(known: Known, other: tuple) -> None:
    assert known.find(other, "more") is None


def test_what_else_decides(known: Known) -> None:
    call = (X, Y, A, None, True)
    assert known.find(call, "less") is None
    with use_backend("eager"):
        assert known.find(call, "more") is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), torch.inference_mode():
        assert known.find((torch.randn(2, 3), Y, A, None, True), "more") is None


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "_MOST", 3)
    known = Known()
    for flag in range(5):
        known.add(run, (X, Y, A, flag))
    assert [known.find((X, Y, A, flag)) is not None for flag in range(5)] == [False, False, True, True, True]
