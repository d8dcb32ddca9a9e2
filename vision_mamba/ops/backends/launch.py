"""Launches of compiled CUDA kernels: what a shape decides is computed once, addresses are filled in for each call."""

from __future__ import annotations

import contextlib
import functools
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops.backends import nvrtc


@functools.cache
def slots(header: str) -> dict[str, int]:
    """Where the fields stand in the struct that a header of csrc/cuda defines, the one argument of some kernels."""
    return {name: place for place, name in enumerate(nvrtc.field_names(header))}


class Launch(NamedTuple):
    """A kernel with all that a shape decides; the addresses are filled in for each call."""

    kernel: nvrtc.Kernel
    grid: int
    header: str
    template: array[int]
    threads: int = 0
    more_shared: int = 0

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

    def __call__(self, device: int, **addresses: Tensor | None) -> None:
        params, places = self.template[:], slots(self.header)
        for name, tensor in addresses.items():
            if tensor is not None:
                params[places[name]] = tensor.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(device)  # the public function makes an object each time
        self.kernel.launch(self.grid, params, stream, self.threads, self.more_shared)


def on(device: int) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one, if it is not."""
    if device == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
