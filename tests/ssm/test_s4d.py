"""The S4D layer: convolution and recurrence are one, and where A starts decides what can be learned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from vision_mamba.ssm import DIAGONALS, S4D, kernel
from vision_mamba.ssm.s4d import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


def stepped(layer: S4D, x: torch.Tensor, cache: tuple[torch.Tensor]) -> torch.Tensor:
    return torch.cat([layer.step(x[:, t : t + 1], *cache)[0] for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", DIAGONALS)
@torch.no_grad()
def test_kernel_mode_is_recurrent_mode(init: str, method: str) -> None:
    layer = S4D(5, 16, init, method, dtype=torch.float64)
    x = torch.randn(2, 70, 5, dtype=torch.float64)
    cache = layer.allocate_inference_cache(2)
    assert torch.allclose(stepped(layer, x, cache), layer(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("split", [1, 30, 69])
@torch.no_grad()
def test_prefill_then_step_is_one_shot(split: int) -> None:
    layer = S4D(5, 16, dtype=torch.float64)
    x = torch.randn(2, 70, 5, dtype=torch.float64)
    whole, end = layer(x), layer.allocate_inference_cache(2)
    layer(x, end)
    for rest in (lambda part, cache: layer(part, cache), lambda part, cache: stepped(layer, part, cache)):
        cache = layer.allocate_inference_cache(2, 70)
        y = torch.cat((layer(x[:, :split], cache), rest(x[:, split:], cache)), 1)
        assert torch.allclose(y, whole, atol=1e-10, rtol=0)
        assert torch.allclose(cache[0], end[0], atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_kernel_is_the_systems() -> None:
    layer = S4D(5, 16, dtype=torch.float64)
    assert torch.allclose(layer.kernel(40), 2 * kernel(*layer.discrete(), 40).real, atol=1e-12, rtol=0)


def test_gradients() -> None:
    layer = S4D(2, 4, dtype=torch.float64)
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(run, (x, *values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_keeps_the_model_in_float32(dtype: torch.dtype) -> None:
    layer = S4D(8, 16, dtype=dtype)
    kept = {name for name, p in layer.named_parameters() if p.dtype == torch.float32}
    assert kept == {"log_dt", "A_real_log", "A_imag", "C", "D"}
    x = torch.randn(2, 40, 8).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = S4D(8, 16, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    assert float((y.double() - exact(x.double())).norm() / exact(x.double()).norm()) < 0.02


def recall(init: str) -> float:
    """Train to say at the end of 64 tokens what signs the first six had; return the share it gets right."""
    torch.manual_seed(0)
    bits, length = 6, 64
    model = nn.Sequential(
        nn.Linear(1, 32), S4D(32, 32, init, dt_min=1 / length, dt_max=1 / length), nn.Linear(32, bits)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        signs = torch.randint(0, 2, (size, bits)).float()
        return F.pad(2 * signs - 1, (0, length - bits)).unsqueeze(-1), signs

    for _ in range(80):
        x, signs = batch(32)
        loss = F.binary_cross_entropy_with_logits(model(x)[:, -1], signs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, signs = batch(512)
    with torch.no_grad():
        return float(((model(x)[:, -1] > 0) == (signs > 0.5)).float().mean())


def test_hippo_learns_to_recall_what_a_random_matrix_does_not() -> None:
    """A guess is right half of the time."""
    hippo, random = recall("legs"), recall("random")
    assert hippo > 0.9, hippo
    assert random < 0.75, random


def test_a_frozen_model_stays_as_it_starts() -> None:
    layer = S4D(4, 8, train_a=False)
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"log_dt", "A_real_log", "A_imag"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S4D(4, 8, "hippo"), "name must be one of legs"),
        (lambda: S4D(4, 7), "states must be even"),
        (lambda: S4D(4, 8, method="euler"), "S4D: method must be one of zoh, bilinear, which are stable"),
        (lambda: S4D(4, 8, dt_min=0.2, dt_max=0.1), "S4D: steps must start from 0 < dt_min <= dt_max, got 0.2 and 0.1"),
        (lambda: S4D(4, 8)(torch.zeros(2, 4, 9)), r"S4D: x must be \(batch, tokens, 4\), got \(2, 4, 9\)"),
        (
            lambda: S4D(4, 8)(torch.zeros(1, 2, 4), S4D(4, 8).allocate_inference_cache(3)),
            r"S4D: the state must be \(batch, channels, pairs\) = \(1, 4, 4\), got \(3, 4, 4\)",
        ),
        (lambda: S4D(4, 8).step(torch.zeros(2, 2, 4), torch.zeros(2, 4, 4)), "S4D.step: x must be one token"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
