"""The scan as torch operators: schema, fake tensors, autograd, autocast and FLOP formula, once, above the backends.

`vision_mamba::cross_selective_scan` is what models call; TorchScript, fx, torch.compile, torch.export and the meta
device all see one opaque node. Where a gradient is wanted it runs `..._forward`, which also returns what the backend
keeps, and later `..._backward`; a backend written in plain torch is recomputed and differentiated by autograd instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from vision_mamba.ops import contract, registry
from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.reference import without_autocast

_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? indices=None, Tensor? dt_weight=None, "
    "Tensor? dt_bias=None, Tensor? initial_state=None, bool dt_softplus=True, bool merge=True, "
    "bool return_last_state=False, ScalarType? out_dtype=None, str? backend=None"
)
_FIELDS = len(ScanCall._fields)  # the arguments of a call; the backend's name comes after them

library = torch.library.Library("vision_mamba", "FRAGMENT")
library.define(f"cross_selective_scan({_ARGUMENTS}) -> (Tensor, Tensor)")
library.define(f"cross_selective_scan_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
library.define(
    f"cross_selective_scan_backward(Tensor saved, Tensor? dy, Tensor? dlast, {_ARGUMENTS}) "
    f"-> ({', '.join(['Tensor'] * len(GRADIENTS))})"
)
_ops = torch.ops.vision_mamba
# Overloads by name: looking for the one that fits takes as long as a launch.
_scan_op = _ops.cross_selective_scan.default
_forward_op = _ops.cross_selective_scan_forward.default
_backward_op = _ops.cross_selective_scan_backward.default


def _parse(arguments: tuple[Any, ...]) -> tuple[ScanCall, str | None]:
    """The dispatcher leaves trailing defaults out; the call's own defaults are the same."""
    backend = arguments[_FIELDS] if len(arguments) > _FIELDS else None
    return ScanCall(*arguments[:_FIELDS]), backend


def _run(save: bool, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    call, name = _parse(arguments)
    contract.check_once(call)
    contract.check_values(call)
    backend = registry.choose(call, name)
    if call.batch == 0:
        return call.new_output(), call.new_last_state(), backend.new_saved(call)
    y, last, saved = backend.forward(call, save)
    if backend.backward is None:  # kernels fill what new_output gives them
        y, last = _laid_out(y, call.new_output()), _laid_out(last, call.new_last_state())
    return y, last, saved


def _laid_out(result: Tensor, promised: Tensor) -> Tensor:
    """A result in the memory order that its fake tensor promised; what plain torch computes may come in another."""
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _run(False, arguments)[:2]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _run(True, arguments)


def _backward(saved: Tensor, dy: Tensor | None, dlast: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    call, name = _parse(arguments)
    backend = registry.choose(call, name)
    assert backend.backward is not None, backend.name
    if call.batch == 0:
        grads = tuple(None if t is None else torch.zeros_like(t) for t in _differentiable(call))
    else:
        grads = backend.backward(call, saved, dy, dlast)
    return tuple(call.x.new_empty(0) if grad is None else grad for grad in grads)


def _differentiable(call: ScanCall) -> tuple[Tensor | None, ...]:
    return tuple(getattr(call, name) for name in GRADIENTS)


def _fake_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, _ = _parse(arguments)
    contract.check(call)
    return call.new_output(), call.new_last_state()


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, name = _parse(arguments)
    contract.check(call)
    return call.new_output(), call.new_last_state(), registry.choose(call, name).new_saved(call)


def _fake_backward(saved: Tensor, dy: Tensor | None, dlast: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    call, _ = _parse(arguments)
    return tuple(call.x.new_empty(0) if t is None else torch.empty_like(t) for t in _differentiable(call))


class _Scan(torch.autograd.Function):
    """Derivative of the scan with respect to every tensor but the index table."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        call, name = _parse(arguments)
        backend = registry.choose(call, name)
        ctx.kernel = backend.backward is not None
        # Named from here on: what this backend keeps, only this backend can use.
        arguments = (*call, backend.name)
        with torch._C._AutoDispatchBelowAutograd():
            if ctx.kernel:
                y, last, saved = _forward_op(*arguments)
            else:
                y, last = _scan_op(*arguments)
                saved = None
        ctx.set_materialize_grads(False)
        if not call.return_last_state:
            ctx.mark_non_differentiable(last)
        ctx.is_tensor = [isinstance(argument, Tensor) for argument in arguments]
        ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        ctx.save_for_backward(saved, *(argument for argument in arguments if isinstance(argument, Tensor)))
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *tensors = ctx.saved_tensors
        source = iter(tensors)
        arguments = [
            next(source) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        wanted = dict(zip(ScanCall._fields, ctx.needs_input_grad, strict=False))
        if dy is None and dlast is None:
            found: dict[str, Tensor | None] = {}
        elif ctx.kernel:
            grads = _backward_op(saved, dy, dlast, *arguments)
            found = dict(zip(GRADIENTS, grads, strict=True))
        else:
            found = _recompute(arguments, [name for name in GRADIENTS if wanted.get(name)], dy, dlast)
        fields = [found.get(name) if wanted.get(name) else None for name in ScanCall._fields]
        return tuple(fields[: len(ctx.needs_input_grad)]) + (None,) * (len(ctx.needs_input_grad) - len(fields))


def _recompute(
    arguments: list[Any], names: list[str], dy: Tensor | None, dlast: Tensor | None
) -> dict[str, Tensor | None]:
    """Run a backend written in torch once more, with autograd watching, rather than keep (B, L, D, N) meanwhile."""
    call, name = _parse(tuple(arguments))
    twice = torch.is_grad_enabled()  # create_graph: somebody will differentiate the gradient
    # A backward pass may run under autocast too, and would then take products in half precision.
    with torch.enable_grad(), without_autocast(call.x.device):
        inputs = {n: getattr(call, n) if twice else getattr(call, n).detach().requires_grad_() for n in names}
        y, last, _ = registry.choose(call, name).forward(call._replace(**inputs), False)
        outputs = [(out, grad) for out, grad in ((y, dy), (last, dlast)) if grad is not None]
        grads = torch.autograd.grad(
            [out for out, _ in outputs],
            list(inputs.values()),
            [grad.to(out.dtype) for out, grad in outputs],
            create_graph=twice,
            materialize_grads=True,
        )
    return dict(zip(names, grads, strict=True))


class _Once(torch.autograd.Function):
    """The kernels' backward, which has no derivative of its own and says so instead of being wrong."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return _backward_op(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "cross_selective_scan: second derivatives are taken by the backends 'eager' and 'reference' alone; "
            "run the forward pass under vision_mamba.ops.use_backend('eager')."
        )


def _watched(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _as_in_memory(argument: Any) -> bool:
    """Whether an argument is what its memory holds: not a subclass's, nor a lazy negation or zero of torch's."""
    if not isinstance(argument, Tensor):
        return True
    plain = type(argument) is Tensor or type(argument) is torch.nn.Parameter
    return plain and not (argument.is_neg() or argument._is_zerotensor())


def _autograd_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    if forward_ad._current_level >= 0:
        _refuse_tangents(arguments)
    if _watched(arguments):
        return _Scan.apply(*arguments)
    if torch._C._len_torch_dispatch_stack() == 0 and all(map(_as_in_memory, arguments)):
        return _scan(*arguments)  # nobody is watching below either, so the way back through the dispatcher is saved
    with torch._C._AutoDispatchBelowAutograd():
        return _scan_op(*arguments)


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    """Kernels do not see the tangents of forward-mode differentiation, and would drop them without a word."""
    if all(forward_ad.unpack_dual(a).tangent is None for a in arguments if isinstance(a, Tensor)):
        return
    if registry.choose(*_parse(arguments)).backward is not None:
        raise RuntimeError(
            "cross_selective_scan: forward-mode derivatives are taken by the backends 'eager' and 'reference' alone; "
            "run the scan under vision_mamba.ops.use_backend('eager')."
        )


def _autograd_backward(*arguments: Any) -> tuple[Tensor, ...]:
    if _watched(arguments):
        return _Once.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(*arguments)


for _name, _kernel, _fake in (
    ("cross_selective_scan", _scan, _fake_scan),
    ("cross_selective_scan_forward", _forward, _fake_forward),
    ("cross_selective_scan_backward", _backward, _fake_backward),
):
    # No autocast rule is registered on purpose: an operator without one takes its arguments in the types they have.
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vision_mamba::{_name}", _fake, lib=library)
library.impl("cross_selective_scan", _autograd_scan, "Autograd")
library.impl("cross_selective_scan_backward", _autograd_backward, "Autograd")


def scan_flops(x: Any, dt: Any, A: Any, indices: Any = None, dt_weight: Any = None) -> int:
    """Floating-point operations of one forward scan, from the shapes of its arguments.

    A step of a channel costs 9 per state, as published since mamba_ssm, 1 for the skip, and 2 R where the step size
    comes in R columns. MACs are half of FLOPs throughout this library.
    """
    routes, channels, states = A
    steps = x[1] if indices is None else indices[1]
    rank = 0 if dt_weight is None else dt_weight[2]
    return x[0] * steps * routes * channels * (9 * states + 1 + 2 * rank)


@register_flop_formula([_ops.cross_selective_scan, _ops.cross_selective_scan_forward])
def _flops(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    indices: Any = None,
    dt_weight: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    return scan_flops(x, dt, A, indices, dt_weight)


@register_flop_formula(_ops.cross_selective_scan_backward)
def _backward_flops(saved: Any, dy: Any, dlast: Any, *arguments: Any, **kwargs: Any) -> int:
    # The states are recomputed, then carried backwards with about two products for each of the forward pass.
    return 3 * _flops(*arguments)
