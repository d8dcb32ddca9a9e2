"""Launches of compiled kernels: what is laid out once, and what each call fills in."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from vision_mamba.ops.backends import nvrtc
from vision_mamba.ops.backends.launch import Launch, maker, room_for, slots
from vision_mamba.ops.operator import _aligned

HEADER = "params.cuh"


class Recorder(NamedTuple):
    """Stands for a kernel: notes with what it would be launched."""

    launched: list[tuple[int, list[int]]]
    meanwhile: list[Callable[[], None]]  # what happens, once, while a launch is under way

    def bound(self, grid: int, params: array[int], threads: int, more_shared: int) -> Any:
        recorder = self

        class Bound(NamedTuple):
            params: array[int]

            def launch(self, stream: int) -> None:
                if recorder.meanwhile:
                    recorder.meanwhile.pop()()
                recorder.launched.append((stream, self.params.tolist()))

        return Bound(params)


def test_addresses_go_to_their_fields_and_launches_at_once_do_not_mix() -> None:
    kernel = Recorder([], [])
    template = array("q", [7] * len(slots(HEADER)))
    start = Launch(kernel, 1, HEADER, template).ready(["x", "y"])  # type: ignore[arg-type]

    def expected(x: int, y: int) -> list[int]:
        return [{slots(HEADER)["x"]: x, slots(HEADER)["y"]: y}.get(place, 7) for place in range(len(template))]

    start(5, [1, 2])
    assert kernel.launched.pop() == (5, expected(1, 2))
    kernel.meanwhile.append(lambda: start(6, [3, 4, 9]))  # more addresses than names: the last is for somebody else
    start(5, [1, 2])
    assert kernel.launched == [(6, expected(3, 4)), (5, expected(1, 2))]
    assert set(template) == {7}


def test_what_a_call_does_not_give_is_absent_whatever_others_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5 + device, raising=False)
    kernel = Recorder([], [])
    launch = Launch(kernel, 1, HEADER, array("q", [0] * len(slots(HEADER))))  # type: ignore[arg-type]
    tensors = {name: torch.empty(1) for name in ("x", "dt", "y")}
    for given in (("x", "y"), ("y", "dt", "x"), ("x", "y"), ("y",), ()):
        launch(0, **{name: tensors[name] if name in given else None for name in tensors})
        stream, values = kernel.launched.pop()
        places = {slots(HEADER)[name]: tensors[name].data_ptr() for name in given}
        assert stream == 5 and values == [places.get(place, 0) for place in range(len(values))]


def _bound(*statuses: int) -> nvrtc.Bound:
    left = list(statuses)
    return nvrtc.Bound(array("q", [0]), ctypes.c_void_p(), lambda: left.pop(0), (0, 3, 1, 1, 64, 1, 1, 100, 0, 0, None))


def test_a_thread_without_a_context_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(nvrtc, "_use_context", asked.append)
    bound = _bound(201, 0)  # CUDA_ERROR_INVALID_CONTEXT
    bound.launch(11)
    assert asked == [1] and bound.queue.value == 11


def test_a_failed_launch_names_its_reason() -> None:
    with pytest.raises(RuntimeError, match=r"3 blocks of 64 threads and 100 bytes .*: CUDA_ERROR_INVALID_VALUE"):
        _bound(1).launch(0)


@pytest.mark.parametrize(
    "wanted",
    [torch.empty(2, 3, 4), torch.empty(4, 3, 2).transpose(0, 2), torch.empty(0)],
    ids=["contiguous", "transposed", "empty"],
)
def test_results_are_made_from_sizes_without_memory(wanted: torch.Tensor) -> None:
    """Memory that a plan kept could be a graph's."""
    make: Any = maker(wanted)
    made = make()
    assert (made.shape, made.stride(), made.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    (template,) = make.args
    assert template.untyped_storage().nbytes() == 0 and template.device == wanted.device
    made.fill_(1)


def test_what_is_between_has_room_side_by_side() -> None:
    tensors = [torch.empty(3, 100), torch.empty(0), torch.empty(1, dtype=torch.bfloat16), torch.empty(1024)]
    (room,), begins = room_for(tensors)()
    assert [begin - room.data_ptr() for begin in begins] == [0, 1536, 1536, 2048] and room.shape == (2048 + 4096,)
    assert room_for([])() == ([], [])


def test_parts_of_a_result_begin_where_tensors_of_their_own_do() -> None:
    """Inductor's code relies on it."""
    whole = torch.arange(12.0)
    assert _aligned(whole[4:]).data_ptr() == whole[4:].data_ptr()
    for start in (1, 2, 3):
        part = _aligned(whole[start:])
        assert part.storage_offset() == 0 and torch.equal(part, whole[start:])
