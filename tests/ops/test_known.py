"""Calls seen before: which are taken for one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import BF16, F16, F32, Case, make_call
from vision_mamba import ops
from vision_mamba.ops import autograd, contract, use_backend
from vision_mamba.ops import known as known_calls
from vision_mamba.ops.backends import forward_cuda
from vision_mamba.ops.known import Known
from vision_mamba.ops.operator import nobody_looks

X, Y, A = torch.randn(2, 3), torch.randn(2, 3), torch.rand(4, 5)
CALL = (X, Y, A, None, True)


def run(addresses: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(addresses), X, Y


@pytest.fixture
def known() -> Known:
    known = Known(4, 3)
    known.add(run, "cuda", CALL, "more")
    return known


def test_the_same_kind_of_call_is_found(known: Known) -> None:
    other = X + 1
    found = known.find((other, *CALL[1:]), "more")
    assert found is not None and found[0].run is run and found[0].backend == "cuda"
    assert found[1] == [t.data_ptr() for t in (other, Y, A)]
    with torch.no_grad():
        assert known.find(CALL, "more") is not None


@pytest.mark.parametrize(
    "other",
    [
        (X.double(), Y, A, None, True),
        (torch.randn(2, 6)[:, ::2], Y, A, None, True),
        (X.to("meta"), Y, A, None, True),
        (torch.nn.Parameter(X), Y, A, None, True),
        (torch._neg_view(X), Y, A, None, True),
        (torch.randn(7)[1:].view(2, 3), Y, A, None, True),  # begins elsewhere
        (X, X, A, None, True),  # one tensor twice, at which torch's test stops
        (X, Y, A, A.clone(), True),
        (X, Y, A, None, False),
        (X, Y, A),
    ],
    ids=["type", "strides", "device", "class", "negation", "alignment", "twice", "tensor", "flag", "count"],
)
def test_another_is_not(known: Known, other: tuple) -> None:
    assert known.find(other, "more") is None


def test_tensors_may_begin_anywhere_at_the_same_offset() -> None:
    part, other, aligned = (torch.randn(9)[start : start + 6].view(2, 3) for start in (1, 1, 0))
    known = Known(4, 3)
    known.add(run, "cuda", (part, *CALL[1:]))
    assert known.find((other, *CALL[1:])) is not None and known.find((aligned, *CALL[1:])) is None


def test_what_else_decides(known: Known) -> None:
    assert known.find(CALL, "less") is None
    with use_backend("eager"):
        assert known.find(CALL, "more") is None
    with torch.inference_mode():
        assert known.find((torch.randn(2, 3), *CALL[1:]), "more") is None


@pytest.mark.parametrize("steps", [3, 35])
def test_a_table_is_read_before_a_call_is_taken_for_another(steps: int) -> None:
    call = make_call(Case(order="cross"))
    table = torch.arange(steps, dtype=torch.int32).repeat(call.routes, 1)
    assert autograd.operator._covered((*call._replace(indices=table), None)) == (steps == call.tokens)
    table = table.clone()
    table[1, 2] = call.tokens
    with pytest.raises(ValueError, match=r"indices must be -1 .*route 1, step 2"):
        autograd.operator._covered((*call._replace(indices=table), None))


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "_MOST", 3)
    known = Known(4, 3)
    for flag in range(5):
        known.add(run, "cuda", (*CALL[:4], flag))
    assert [known.find((*CALL[:4], flag)) is not None for flag in range(5)] == [False, False, True, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(order="cross", states=1, channels=64, rank=4, dtypes=(BF16,) * 4),
        Case(order="cross", states=1, channels=20, dtypes=(F16,) * 4, out_dtype=F32),
        Case(order="local_2", states=16, channels=24, state=True),  # with padding steps
        Case(grid=(1, 900), routes=1, batch=1, states=16, channels=32, dtypes=(BF16,) * 4),  # in segments
        Case(order="bidirectional", states=3, shared_x=False, layout="channels_first"),
        Case(routes=2, states=16, shared_x=False, merge=False),
    ],
    ids=str,
)
def test_a_call_run_again_gives_what_it_gives_anew(case: Case) -> None:
    call = make_call(case, device="cuda")
    other = call._replace(x=0.5 * call.x, dt=call.dt + 1)
    scan, known = torch.ops.vision_mamba.cross_selective_scan, autograd.operator.known
    with torch.no_grad():
        known.clear()
        scan(*call, "cuda")
        assert known.find((*call, "cuda"), False, contract.visits_all(call)) is not None
        again = scan(*other, "cuda")
        known.clear()
        forward_cuda.runners.clear()
        anew = scan(*other, "cuda")
    for a, b in zip(again, anew, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


def test_arguments_are_shortened_as_the_dispatcher_does() -> None:
    """Else a call would not be found that came past it, or the other way."""
    seen: list[tuple] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            seen.append(args)
            return func(*args, **(kwargs or {}))

    plain = make_call(Case(routes=2, bias=False, skip=False))
    for call in (
        plain,
        plain._replace(return_last_state=True),
        plain._replace(out_dtype=F32),
        plain._replace(merge=False),
    ):
        for backend in (None, "reference"):
            with Watch():
                torch.ops.vision_mamba.cross_selective_scan(*call, backend)
            given = seen.pop(0)
            seen.clear()
            mine = autograd.operator.shortened((*call, backend))
            assert len(mine) == len(given) and all(a is b or a == b for a, b in zip(mine, given, strict=True))


def _traced(function: Callable[[], bool]) -> bool:
    found = []

    def traced(x: Tensor) -> Tensor:
        found.append(function())
        return x + 1

    torch.jit.trace(traced, torch.zeros(1), check_trace=False)
    return found[0]


def _compiled(function: Callable[[], bool]) -> bool:
    return (
        torch.compile(lambda x: x + 1 if function() else x, backend="eager", fullgraph=True)(torch.zeros(1)).item() > 0
    )


def _profiled(function: Callable[[], bool]) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return function()


def _within(context: Callable[[], Any]) -> Callable[[Callable[[], bool]], bool]:
    def run(function: Callable[[], bool]) -> bool:
        with context():
            return function()

    return run


def _vmapped(function: Callable[[], bool]) -> bool:
    found = []
    torch.vmap(lambda x: (found.append(function()), x)[1])(torch.zeros(2))
    return found[0]


@pytest.mark.parametrize(
    "look",
    [
        _compiled,
        _profiled,
        _traced,
        _vmapped,
        _within(forward_ad.dual_level),
        _within(lambda: torch.device("cpu")),
        _within(lambda: FlopCounterMode(display=False)),
    ],
    ids=["compiler", "profiler", "tracer", "transform", "tangents", "device", "counter"],
)
def test_somebody_looks(look: Callable[[Callable[[], bool]], bool]) -> None:
    assert nobody_looks() and not look(nobody_looks) and nobody_looks()


@pytest.mark.gpu
def test_past_the_dispatcher_comes_what_the_operator_gives() -> None:
    call = make_call(Case(order="cross", states=1, channels=64, rank=4, dtypes=(BF16,) * 4), device="cuda")
    operator, arguments = autograd.operator, (*call, None)
    operator.known.clear()
    assert operator.at_once(arguments) is None
    expected = torch.ops.vision_mamba.cross_selective_scan(*arguments)[0]
    found = operator.at_once(arguments)
    assert found is not None and torch.equal(found[0], expected)
    assert operator.at_once((*call._replace(x=call.x.clone().requires_grad_()), None)) is None
    y = ops.cross_selective_scan(*call[:6], indices=call.indices, dt_weight=call.dt_weight, dt_bias=call.dt_bias)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["x", "A", "indices"])
@pytest.mark.parametrize("value", [None, [1.0]], ids=["none", "list"])
def test_what_is_no_tensor_is_left_to_the_checks(name: str, value: object) -> None:
    call = make_call(Case(order="cross"))._replace(**{name: value})
    assert autograd.operator.at_once((*call, None)) is None
    options = {
        key: option for key, option in call._asdict().items() if key not in ("initial_state", "return_last_state")
    }
    with pytest.raises(ValueError, match=f"{name} must be"):
        ops.cross_selective_scan(**options)


def test_what_passed_once_is_known_by_types_sizes_and_strides() -> None:
    guards = known_calls.Guards()
    guards.add(("a", 1), [X, A])
    assert guards.hold(("a", 1), [X + 1, A + 1])
    assert not guards.hold(("b", 1), [X, A])
    others = [X.double(), X.t(), torch.randn(3, 2), X.clone().requires_grad_(), X._neg_view(), torch.nn.Parameter(X)]
    assert not any(guards.hold(("a", 1), [other, A]) for other in others)
    for i in range(9):  # of one key, the newest stay
        guards.add(("a", 1), [torch.randn(2 + i, 3), A])
    assert not guards.hold(("a", 1), [X, A]) or known_calls._TensorGuards is None
