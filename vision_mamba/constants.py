"""Tensors that calls share, such as tables of routes: made once, and beside whatever CUDA graph is being made.

What torch allocates while a graph is warmed up or captured belongs to the graph: torch.compile refuses graphs whose
memory others hold on to, and it reuses the memory of an operator's outputs for other things. So a shared tensor is made
in a thread of its own, which no graph gives its memory to; a compiled graph has it as one of its constants, or a copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Constants:
    """Tensors by what decides them; of too many, the oldest are forgotten, but for those that a CUDA graph may read.

    Args:
        make: (device, *key) -> the tensor. Whatever it raises goes to the caller.
        most: how many are kept, besides those of graphs, which nobody tells when a graph is dropped.
    """

    def __init__(self, make: Callable[..., Tensor], most: int = 512) -> None:
        self._make, self._most = make, most
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._of_graphs: dict[tuple[Any, ...], Tensor] = {}

    def get(self, device: torch.device, *key: Any) -> Tensor:
        on_gpu = device.type == "cuda"
        if on_gpu and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        place = (device, *key)
        tensor = self._kept.get(place)
        if tensor is None:
            tensor = self._of_graphs.get(place)
            if tensor is None:
                tensor = _beside_graphs(self._make, device, *key) if on_gpu else self._make(device, *key)
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[place] = tensor
        if on_gpu and capturing():
            self._of_graphs[place] = tensor
        return tensor

    def made(self, device: torch.device, *key: Any) -> Tensor | None:
        """The tensor if it is there; the device has an index if it is a GPU."""
        place = (device, *key)
        return self._kept.get(place, self._of_graphs.get(place))


def capturing() -> bool:
    """Whether what is launched on the current CUDA stream goes into a graph."""
    return torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Let this thread allocate, copy, wait and load code on CUDA devices while any thread, also this, captures a graph.

    Only for what leaves the captured streams alone: CUDA looks no more whether it does.
    """
    try:
        from cuda.bindings import driver
    except ImportError:  # it comes with what compiles the CUDA kernels; without it, nothing is made during a capture
        yield
        return
    torch.cuda.init()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, before = driver.cuThreadExchangeStreamCaptureMode(mode)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def _beside_graphs(make: Callable[..., Tensor], device: torch.device, *key: Any) -> Tensor:
    def made() -> Tensor:
        with relaxed(), torch.cuda.device(device):
            tensor = make(device, *key)
            torch.cuda.current_stream().synchronize()  # other streams read it without waiting
        return tensor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


def copy_of(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A copy that tells what it is one of, so that nobody has to read it: see `original`."""
    with torch.inference_mode(False):
        copy = tensor.to(device or tensor.device, copy=True)
    if not tensor.is_inference():  # of which nobody knows whether it was written into
        copy.copy_of = tensor, tensor._version  # type: ignore[attr-defined]
    return copy


def original(tensor: Tensor) -> Tensor:
    """The shared tensor that one is a copy of, if nothing was written into either since, else the tensor itself."""
    if tensor.is_inference() or tensor._version:
        return tensor
    source, version = getattr(tensor, "copy_of", (tensor, 0))
    return source if source._version == version else tensor
