"""Every backend against the float64 reference on the same rounded inputs: outputs and each gradient by name."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import Case, make_call, run
from tests.tolerances import RELATIVE_RMS, assert_close
from vision_mamba.ops import registry
from vision_mamba.ops.call import GRADIENTS

ALL = cases.options() + cases.shapes() + cases.types() + cases.layouts()
CPU_BACKENDS = ("cpu", "eager")


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    return run(cases.double(make_call(case)), "reference")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_the_reference(case: Case, backend: str, poisoned: None) -> None:
    found = run(make_call(case), backend)
    assert found.keys() == expected(case).keys()
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("raw", [-80.0, -60.0, 60.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_step_sizes(backend: str, raw: float, dtype: torch.dtype) -> None:
    case = Case(dtypes=(dtype,) * 4, states=16, order="cross")
    call = make_call(case)
    call = call._replace(dt=torch.full_like(call.dt, raw), D=None)
    found, reference = run(call, backend), run(cases.double(call), "reference")
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), name
        # exp(-80) is near the smallest normal number: each addend of a sum, and the sum, may be flushed to zero.
        addends = 1 + call.batch * call.steps * call.states
        lost = addends * max(torch.finfo(t).smallest_normal for t in (torch.float32, tensor.dtype))
        error, scale = (tensor.double() - reference[name]).norm(), reference[name].norm()
        assert error <= RELATIVE_RMS[tensor.dtype] * scale + lost * tensor.numel() ** 0.5, name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_edge_of_the_type_gives_no_nan(backend: str, dtype: torch.dtype) -> None:
    """|x| and |dt| near the largest half-precision numbers: float32 sums hold what the reference holds."""
    call = make_call(Case(dtypes=(dtype,) * 4, out_dtype=torch.float32, states=16, skip=False))
    big = 6e4
    call = call._replace(x=call.x.sign() * big, dt=torch.full_like(call.dt, 10.0), B=call.B * 1e-2, C=call.C * 1e-2)
    found, reference = run(call, backend), run(cases.double(call), "reference")
    assert torch.isfinite(reference["y"]).all() and torch.isfinite(found["y"]).all()
    assert_close("y", found["y"], reference["y"])
    call = call._replace(x=call.x / big, dt=call.dt.sign() * big)  # decays underflow to 0: states are forgotten
    found = run(call, backend)
    for name, tensor in found.items():
        assert not torch.isnan(tensor).any(), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("raw", [-200.0, 1.0])
def test_the_largest_rates_keep_or_forget_all(backend: str, raw: float) -> None:
    """A near the largest float32, where a change of its base overflows: a step of no size keeps the state as it is."""
    call = make_call(Case(state=True, bias=False))
    call = call._replace(A=torch.full_like(call.A, -3e38), dt=torch.full_like(call.dt, raw))
    found, reference = run(call, backend), run(cases.double(call), "reference")
    for name in ("y", "last_state", "dx", "dinitial_state"):
        assert_close(name, found[name], reference[name])


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_empty_batch(backend: str) -> None:
    call = make_call(Case(batch=0, order="cross", rank=3, state=True))
    found = run(call, backend)
    assert found["y"].shape == (0, 35, 20) and found["last_state"].shape == (0, 4, 20, 3)
    for name in GRADIENTS:
        gradient, tensor = found[f"d{name}"], getattr(call, name)
        assert gradient.shape == tensor.shape and (gradient == 0).all(), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bitwise_deterministic(backend: str) -> None:
    call = make_call(Case(order="cross", rank=4, states=16, channels=70, batch=3))
    first = run(call, backend)
    for _ in range(5):
        for name, tensor in run(call, backend).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_tokens_off_a_route_get_nothing_from_it(backend: str) -> None:
    call = make_call(Case(merge=False, batch=1, routes=2))
    table = torch.tensor([[4, -1, 0, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    y, _ = torch.ops.vision_mamba.cross_selective_scan(*call._replace(indices=table), backend)
    visited = torch.zeros(35, 2, dtype=torch.bool)
    visited[[4, 0], 0] = True
    assert (y[0][~visited] == 0).all() and (y[0][visited] != 0).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_loss_that_sees_the_last_state_alone(backend: str) -> None:
    call = make_call(Case(state=True))
    reference, expected_state = cases.double(call), None
    for chosen, name in ((reference, "reference"), (call, backend)):
        x = chosen.x.detach().requires_grad_()
        _, last = torch.ops.vision_mamba.cross_selective_scan(*chosen._replace(x=x), name)
        last.square().sum().backward()
        if expected_state is None:
            expected_state = x.grad
        else:
            assert_close("dx", x.grad, expected_state)


def test_reference_is_its_own_derivative() -> None:
    """gradcheck in float64, to first and second order, over all options at once."""
    case = Case(
        grid=(2, 3), batch=1, channels=2, states=2, order="local_2", rank=2, state=True, dtypes=(torch.float64,) * 4
    )
    call = make_call(case)
    names = [name for name in GRADIENTS if getattr(call, name) is not None]

    for backend in ("reference", "eager"):

        def scan(*tensors: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
            asked = call._replace(**dict(zip(names, tensors, strict=True)))
            return torch.ops.vision_mamba.cross_selective_scan(*asked, backend)

        inputs = tuple(getattr(call, name).requires_grad_() for name in names)
        assert torch.autograd.gradcheck(scan, inputs)
        assert torch.autograd.gradgradcheck(scan, inputs)


def test_second_derivatives_of_a_kernel_are_refused() -> None:
    call = make_call(Case(states=1))
    x = call.x.requires_grad_()
    y, _ = torch.ops.vision_mamba.cross_selective_scan(*call._replace(x=x), "cpu")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives are .*use_backend\('eager'\)"):
        gradient.sum().backward()


def test_unstable_products_are_never_divided_by() -> None:
    """A decay that underflows within a few steps: the closed forms that divide by it give NaN here."""
    call = make_call(Case(grid=(1, 200), states=16, softplus=False, bias=False))
    call = call._replace(dt=torch.full_like(call.dt, 30.0))
    for backend in CPU_BACKENDS:
        found, reference = run(call, backend), run(cases.double(call), "reference")
        assert_close("y", found["y"], reference["y"])
        assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_the_kernel_is_what_runs_by_default() -> None:
    assert registry.choose(make_call(Case()), None).name == "cpu"
    assert registry.choose(make_call(Case(dtypes=(torch.float64,) * 4)), None).name == "eager"
