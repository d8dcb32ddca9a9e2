"""Launches of compiled CUDA kernels: what a shape decides is computed once, addresses are filled in for each call."""

from __future__ import annotations

import contextlib
import functools
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vision_mamba.ops.backends import nvrtc

#: Launches a kernel on a stream, given the addresses of its tensors in an order that was agreed on.
Start = Callable[[int, Iterable[int]], None]


class Plans(dict[Any, Any]):
    """Plans by what decides them; of too many, the oldest are forgotten."""

    MOST = 1024

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self.MOST and key not in self:
            del self[next(iter(self))]
        super().__setitem__(key, value)


@functools.cache
def slots(header: str) -> dict[str, int]:
    """Where the fields stand in the struct that a header of csrc/cuda defines, the one argument of some kernels."""
    return {name: place for place, name in enumerate(nvrtc.field_names(header))}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with all that a shape decides; the addresses are filled in for each call."""

    kernel: nvrtc.Kernel
    grid: int
    header: str
    template: array[int]
    threads: int = 0
    more_shared: int = 0
    #: By the names of the tensors that a call gives: what starts it.
    starts: dict[tuple[str, ...], Start] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        wanted: nvrtc.Specialisation,
        device: int,
        grid: int,
        header: str,
        fields: dict[str, int],
        threads: int = 0,
        more_shared: int = 0,
    ) -> Launch:
        """Compile or load a kernel, and fill in its struct; 0 where no field is given."""
        values = array("q", [fields.get(name, 0) for name in slots(header)])
        return cls(nvrtc.kernel(wanted, device), grid, header, values, threads, more_shared)

    def ready(self, names: Sequence[str]) -> Start:
        """A function of a stream and of the addresses of tensors of these names, in this order; others are absent."""
        places = [slots(self.header)[name] for name in names]
        idle: list[nvrtc.Bound] = []  # one for each of the threads that are launching it at the same time

        def start(stream: int, addresses: Iterable[int]) -> None:
            try:
                bound = idle.pop()
            except IndexError:
                bound = self.kernel.bound(self.grid, self.template[:], self.threads, self.more_shared)
            params = bound.params
            for place, address in zip(places, addresses):  # noqa: B905 (as many, and asking for it takes time)
                params[place] = address
            bound.launch(stream)
            idle.append(bound)

        return start

    def __call__(self, device: int, **addresses: Tensor | None) -> None:
        given = {name: tensor.data_ptr() for name, tensor in addresses.items() if tensor is not None}
        names = tuple(given)
        start = self.starts.get(names)
        if start is None:
            start = self.starts[names] = self.ready(names)
        start(torch._C._cuda_getCurrentRawStream(device), given.values())  # the public function makes an object


def maker(wanted: Tensor) -> Callable[[], Tensor]:
    """A function that makes uninitialised tensors like the given one, which is dense.

    Sizes come from a template, which is faster than from Python; not on the meta device, whose operators are Python.
    It has no memory: what a plan kept could belong to a graph that torch.compile was recording when the plan was made,
    and torch refuses graphs with such tenants.
    """
    template = torch.empty(0, dtype=wanted.dtype, device=wanted.device)
    template.set_(template.untyped_storage(), 0, wanted.shape, wanted.stride())
    template.untyped_storage().resize_(0)
    return functools.partial(torch.empty_like, template)


def room_for(tensors: list[Tensor]) -> Callable[[], tuple[list[Tensor], list[int]]]:
    """A function that makes room for tensors like these, of what holds it, and of where each begins.

    What a call needs in between and gives to nobody takes one allocation so, not several.
    """
    if not tensors:
        return lambda: ([], [])
    sizes = [-(-tensor.numel() * tensor.element_size() // _BLOCK) * _BLOCK for tensor in tensors]
    places = [sum(sizes[:i]) for i in range(len(sizes))]
    make = maker(torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device))

    def new() -> tuple[list[Tensor], list[int]]:
        room = make()
        begin = room.data_ptr()
        return [room], [begin + place for place in places]

    return new


def is_whole(parameter: Tensor) -> bool:
    """Whether kernels can read a parameter as it is, some by 16 bytes at a time."""
    return parameter.dtype == torch.float32 and parameter.is_contiguous() and parameter.data_ptr() % 16 == 0


def whole(parameter: Tensor) -> Tensor:
    """A parameter as kernels take it; one may be a part of a longer tensor, and begin anywhere in it."""
    if is_whole(parameter):
        return parameter
    return parameter.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


_BLOCK = 512  # bytes: what torch's own allocations begin at multiples of


def on(device: int) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one, if it is not."""
    if device == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
