"""An operator with several implementations, as torch sees it: schema, fake tensors, autograd and FLOP formula.

`vision_mamba::<name>` is what models call; TorchScript, fx, torch.compile, torch.export and the meta device all see one
opaque node. Where a gradient is wanted it runs `<name>_forward`, which also returns what the backend keeps, and later
`<name>_backward`; a backend written in plain torch is recomputed and differentiated by autograd instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.overrides import has_torch_function
from torch.utils.flop_counter import register_flop_formula

from vision_mamba.ops.contract import covers
from vision_mamba.ops.disk_caches import tagging
from vision_mamba.ops.known import Known
from vision_mamba.ops.reference import without_autocast
from vision_mamba.ops.registry import Backend, Registry

library = torch.library.Library("vision_mamba", "FRAGMENT")
_OPTIONS = (bool, str, torch.dtype)  # of a call, beside None


def once(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check of shapes and kinds that remembers what has passed, for tensors of known sizes.

    A model asks for the same few calls over and over, and each full check costs more than launching a kernel does.
    """
    passed: set[tuple[object, ...]] = set()

    def check_once(call: Any) -> None:
        key = tuple([(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in call])
        try:
            if key in passed:
                return
        except TypeError:  # a tracer's symbolic sizes have no hash
            return check(call)
        check(call)
        if len(passed) >= 4096:
            passed.clear()
        passed.add(key)

    return check_once


class Operator:
    """Three operators of torch.library for one kind of call, above the backends of a registry.

    Args:
        registry: the backends; its name is the operator's.
        call: the NamedTuple of the arguments, in the order of the schema.
        arguments: their schema, without the backend's name, which comes last.
        gradients: the arguments that have one, in the order in which backends return them.
        check: raises ValueError for shapes and kinds that break the contract; reads no value.
        check_values: raises ValueError for values that do.
        flops: of one forward pass, from the shapes of all arguments.
    """

    def __init__(
        self,
        registry: Registry,
        call: Any,
        arguments: str,
        gradients: tuple[str, ...],
        check: Callable[[Any], None],
        check_values: Callable[[Any], None],
        flops: Callable[..., int],
    ) -> None:
        self.name, self.registry, self.call, self.gradients = registry.operator, registry, call, gradients
        self.fields = call._fields
        self.known = Known(arguments.count("Tensor"), arguments.count("Tensor "))
        self._table = self.fields.index("indices")
        self._last_defaults = (None, *reversed(call._field_defaults.values()))  # the last is the backend's name
        self._check, self._check_known, self._check_values = check, once(check), check_values
        arguments += ", str? backend=None"
        self._define("", arguments, "(Tensor, Tensor)", self._run, self._fake_run, self._autograd_run)
        self._define("_forward", arguments, "(Tensor, Tensor, Tensor)", self._forward, self._fake_forward, None)
        given = f"Tensor saved, Tensor? dy, Tensor? dlast, {arguments}"
        results = f"({', '.join(['Tensor'] * len(gradients))})"
        self._define("_backward", given, results, self._backward, self._fake_backward, self._autograd_backward)
        # Overloads by name: looking for the one that fits takes as long as a launch.
        packets = [getattr(torch.ops.vision_mamba, self.name + part) for part in ("", "_forward", "_backward")]
        self.run_op, self.forward_op, self.backward_op = (packet.default for packet in packets)
        register_flop_formula(packets[:2])(flops)
        # What the forward pass computed is recomputed, then carried backwards with about two products for each of its.
        register_flop_formula(packets[2])(lambda saved, dy, dlast, *args, **kwargs: 3 * flops(*args, **kwargs))

    def _define(self, part: str, arguments: str, results: str, kernel: Any, fake: Any, autograd: Any) -> None:
        name = self.name + part
        library.define(f"{name}({arguments}) -> {results}")
        # No autocast rule is registered on purpose: an operator without one takes its arguments in the types they have.
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vision_mamba::{name}", tagging(fake), lib=library)
        if autograd is not None:
            library.impl(name, autograd, "Autograd")

    def parse(self, arguments: tuple[Any, ...]) -> tuple[Any, str | None]:
        """The dispatcher leaves trailing defaults out; the call's own defaults are the same."""
        count = len(self.fields)
        return self.call(*arguments[:count]), arguments[count] if len(arguments) > count else None

    def choose(self, arguments: tuple[Any, ...]) -> Backend:
        return self.registry.choose(*self.parse(arguments))

    def _seen(self, arguments: tuple[Any, ...], save: bool) -> tuple[tuple[Tensor, Tensor, Tensor], str] | None:
        """What a call on a GPU gives, and by which backend, if one like it was seen before."""
        if not arguments[0].is_cuda:
            return None
        found = self.known.find(arguments, save, self._covered(arguments))
        if found is None:
            return None
        seen, addresses = found
        return seen.run(addresses), seen.backend

    def at_once(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
        """What a call of a kind seen before gives, past torch's dispatcher, which takes as long as a launch for so many
        arguments; None where somebody else looks, or wants a gradient, and where the call is new."""
        if not nobody_looks():
            return None
        count, required = self.known.count, self.known.required
        tensors = [tensor for tensor in arguments[:count] if tensor is not None]
        present = all([tensor is not None for tensor in arguments[:required]])
        if not (present and all([isinstance(tensor, Tensor) for tensor in tensors])) or _watched(tensors):
            return None
        if has_torch_function(tensors) or tensors[0].dim() < 3:
            return None
        if not all([option is None or type(option) in _OPTIONS for option in arguments[count:]]):
            return None  # the checks have a sentence for it; 1 and True are equal
        seen = self._seen(self.shortened(arguments), False)
        return None if seen is None else seen[0][:2]

    def shortened(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments, without the defaults at their end, as the dispatcher hands them on."""
        count = len(arguments)
        for default in self._last_defaults:
            if arguments[count - 1] is not default:
                break
            count -= 1
        return arguments[:count]

    def _covered(self, arguments: tuple[Any, ...]) -> bool:
        """Whether the routes visit every token; reads the index table, if there is one that was not read."""
        indices = arguments[self._table] if len(arguments) > self._table else None
        return indices is None or covers(self.name, indices, arguments[0].shape[1])

    def _forward(self, *arguments: Any, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        seen = self._seen(arguments, save)
        if seen is not None:
            return seen[0]
        call, name = self.parse(arguments)
        self._check_known(call)
        self._check_values(call)
        backend = self.registry.choose(call, name)
        if call.batch == 0:
            return call.new_output(), call.new_last_state(), backend.new_saved(call)
        run = None if backend.prepare is None else backend.prepare(call, save)
        if run is not None:
            self.known.add(run, backend.name, arguments, save, self._covered(arguments))
        y, last, saved = backend.forward(call, save)
        if backend.backward is None:  # kernels fill what new_output gives them
            y, last = _laid_out(y, call.new_output()), _laid_out(last, call.new_last_state())
        return y, last, saved

    def _run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._forward(*arguments, save=False)[:2]

    def _backward(self, saved: Tensor, dy: Tensor | None, dlast: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        call, name = self.parse(arguments)
        backend = self.registry.choose(call, name)
        assert backend.backward is not None, backend.name
        if call.batch == 0:
            grads = tuple(None if t is None else torch.zeros_like(t) for t in self._differentiable(call))
        else:
            grads = backend.backward(call, saved, dy, dlast)
        return tuple(call.x.new_empty(0) if grad is None else _aligned(grad) for grad in grads)

    def _differentiable(self, call: Any) -> tuple[Tensor | None, ...]:
        return tuple(getattr(call, name) for name in self.gradients)

    def _fake_run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        call, _ = self.parse(arguments)
        self._check(call)
        return call.new_output(), call.new_last_state()

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *self._fake_run(*arguments), self.choose(arguments).new_saved(self.parse(arguments)[0])

    def _fake_backward(self, saved: Tensor, dy: Any, dlast: Any, *arguments: Any) -> tuple[Tensor, ...]:
        call, _ = self.parse(arguments)
        return tuple(call.x.new_empty(0) if t is None else torch.empty_like(t) for t in self._differentiable(call))

    def _autograd_run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        if forward_ad._current_level >= 0:
            self._refuse_tangents(arguments)
        if _watched(arguments):
            return _Run.apply(self, *arguments)
        if torch._C._len_torch_dispatch_stack() == 0:  # nobody is watching below either: saves the way back through
            seen = self._seen(arguments, False)  # the dispatcher
            if seen is not None:
                return seen[0][:2]
            if all(map(_as_in_memory, arguments)):
                return self._run(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.run_op(*arguments)

    def _refuse_tangents(self, arguments: tuple[Any, ...]) -> None:
        """Kernels do not see the tangents of forward-mode differentiation, and would drop them without a word."""
        if all(forward_ad.unpack_dual(a).tangent is None for a in arguments if isinstance(a, Tensor)):
            return
        if self.choose(arguments).backward is not None:
            raise RuntimeError(
                f"{self.name}: forward-mode derivatives are taken by the backends 'eager' and 'reference' alone; "
                f"run it under vision_mamba.ops.use_backend('eager')."
            )

    def _autograd_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        if _watched(arguments):
            return _Once.apply(self, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward_op(*arguments)

    def recompute(
        self, arguments: tuple[Any, ...], names: list[str], dy: Tensor | None, dlast: Tensor | None
    ) -> dict[str, Tensor]:
        """Run a backend written in torch once more, with autograd watching, rather than keep its insides meanwhile."""
        call, name = self.parse(arguments)
        twice = torch.is_grad_enabled()  # create_graph: somebody will differentiate the gradient
        # A backward pass may run under autocast too, and would then take products in half precision.
        with torch.enable_grad(), without_autocast(call.x.device):
            inputs = {n: getattr(call, n) if twice else getattr(call, n).detach().requires_grad_() for n in names}
            y, last, _ = self.registry.choose(call, name).forward(call._replace(**inputs), False)
            outputs = [(out, grad) for out, grad in ((y, dy), (last, dlast)) if grad is not None]
            grads = torch.autograd.grad(
                [out for out, _ in outputs],
                list(inputs.values()),
                [grad.to(out.dtype) for out, grad in outputs],
                create_graph=twice,
                materialize_grads=True,
            )
        return dict(zip(names, grads, strict=True))


def _laid_out(result: Tensor, promised: Tensor) -> Tensor:
    """A result in the memory order that its fake tensor promised; what plain torch computes may come in another."""
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _aligned(result: Tensor) -> Tensor:
    """A part of what kernels left in one piece, or a copy of it where it does not begin as tensors of their own do,
    which Inductor takes every result for."""
    return result if result.storage_offset() * result.element_size() % 16 == 0 else result.clone()


def nobody_looks() -> bool:
    """Whether torch has nothing between a caller and kernels but autograd: no compiler, tracer, mode or transform."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or profiler._is_profiler_enabled
    )


def _watched(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def _as_in_memory(argument: Any) -> bool:
    """Whether an argument is what its memory holds: not a subclass's, nor a lazy negation or zero of torch's."""
    if not isinstance(argument, Tensor):
        return True
    plain = type(argument) is Tensor or type(argument) is torch.nn.Parameter
    return plain and not (argument.is_neg() or argument._is_zerotensor())


class _Run(torch.autograd.Function):
    """Derivative of an operator with respect to every argument that has one."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> tuple[Tensor, Tensor]:
        call, name = operator.parse(arguments)
        unwatched = torch._C._len_torch_dispatch_stack() == 0
        with torch._C._AutoDispatchBelowAutograd():
            seen = operator._seen(arguments, True) if unwatched else None
            if seen is not None:
                (y, last, saved), name = seen
                ctx.operator, ctx.kernel = operator, True
            else:
                backend = operator.registry.choose(call, name)
                ctx.operator, ctx.kernel, name = operator, backend.backward is not None, backend.name
                given = arguments if unwatched else (*call, name)
                y, last, saved = operator.forward_op(*given) if ctx.kernel else (*operator.run_op(*given), None)
        # Named from here on: what this backend keeps, only this backend can use.
        arguments = (*call, name)
        ctx.set_materialize_grads(False)
        if not call.return_last_state:
            ctx.mark_non_differentiable(last)
        ctx.is_tensor = [isinstance(argument, Tensor) for argument in arguments]
        ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        ctx.save_for_backward(saved, *(argument for argument in arguments if isinstance(argument, Tensor)))
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        operator: Operator = ctx.operator
        saved, *tensors = ctx.saved_tensors
        source = iter(tensors)
        arguments = tuple(
            next(source) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        )
        needed = ctx.needs_input_grad[1:]  # the first is the operator's
        wanted = dict(zip(operator.fields, needed, strict=False))
        found: dict[str, Tensor] = {}
        if (dy is not None or dlast is not None) and ctx.kernel:
            grads = operator.backward_op(saved, dy, dlast, *arguments)
            found = dict(zip(operator.gradients, grads, strict=True))
        elif dy is not None or dlast is not None:
            names = [name for name in operator.gradients if wanted.get(name)]
            found = operator.recompute(arguments, names, dy, dlast)
        fields = [found.get(name) if wanted.get(name) else None for name in operator.fields]
        fields = fields[: len(needed)]
        return None, *fields, *[None] * (len(needed) - len(fields))


class _Once(torch.autograd.Function):
    """A kernel's backward, which has no derivative of its own and says so instead of being wrong."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.name = operator.name
        with torch._C._AutoDispatchBelowAutograd():
            return operator.backward_op(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.name}: second derivatives are taken by the backends 'eager' and 'reference' alone; "
            f"run the forward pass under vision_mamba.ops.use_backend('eager')."
        )
