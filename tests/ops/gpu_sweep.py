"""A small sweep of scans on a GPU, in a process of its own: a bad access ends the process that made it.

python tests/ops/gpu_sweep.py cuda after     # every buffer ends where a page that is not mapped begins
python tests/ops/gpu_sweep.py triton before  # ... begins where one ends
compute-sanitizer --tool racecheck python tests/ops/gpu_sweep.py cuda
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cases import BF16, F16, Case, double, make_call, run
from tests.tolerances import assert_close
from vision_mamba.ops import autograd, registry
from vision_mamba.ops.backends import backward_cuda, forward_cuda
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.call import GRADIENTS, ScanCall

#: Channels and lengths that fill no tile, with each thing that a kernel may read or write.
CASES = [
    Case(states=states, channels=channels, rank=rank, order=order, dtypes=(dtype,) * 4, batch=1, state=state, **flags)
    for states in (1, 3, 16, 64)
    for channels, rank, order, dtype, state, flags in (
        (33, 5, "local_2", BF16, True, {}),
        (64, 0, "cross", BF16, False, {}),
        (48, 6, "cross", F16, False, {}),
        (20, 0, None, torch.float32, True, dict(shared_x=False, merge=False)),
    )
] + [  # sequences enough that a lane takes one for itself
    Case(states=1, channels=512, batch=12, order="cross", rank=rank, dtypes=(BF16,) * 4, state=True) for rank in (0, 6)
]
PAGE = 2**21


class _Memory:
    """Bytes of a GPU between two holes in its address space, as an array for torch."""

    def __init__(self, size: int, place: str) -> None:
        from cuda.bindings import driver

        def ask(function: Any, *arguments: Any) -> Any:
            status, *values = function(*arguments)
            assert not int(status), (function.__name__, status)
            return values[0] if values else None

        room = -(-max(size, 16) // PAGE) * PAGE
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access = driver.CUmemAccessDesc()
        access.location = properties.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        start = int(ask(driver.cuMemAddressReserve, room + 2 * PAGE, 0, 0, 0)) + PAGE
        memory = ask(driver.cuMemCreate, room, properties, 0)
        ask(driver.cuMemMap, start, room, 0, memory, 0)
        ask(driver.cuMemSetAccess, start, room, [access], 1)
        self.rest = (start, room, memory)
        # Allocations start at a multiple of 16 bytes, which is what kernels may rely on.
        address = start if place == "before" else start + room - -(-size // 16) * 16
        self.__cuda_array_interface__ = dict(shape=(size,), typestr="|u1", data=(address, False), version=3)


def guarded(like: Tensor, place: str) -> Tensor:
    """A copy of a dense tensor between holes, with the same strides."""
    size = like.numel() * like.element_size()
    if not size:
        return like
    memory = _Memory(size, place)
    _kept.append(memory)  # for good: a small sweep needs little, and a late access must not find it reused
    flat = torch.as_tensor(memory, device=like.device).view(like.dtype)
    return flat.as_strided(like.shape, like.stride()).copy_(like)


_kept: list[_Memory] = []


class _Guarded(TorchDispatchMode):
    """Tensors that a backend allocates lie between holes too, and start as NaN."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.count = place, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in ("empty", "empty_like", "empty_strided", "new_empty"):
            return found
        if found.device.type != "cuda" or not found.numel():
            return found
        self.count += 1
        return guarded(found.fill_(float("nan")) if found.is_floating_point() else found, self.place)


def _apart(tensors: list[Tensor]) -> Callable[[], tuple[list[Tensor], list[int]]]:
    """In the place of `launch.room_for`: holes between what is otherwise one allocation, too."""

    def new() -> tuple[list[Tensor], list[int]]:
        made = [torch.empty_like(tensor) for tensor in tensors]
        return made, [tensor.data_ptr() for tensor in made]

    return new


def check(case: Case, backend: str, place: str) -> None:
    """One forward and backward pass of a backend with nothing but guarded buffers, against float64."""
    call = make_call(case, device="cuda")
    reference = run(double(call), "reference")
    call = ScanCall(*(guarded(value, place) if isinstance(value, Tensor) else value for value in call))
    implementation = registry.get(backend)
    generator = torch.Generator().manual_seed(1)
    expected = [reference[name] for name in ("y", "last_state") if name in reference]
    seeds = [torch.randn(o.shape, generator=generator).bfloat16().cuda() for o in expected]
    dy = guarded(seeds[0].to(call.y_dtype), place)
    dlast = guarded(seeds[1].float(), place) if case.state else None
    implementation.forward(call, True)  # makes the plan, whose templates have no memory and are no buffers
    with _Guarded(place) as mode:
        y, last, saved = implementation.forward(call, True)
        assert implementation.backward is not None
        gradients = implementation.backward(call, saved, dy, dlast)
    assert mode.count >= 5, "the backend's buffers were not guarded"
    torch.cuda.synchronize()
    found = dict(zip((f"d{name}" for name in GRADIENTS), gradients, strict=True)) | dict(y=y, last_state=last)
    for name, tensor in reference.items():
        assert_close(name, found[name], tensor)


def main(backend: str, place: str | None = None) -> None:
    torch.zeros(1, device="cuda")  # makes torch's context current for the driver's calls
    forward_cuda.room_for = _apart
    # What is few, and the same as if it were many.
    for takes in (few.takes_call, lambda *_, **__: False) if backend == "cuda" else (few.takes_call,):
        few.takes_call = takes
        for known in (forward_cuda.runners, backward_cuda.plans, autograd.operator.known):
            known.clear()
        for case in CASES:
            sys.stderr.write(f"{case}\n")  # the last one written is the one that failed
            if place:
                check(case, backend, place)
                continue
            call = make_call(case, device="cuda")
            found = run(call, backend)
            for name, tensor in run(double(call), "reference").items():
                assert_close(name, found[name], tensor)
    sys.stdout.write(f"{len(CASES)} cases\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
