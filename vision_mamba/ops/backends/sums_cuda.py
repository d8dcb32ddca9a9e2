"""Partial results that kernels leave, added up for several gradients in one launch of csrc/cuda/sums.cuh."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops.backends import nvrtc
from vision_mamba.ops.backends.launch import on

_FIELDS = 14  # of a job, two of which are addresses
_NEIGHBOURS, _WARPS = 32, 8  # of a block

#: Of as many results as models ask for at once: compiled for every architecture by the tests.
SHIPPED = tuple(nvrtc.Specialisation("sums", (("JOBS", str(jobs)),)) for jobs in (1, 5))


class Parts(NamedTuple):
    """A gradient that is still to be added up over its first axis."""

    of: Tensor


Summed = Tensor | Parts | None


@functools.lru_cache(1024)
def _plan(layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...], device: int) -> tuple[nvrtc.Kernel, int, array[int]]:
    """The kernel, its grid, and its argument but for addresses."""
    values, grid = array("q"), 0
    for shape, strides in layouts:
        tiles, job = _job(shape, strides)
        values.extend([0, 0, shape[0], strides[0], *job, grid, tiles])
        grid += tiles if shape[0] > 1 else -(-tiles // _WARPS)
    wanted = nvrtc.Specialisation("sums", (("JOBS", str(len(layouts))),))
    return nvrtc.kernel(wanted, device), grid, values


def _job(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, list[int]]:
    """Tiles, and n1, n2, s0, s1, s2, d0, d1, d2 of csrc/cuda/sums.cuh: what lies closest in memory comes last."""
    axes = [axis for axis in range(1, len(shape)) if shape[axis] > 1]
    axes.sort(key=lambda axis: -strides[axis])
    places = {axis: 1 for axis in axes}
    for axis in axes:
        for other in range(axis + 1, len(shape)):
            places[axis] *= shape[other]
    sizes, steps, targets = ([of[axis] for axis in axes] for of in (shape, strides, places))
    missing = 3 - len(axes)
    assert missing >= 0, (shape, strides)
    n0, n1, n2 = [1] * missing + sizes
    return n0 * n1 * -(-n2 // _NEIGHBOURS), [n1, n2, *[0] * missing, *steps, *[0] * missing, *targets]


def sum_parts(given: list[Tensor]) -> list[Tensor]:
    """The sums of float32 tensors (P, ...) over P, each in one piece."""
    device = given[0].device.index
    found = [part.new_empty(part.shape[1:]) for part in given]
    with on(device):
        kernel, grid, template = _plan(tuple([(part.shape, part.stride()) for part in given]), device)
        values = template[:]
        for i, (part, result) in enumerate(zip(given, found, strict=True)):
            values[_FIELDS * i], values[_FIELDS * i + 1] = part.data_ptr(), result.data_ptr()
        kernel.bound(grid, values).launch(torch._C._cuda_getCurrentRawStream(device))
    return found


def finished(gradients: Sequence[Summed], parameters: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients in the types of their parameters; those in parts are added up, all in one launch."""
    in_parts = [gradient.of for gradient in gradients if isinstance(gradient, Parts)]
    sums = iter(sum_parts(in_parts) if in_parts else ())
    whole = [next(sums) if isinstance(gradient, Parts) else gradient for gradient in gradients]
    return tuple(
        None if gradient is None or parameter is None else gradient.to(parameter.dtype)
        for gradient, parameter in zip(whole, parameters, strict=True)
    )
