"""Calls seen before: what their shapes decide is decided once, and what is left is to launch kernels.

Looking at nine tensors from Python costs more than a launch does. torch.compile guards its graphs by a test in C++ that
compares type, device, dispatch keys, sizes and strides of many tensors at once; the same test tells here whether a call
is one that was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._dynamo import guards

from vision_mamba.ops.registry import forced

_TensorGuards: Any = getattr(guards, "TensorGuards", None)  # private: without it every call is looked at anew

#: Runs a known call again, given its tensors in the order of its arguments.
Run = Callable[[list[Tensor]], tuple[Tensor, Tensor, Tensor]]

_ALIGNMENT = 16  # bytes, of where every tensor of a known call begins: as far as kernels ask
_MOST = 1024


class _Seen(NamedTuple):
    same: Any  # .check(*tensors): whether they are like those that it was made of
    run: Run


class Known:
    """What was seen of one operator's calls on GPUs; of too many, the oldest are forgotten."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], list[_Seen]] = {}

    def find(self, arguments: tuple[Any, ...], *more: Any) -> tuple[Run, list[Tensor]] | None:
        """How to run a call, and on which tensors, if one like it was added with as much `more`."""
        key, tensors = _key(arguments, more)
        for seen in self._seen.get(key, ()):
            if seen.same.check(*tensors):
                return (seen.run, tensors) if _aligned(tensors) else None
        return None

    def add(self, run: Run, arguments: tuple[Any, ...], *more: Any) -> None:
        key, tensors = _key(arguments, more)
        if _TensorGuards is None or not _aligned(tensors):
            return
        if len(self._seen) >= _MOST:
            del self._seen[next(iter(self._seen))]
        same = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        # Of calls that differ in strides or in who wants gradients alone, a few; the newest are asked first.
        self._seen[key] = [_Seen(same, run), *self._seen.get(key, ())][:8]

    def clear(self) -> None:
        self._seen.clear()


def _key(arguments: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What a call is found by, and its tensors."""
    tensors, rest = [], [forced(), *more]
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            rest.append(argument.dim())
        else:
            rest.append(argument)
    return (tensors[0].shape, tensors[2].shape, *rest), tensors


def _aligned(tensors: list[Tensor]) -> bool:
    places = 0
    for tensor in tensors:
        places |= tensor.data_ptr()
    return places % _ALIGNMENT == 0
