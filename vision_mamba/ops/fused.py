"""Small neighbours of the scans: functions in plain torch, with kernels that do the same in one pass where they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vision_mamba.ops.compiled import ChainOperator, traced
from vision_mamba.ops.known import Guards
from vision_mamba.ops.operator import _as_in_memory
from vision_mamba.ops.registry import forced

Tensors = tuple[Tensor | None, ...]


class Kernels(NamedTuple):
    """What replaces a plain function of tensors and options.

    Args:
        refuses: (tensors, options) -> whether the kernels cannot do this call.
        forward: (tensors, options, whether a backward pass may follow) -> the results, and what that needs of tensors.
        backward: (kept tensors, options, gradients of the results) -> gradients of the tensors.
    """

    refuses: Callable[[Tensors, dict[str, Any]], bool]
    forward: Callable[[Tensors, dict[str, Any], bool], tuple[tuple[Tensor, ...], Tensors]]
    backward: Callable[[Tensors, dict[str, Any], Tensors], Tensors]


class without_autocast:
    """Products on GPUs keep the types of their arguments; torch's own way to say so takes as long as two launches."""

    def __enter__(self) -> None:
        self.before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled("cuda", self.before)


class Joined:
    """What several modules do, by kernels that keep less for the backward pass and write less to memory between them.

    Called with the tensors and options of its kernels it gives their result, or None where they refuse or somebody
    looks inside: then the modules are to run one by one.

    Args:
        name: what errors call it.
        kernels: makes its kernels, when first needed.
        operator: runs them in the graphs of torch.compile.
    """

    def __init__(self, name: str, kernels: Callable[[], Kernels], operator: ChainOperator | None = None) -> None:
        self.name, self._make_kernels, self.operator = name, kernels, operator
        self._kernels: Kernels | None = None
        self._accepted = Guards()

    def __call__(self, *tensors: Tensor | None, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return None if self.operator is None else traced(self.operator, tensors, options)
        if not _by_kernels(tensors):
            return None
        if self._kernels is None:
            self._kernels = self._make_kernels()
        if not self._known(tensors, options):
            return None
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            results = _Run.apply(self._kernels, self.name, options, *tensors)
        else:
            results = self._kernels.forward(tensors, options, False)[0]
        return results[0] if len(results) == 1 else results

    def _known(self, tensors: Tensors, options: dict[str, Any]) -> bool:
        """Whether the kernels take these, which is found out once for all that are alike."""
        assert self._kernels is not None and tensors[0] is not None
        given = [tensor for tensor in tensors if tensor is not None]
        half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (tensors[0].shape, *options.values(), half, *[tensor is None for tensor in tensors])
        if self._accepted.hold(key, given):
            return True
        same_place = all([t.device == given[0].device and _as_in_memory(t) for t in given])
        if not same_place or self._kernels.refuses(tensors, options):
            return False
        self._accepted.add(key, given)
        return True


class Fused:
    """A function in plain torch, run by kernels in eager mode on GPUs.

    Whoever looks inside, be it torch.compile, an exporter, a tracer or a transform, sees plain torch, from which a
    compiler makes as good a kernel together with the neighbours'. Plain torch also takes the calls that the kernels
    refuse, and all of them while `use_backend` names a backend of plain torch: the two are the same function.

    Args:
        name: what errors call it.
        kernels: makes its kernels, when first needed.
        plain: the function.
        compiled: the same function in another form, of which compilers make more on GPUs.
    """

    def __init__(
        self,
        name: str,
        kernels: Callable[[], Kernels],
        plain: Callable[..., Any],
        compiled: Callable[..., Any] | None = None,
    ) -> None:
        self.joined = Joined(name, kernels)
        self.plain, self.compiled = plain, compiled or plain

    def __call__(self, *tensors: Tensor | None, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            on_gpu = tensors[0] is not None and tensors[0].is_cuda
            return (self.compiled if on_gpu else self.plain)(*tensors, **options)
        found = self.joined(*tensors, **options)
        return self.plain(*tensors, **options) if found is None else found


def _by_kernels(tensors: Tensors) -> bool:
    """Whether these begin with a tensor on a GPU, and nobody but autograd is watching."""
    first = tensors[0]
    if torch.jit.is_tracing() or first is None or not first.is_cuda:
        return False
    return (
        forced() in (None, "cuda")
        and forward_ad._current_level < 0  # kernels see no tangents, and would drop them without a word
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, name: str, options: dict[str, Any], *tensors: Tensor | None) -> Any:
        results, kept = kernels.forward(tensors, options, True)
        ctx.kernels, ctx.name, ctx.options = kernels, name, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.name}: second derivatives are taken by plain torch alone; run the forward pass under "
                f"vision_mamba.ops.use_backend('eager')."
            )
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        found = ctx.kernels.backward(ctx.saved_tensors, ctx.options, grads)
        return None, None, None, *found
