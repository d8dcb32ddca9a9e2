"""Tensors that calls share: how long they are kept, and beside what they are made."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.cases import Case, make_call
from vision_mamba import constants, scans
from vision_mamba.constants import Constants, copy_of, original
from vision_mamba.ops import contract

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def _make(device: torch.device, size: int) -> Tensor:
    assert device in (CPU, GPU)
    return torch.arange(size)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As though there were a GPU, whose stream is captured while `.capturing` is true."""
    state = SimpleNamespace(capturing=False)
    nothing = contextlib.nullcontext
    monkeypatch.setattr(constants, "capturing", lambda: state.capturing)
    monkeypatch.setattr(constants, "relaxed", nothing)
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    return state


def test_the_oldest_are_forgotten() -> None:
    tables = Constants(_make, most=2)
    first, second = tables.get(CPU, 1), tables.get(CPU, 2)
    assert tables.get(CPU, 1) is first
    tables.get(CPU, 3)
    assert tables.get(CPU, 2) is second and tables.get(CPU, 1) is not first


def test_what_a_graph_reads_is_never_forgotten(gpu: SimpleNamespace) -> None:
    tables = Constants(_make, most=2)
    before = tables.get(GPU, 1)
    gpu.capturing = True
    during = tables.get(GPU, 2)
    assert tables.get(GPU, 1) is before
    gpu.capturing = False
    others = [tables.get(GPU, size) for size in range(3, 9)]
    assert tables.get(GPU, 1) is before and tables.get(torch.device("cuda"), 2) is during
    assert tables.get(GPU, 3) is not others[0]


def test_they_are_made_beside_what_the_thread_does(gpu: SimpleNamespace) -> None:
    """Graphs get what their thread allocates; modes of this thread would change what is made."""
    threads = []

    def make(device: torch.device) -> Tensor:
        threads.append(threading.get_ident())
        return torch.ones(2)

    with torch.device("meta"), torch.inference_mode():
        made = Constants(make).get(GPU)
    assert threads != [threading.get_ident()] and made.device == CPU and not made.is_inference()


def test_errors_reach_the_caller(gpu: SimpleNamespace) -> None:
    def make(device: torch.device) -> Tensor:
        raise ValueError("no such table")

    with pytest.raises(ValueError, match="no such table"):
        Constants(make).get(GPU)


def test_copies_are_known_without_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(Case(order="cross"))
    assert call.indices is not None and contract.visits_all(call)
    copy = copy_of(copy_of(call.indices))
    with monkeypatch.context() as patch:
        patch.setattr(contract, "_read_table", lambda *_: pytest.fail("read again"))
        assert contract.visits_all(call._replace(indices=copy))
    copy[0, 0] = -1  # one that something was written into is not known
    assert original(copy) is copy and not contract.visits_all(call._replace(indices=copy))


def test_what_was_written_later_is_not_of_a_copy() -> None:
    table = torch.tensor([[0, 1, -1]], dtype=torch.int32)
    copy = copy_of(table)
    assert original(copy) is table
    table[0, 2] = 2
    assert original(copy) is copy
    assert contract.covers("here", table, 3) and not contract.covers("here", copy, 3)
    assert original(copy_of(table)) is table


def test_the_operators_give_a_new_tensor_unless_asked_for_the_shared_one() -> None:
    """Compilers use the memory of an operator's outputs again."""
    like, order = torch.zeros(1), scans.get("cross")
    for operator, shared in (
        (torch.ops.vision_mamba.scan_indices, order.indices(2, 3)),
        (torch.ops.vision_mamba.scan_visits, order.visits(2, 3)),
    ):
        new = operator(like, "cross", 2, 3)
        assert new.data_ptr() != shared.data_ptr() and torch.equal(new, shared)
        assert operator(like, "cross", 2, 3, shared=True).data_ptr() == shared.data_ptr()
