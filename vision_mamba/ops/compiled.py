"""Chains of layers as operators, which torch.compile puts into its graphs as they are.

A chain is three operators of torch.library, like a scan: `vision_mamba::<name>` is what compilers see first; where a
gradient is wanted it becomes `<name>_forward`, which also gives what is kept, and `<name>_backward`. An operator may
not give back what it was given: in place of that stands a tensor without elements, whose size says what is meant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import Parameter
from torch.nn.modules import module as of_modules

from vision_mamba.ops.disk_caches import tagging
from vision_mamba.ops.operator import _aligned, _watched, library
from vision_mamba.ops.registry import forced

Tensors = Sequence[Tensor | None]
Options = dict[str, Any]
Kind = tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype, torch.device]


class Shapes(NamedTuple):
    """What a chain gives, as uninitialised tensors: sizes, strides and types alone are computed.

    Args:
        forward: (tensors, options, type of products) -> what the kernels' `forward` gives.
        like: what is kept -> for each tensor one that its gradient is like, or None where it has none.
    """

    forward: Callable[[Tensors, Options, torch.dtype], tuple[Tensors, Tensors]]
    like: Callable[[Tensors], Tensors]


class as_traced:
    """Autocast as it was when a graph was made, whatever it is where it runs, and no weights cast ahead."""

    def __init__(self, half: torch.dtype | None) -> None:
        self.half = half

    def __enter__(self) -> None:
        from vision_mamba.ops.backends.mixers_cuda import cast_ahead

        self.ahead = cast_ahead
        self.found, cast_ahead.found = cast_ahead.found, {}
        self.before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", self.half is not None)
        if self.half is not None:
            torch.set_autocast_dtype("cuda", self.half)

    def __exit__(self, *_: object) -> None:
        self.ahead.found = self.found
        torch.set_autocast_enabled("cuda", self.before[0])
        torch.set_autocast_dtype("cuda", self.before[1])


class ChainOperator:
    """The operators of one chain.

    Args:
        name: of the operator.
        options: their schema.
        stream: whether the second of the results is the sum of the first two tensors; the second may be absent.
        kernels: makes its kernels, when first needed.
        shapes: the same of its shapes.
    """

    def __init__(
        self, name: str, options: str, stream: bool, kernels: Callable[[], Any], shapes: Callable[[], Shapes]
    ) -> None:
        self.name, self.stream = name, stream
        self.kernels, self.shapes = functools.cache(kernels), functools.cache(shapes)
        given = f"ScalarType? half, *, {options}"
        self._define("", f"Tensor?[] tensors, {given}", self._run, self._fake_run, self._autograd_run)
        self._define("_forward", f"Tensor?[] tensors, {given}", self._forward, self._fake_forward, None)
        both = f"Tensor?[] kept, Tensor?[] grads, {given}"
        self._define("_backward", both, self._backward, self._fake_backward, None)
        packets = [getattr(torch.ops.vision_mamba, name + part) for part in ("", "_forward", "_backward")]
        self.run_op, self.forward_op, self.backward_op = (packet.default for packet in packets)
        operators[name] = self

    def _define(self, part: str, arguments: str, kernel: Any, fake: Any, autograd: Any) -> None:
        name = self.name + part
        library.define(f"{name}({arguments}) -> Tensor[]")
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vision_mamba::{name}", tagging(fake), lib=library)
        if autograd is not None:
            library.impl(name, autograd, "Autograd")

    def __call__(self, tensors: Tensors, half: torch.dtype | None, options: Options) -> Any:
        """The chain's result or results; traced by Dynamo."""
        found = self.run_op(list(tensors), half, **options)
        if not self.stream:
            return found[0]
        return found[0], tensors[0] if tensors[1] is None else found[1]

    def takes(self, tensors: Tensors, options: Options) -> bool:
        return not self.kernels().refuses(tuple(tensors), options)

    # What the operators do.

    def _run(self, tensors: Tensors, half: torch.dtype | None, **options: Any) -> Tensors:
        return self._results(tensors, self._computed(tensors, half, options, False)[0])

    def _forward(self, tensors: Tensors, half: torch.dtype | None, **options: Any) -> list[Tensor]:
        results, kept = self._computed(tensors, half, options, True)
        return _packed(tensors, [*self._results(tensors, results), *kept])

    def _backward(self, kept: Tensors, grads: Tensors, half: torch.dtype | None, **options: Any) -> list[Tensor]:
        with as_traced(half):
            found = self.kernels().backward(tuple(kept), options, tuple(grads))
        dense = {id(grad): _aligned(grad.contiguous()) for grad in found if grad is not None}
        return _packed((), [None if grad is None else dense[id(grad)] for grad in found])

    def _fake_run(self, tensors: Tensors, half: torch.dtype | None, **options: Any) -> Tensors:
        return self._results(tensors, self.shapes().forward(tensors, options, _products(tensors, half))[0])

    def _fake_forward(self, tensors: Tensors, half: torch.dtype | None, **options: Any) -> list[Tensor]:
        results, kept = self.shapes().forward(tensors, options, _products(tensors, half))
        return _packed(tensors, [*self._results(tensors, results), *kept])

    def _fake_backward(self, kept: Tensors, grads: Tensors, half: torch.dtype | None, **options: Any) -> list[Tensor]:
        like = self.shapes().like(kept)
        made = {id(t): torch.empty_like(t, memory_format=torch.contiguous_format) for t in like if t is not None}
        return _packed((), [None if t is None else made[id(t)] for t in like])

    def _computed(self, tensors: Tensors, half: torch.dtype | None, options: Options, keep: bool) -> Any:
        with as_traced(half):
            return self.kernels().forward(tuple(tensors), options, keep)

    def _results(self, tensors: Tensors, results: Tensors) -> Tensors:
        """Of the results those that are made."""
        return list(results[: self.count(tensors)])

    def count(self, tensors: Tensors) -> int:
        return 2 if self.stream and tensors[1] is not None else 1

    def _autograd_run(self, tensors: Tensors, half: torch.dtype | None, **options: Any) -> Sequence[Tensor]:
        if _watched(tensors):
            return _Run.apply(self, half, options, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return self.run_op(tensors, half, **options)


operators: dict[str, ChainOperator] = {}


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: ChainOperator, half: Any, options: Options, *tensors: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            found = _unpacked(tensors, chain.forward_op(list(tensors), half, **options))
        count = chain.count(tensors)
        ctx.chain, ctx.half, ctx.options = chain, half, options
        ctx.save_for_backward(*found[count:])
        return tuple(found[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.chain.name}: second derivatives are taken by plain torch alone; run the forward pass under "
                f"vision_mamba.ops.use_backend('eager')."
            )
        both = (*grads, None) if ctx.chain.stream and len(grads) == 1 else grads
        found = ctx.chain.backward_op(list(ctx.saved_tensors), list(both), ctx.half, **ctx.options)
        return None, None, None, *_unpacked((), found)


def _products(tensors: Tensors, half: torch.dtype | None) -> torch.dtype:
    assert tensors[0] is not None
    return half or tensors[0].dtype


def _packed(given: Tensors, found: Tensors) -> list[Tensor]:
    """With stand-ins for None, for what was given, and for what comes twice."""
    places = {id(tensor): place for place, tensor in enumerate(given, 1)}
    places[id(None)] = 0
    made = next(tensor for tensor in found if tensor is not None)
    packed: list[Tensor] = []
    for place, tensor in enumerate(found, len(given) + 1):
        number = places.setdefault(id(tensor), place)
        packed.append(_stand_in(number, place, made) if tensor is None or number < place else tensor)
    return packed


def _stand_in(number: int, place: int, like: Tensor) -> Tensor:
    if type(like) is Tensor:  # no compiler's
        return _kept_stand_in(number, place, like.device)
    return like.new_empty((0, 0, number), dtype=torch.uint8)


@functools.cache
def _kept_stand_in(number: int, place: int, device: torch.device) -> Tensor:
    """One for each place, for all calls: it has no memory."""
    with torch.inference_mode(False):
        return torch.empty((0, 0, number), dtype=torch.uint8, device=device)


def _unpacked(given: Tensors, packed: Sequence[Tensor]) -> list[Tensor | None]:
    every = list(given)
    for tensor in packed:
        stands_in = tensor.dtype == torch.uint8 and tensor.dim() == 3
        every.append((None, *every)[tensor.shape[2]] if stands_in else tensor)
    return every[len(given) :]


# Whether a chain is taken, while torch.compile traces.


def goes_into_graphs(x: object) -> bool:
    """Whether this is a tensor on a GPU, and torch.compile traces what is done to it, for CUDA graphs.

    Elsewhere the host launches a chain's kernels one by one, and may take longer for it than for what a compiler makes
    of plain torch. `use_backend("cuda")` has chains in all graphs, where they take less memory.
    """
    if not (torch.compiler.is_dynamo_compiling() and isinstance(x, Tensor) and x.is_cuda) or _shows_layers():
        return False
    return forced() == "cuda" or (forced() is None and _is_captured())


@torch.compiler.assume_constant_result
def _shows_layers() -> bool:
    """Run by torch.compile as it traces: whether an exporter, or a hook on all modules, is to see each layer. Traced,
    torch's own function would be true before torch 2.12 or so."""
    return torch.compiler.is_exporting() or bool(of_modules._has_any_global_hook())


def traced(chain: ChainOperator, tensors: Tensors, options: Options) -> Any:
    """What the chain gives, or None where the kernels refuse; traced by Dynamo."""
    if not goes_into_graphs(tensors[0]):
        return None
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in (Tensor, Parameter) and _is_known(tensor)):
            return None
    kinds = tuple([None if tensor is None else _kind(tensor) for tensor in tensors])
    if not _taken(chain.name, kinds, half, tuple(options.items())):
        return None
    return chain(tensors, half, options)


@torch.compiler.assume_constant_result
def _is_captured() -> bool:
    """Run by torch.compile as it traces: whether what it makes becomes CUDA graphs."""
    compiler = InstructionTranslator.current_tx().output.compiler_fn
    read = getattr(compiler, "get_compiler_config", None)
    return read is not None and bool(read()["triton.cudagraphs"])


def _is_known(tensor: Tensor) -> bool:
    """Whether a graph is made for this size, but for that of the batch."""
    return all([has_static_value(size) for size in tensor.shape[1:]])


def _kind(tensor: Tensor) -> Kind:
    first = tensor.shape[0]
    sizes = (int(first) if has_static_value(first) else 2, *[int(size) for size in tensor.shape[1:]])
    strides = None if tensor.is_contiguous() else tuple([int(stride) for stride in tensor.stride()])
    return sizes, strides, tensor.dtype, tensor.device


@torch.compiler.assume_constant_result
def _taken(
    name: str, kinds: tuple[Kind | None, ...], half: torch.dtype | None, options: tuple[tuple[str, Any], ...]
) -> bool:
    """Run by torch.compile as it traces."""
    watched = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    return not watched and _accepted(name, kinds, half, options)


@functools.lru_cache(1024)
def _accepted(
    name: str, kinds: tuple[Kind | None, ...], half: torch.dtype | None, options: tuple[tuple[str, Any], ...]
) -> bool:
    with FakeTensorMode(), as_traced(half):
        return operators[name].takes([None if kind is None else _like(*kind) for kind in kinds], dict(options))


def _like(sizes: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    if strides is None:
        return torch.empty(sizes, dtype=dtype, device=device)
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device)
