"""Calls seen before: what their shapes decide is decided once, and what is left is to launch kernels.

Looking at nine tensors from Python costs more than a launch does. torch.compile guards its graphs by a test in C++ that
compares type, device, dispatch keys, sizes and strides of many tensors at once; the same test tells here whether a call
is one that was seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import or_
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._dynamo import guards

from vision_mamba.ops.registry import forced

_TensorGuards: Any = getattr(guards, "TensorGuards", None)  # private: without it every call is looked at anew

#: Runs a known call again, given the addresses of its tensors in the order of its arguments; it may change the list.
Run = Callable[[list[int]], tuple[Tensor, Tensor, Tensor]]

_ALIGNMENT = 16  # bytes: kernels ask no more of where a tensor begins
_MOST = 1024


class Guards:
    """Kinds of calls that passed a test, by the types, devices, sizes and strides of their tensors, and a key."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[Any, ...], list[Callable[..., bool]]] = {}

    def hold(self, key: tuple[Any, ...], tensors: list[Tensor]) -> bool:
        return any([same(*tensors) for same in self._kinds.get(key, ())])

    def add(self, key: tuple[Any, ...], tensors: list[Tensor]) -> None:
        if _TensorGuards is None:
            return
        if len(self._kinds) >= _MOST:
            del self._kinds[next(iter(self._kinds))]
        same = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self._kinds[key] = [same, *self._kinds.get(key, ())][:8]


class Seen(NamedTuple):
    """A kind of call, and what runs it."""

    same: Callable[..., bool]  # of tensors: whether they are like those that it was made of
    offsets: list[int]  # of where the tensors begin, from a multiple of the alignment
    beyond: int  # 0 if all of these are
    run: Run
    backend: str


class Known:
    """What was seen of one operator's calls on GPUs; of too many, the oldest are forgotten.

    Args:
        count: of the arguments that are tensors, or may be; they come first.
        required: those of them that cannot be absent.
    """

    def __init__(self, count: int, required: int) -> None:
        self.count, self.required = count, required
        self._seen: dict[tuple[Any, ...], list[Seen]] = {}

    def find(self, arguments: tuple[Any, ...], *more: Any) -> tuple[Seen, list[int]] | None:
        """What is known of a call, and the addresses to run it on, if one like it was added with the same `more`."""
        key, tensors = self._key(arguments, more)
        for seen in self._seen.get(key, ()):
            if seen.same(*tensors):
                addresses = [tensor.data_ptr() for tensor in tensors]
                # Where all begin at a multiple of the alignment, as they mostly do, one look tells.
                if not (functools.reduce(or_, addresses) | seen.beyond) % _ALIGNMENT:
                    return seen, addresses
                if _offsets(addresses) == seen.offsets:
                    return seen, addresses
        return None

    def add(self, run: Run, backend: str, arguments: tuple[Any, ...], *more: Any) -> None:
        key, tensors = self._key(arguments, more)
        if _TensorGuards is None:
            return
        if len(self._seen) >= _MOST:
            del self._seen[next(iter(self._seen))]
        same = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        offsets = _offsets([tensor.data_ptr() for tensor in tensors])
        seen = Seen(same, offsets, max(offsets), run, backend)
        # Of calls that differ in strides, places or who wants gradients alone, a few; the newest are asked first.
        self._seen[key] = [seen, *self._seen.get(key, ())][:8]

    def clear(self) -> None:
        self._seen.clear()

    def _key(self, arguments: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
        """What a call is found by, and its tensors."""
        count = self.count
        tensors = [tensor for tensor in arguments[:count] if tensor is not None]
        kinds = tuple(map(type, arguments[self.required : count]))  # of None those that are absent
        return (arguments[0].shape, arguments[2].shape, kinds, arguments[count:], forced(), more), tensors


def _offsets(addresses: list[int]) -> list[int]:
    return [address % _ALIGNMENT for address in addresses]
