"""Every backend of the state-space dual scan against the float64 reference: outputs and each gradient by name."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.ops import ssd_cases
from tests.ops.ssd_cases import F64, SsdCase, make_call, run
from tests.tolerances import RELATIVE_RMS, assert_close
from vision_mamba.ops.ssd_call import GRADIENTS
from vision_mamba.ops.ssd_operator import registry

ALL = ssd_cases.options() + ssd_cases.shapes() + ssd_cases.types() + ssd_cases.layouts()
scan = torch.ops.vision_mamba.ssd


@functools.cache
def expected(case: SsdCase) -> dict[str, Tensor]:
    return run(ssd_cases.double(make_call(case)), "reference")


def accepted(case: SsdCase, backend: str) -> bool:
    return registry.get(backend).refuses(make_call(case)) is None


@pytest.mark.parametrize(
    ("case", "backend"), [(c, b) for c in ALL for b in ("cpu", "eager") if accepted(c, b)], ids=str
)
def test_matches_the_reference(case: SsdCase, backend: str, poisoned: None) -> None:
    found = run(make_call(case), backend)
    assert found.keys() == expected(case).keys()
    for name, reference in expected(case).items():
        assert_close(name, found[name], reference)


@pytest.mark.parametrize(("causal", "backend"), [(True, "cpu"), (True, "eager"), (False, "eager")])
@pytest.mark.parametrize("raw", [-80.0, -60.0, 60.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_step_sizes(raw: float, dtype: torch.dtype, causal: bool, backend: str) -> None:
    call = make_call(SsdCase(dtypes=(dtype,) * 4, grid=(1, 130), skip=None, causal=causal))
    call = call._replace(dt=torch.full_like(call.dt, raw))
    found, reference = run(call, backend), run(ssd_cases.double(call), "reference")
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), name
        # exp(-80) is near the smallest normal number: each addend of a sum, and the sum, may be flushed to zero.
        addends = 1 + call.batch * call.steps * call.states * call.channels
        lost = addends * max(torch.finfo(t).smallest_normal for t in (torch.float32, tensor.dtype))
        error, scale = (tensor.double() - reference[name]).norm(), reference[name].norm()
        assert error <= RELATIVE_RMS[tensor.dtype] * scale + lost * tensor.numel() ** 0.5, name


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_strong_decays_keep_their_digits(backend: str) -> None:
    """Where log-decays sum up to -6000 in a chunk, differences of such sums would be off in the third digit."""
    call = make_call(SsdCase(grid=(1, 64), heads=2, groups=1, softplus=False, bias=False))
    dt = torch.full_like(call.dt, 100.0)
    dt[:, ::2] = 1e-2
    call = call._replace(dt=dt, A=torch.full_like(call.A, -2.0))
    found, reference = run(call, backend), run(ssd_cases.double(call), "reference")
    for name, tensor in reference.items():
        assert_close(name, found[name], tensor)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_edge_of_the_type_gives_no_nan(dtype: torch.dtype, backend: str) -> None:
    call = make_call(SsdCase(dtypes=(dtype,) * 4, out_dtype=torch.float32, states=16, skip=None))
    big = 6e4
    call = call._replace(x=call.x.sign() * big, dt=torch.full_like(call.dt, 10.0), B=call.B * 1e-2, C=call.C * 1e-2)
    found, reference = run(call, backend), run(ssd_cases.double(call), "reference")
    assert_close("y", found["y"], reference["y"])
    call = call._replace(x=call.x / big, dt=call.dt.sign() * big)  # decays underflow to 0: states are forgotten
    for name, tensor in run(call, backend).items():
        assert not torch.isnan(tensor).any(), name


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_empty_batch(backend: str, causal: bool) -> None:
    call = make_call(SsdCase(batch=0, order="cross", state=True, causal=causal))
    found = run(call, backend)
    assert found["y"].shape == (0, 35, 4, 5) and found["last_state"].shape == (0, 4, 4, 5, 3)
    for name in GRADIENTS:
        gradient, tensor = found[f"d{name}"], getattr(call, name)
        assert gradient.shape == tensor.shape and (gradient == 0).all(), name


def test_bitwise_deterministic() -> None:
    call = make_call(SsdCase(order="cross", heads=6, channels=16, states=16, batch=3))
    first = run(call, "eager")
    for _ in range(3):
        for name, tensor in run(call, "eager").items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_tokens_off_a_route_get_nothing_from_it(backend: str, causal: bool) -> None:
    call = make_call(SsdCase(merge=False, batch=1, routes=2, causal=causal))
    table = torch.tensor([[4, -1, 0, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    y, _ = scan(*call._replace(indices=table), backend)
    visited = torch.zeros(35, 2, dtype=torch.bool)
    visited[[4, 0], 0] = True
    assert (y[0][~visited] == 0).all() and (y[0][visited] != 0).all()


def test_a_loss_that_sees_the_last_state_alone() -> None:
    call = make_call(SsdCase(state=True))
    gradients = []
    for chosen, name in ((ssd_cases.double(call), "reference"), (call, "eager")):
        x = chosen.x.detach().requires_grad_()
        scan(*chosen._replace(x=x), name)[1].square().sum().backward()
        gradients.append(x.grad)
    assert_close("dx", gradients[1], gradients[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_is_its_own_derivative(backend: str, causal: bool) -> None:
    """gradcheck in float64, to first and second order, over all options at once."""
    case = SsdCase(
        grid=(2, 3), batch=1, heads=2, channels=2, states=2, order="local_2", state=True, dtypes=(F64,) * 4, chunk=2,
        causal=causal,
    )  # fmt: skip
    call = make_call(case)

    def run_on(*tensors: Tensor) -> tuple[Tensor, ...]:
        return scan(*call._replace(**dict(zip(GRADIENTS, tensors, strict=True))), backend)

    inputs = tuple(getattr(call, name).requires_grad_() for name in GRADIENTS)
    assert torch.autograd.gradcheck(run_on, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run_on, inputs, fast_mode=True)


def test_chunks_change_no_more_than_rounding() -> None:
    call = make_call(SsdCase(grid=(1, 100), dtypes=(F64,) * 4, state=True))
    whole = scan(*call, "reference")
    for chunk in (1, 3, 16, 99, 100, 101):
        for found, tensor in zip(scan(*call._replace(chunk=chunk), "eager"), whole, strict=True):
            assert torch.allclose(found, tensor, rtol=1e-12, atol=1e-12)


def test_what_runs_by_default() -> None:
    assert registry.choose(make_call(SsdCase()), None).name == "cpu"
    for case in (SsdCase(causal=False), SsdCase(dtypes=(F64,) * 4), SsdCase(order="cross", limits=(0.0, 1.0))):
        assert registry.choose(make_call(case), None).name == "eager"
