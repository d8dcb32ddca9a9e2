"""Is a backend right on this machine? A small scan against the loop over time in float64: output and every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vision_mamba import scans
from vision_mamba.ops.call import GRADIENTS, ScanCall

#: Relative RMS error that a result of that type may have against the float64 reference on the same rounded inputs.
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Worst:
    """The result that came closest to its bound, or is farthest beyond it."""

    name: str
    error: float
    bound: float

    @property
    def passes(self) -> bool:
        return self.error <= self.bound  # NaN does not

    def __str__(self) -> str:
        return f"{self.name} errs by {self.error:.1e}, allowed {self.bound:.0e}"


def sample_call(dtype: torch.dtype, low_rank: bool) -> ScanCall:
    """A seeded scan over an uneven grid with padding steps; 16 states with low-rank step sizes, 3 without."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    height, width, channels, states, rank = 5, 7, 12, 16 if low_rank else 3, 4
    order = scans.LOCAL_2
    tokens, routes = height * width, len(order)
    return ScanCall(
        x=randn(2, tokens, channels).to(dtype),
        dt=randn(2, tokens, routes, rank if low_rank else channels).to(dtype),
        A=-torch.exp(randn(routes, channels, states)),
        B=randn(2, tokens, routes, states).to(dtype),
        C=randn(2, tokens, routes, states).to(dtype),
        D=randn(routes, channels),
        indices=order.indices(height, width),
        dt_weight=randn(routes, channels, rank) / rank**0.5 if low_rank else None,
        dt_bias=randn(routes, channels) - 2,
    )


def results(call: ScanCall, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output and its gradients, by name; run on `device`, in `dtype` if given, and brought back to the CPU."""
    inputs = {name: tensor for name in GRADIENTS if (tensor := getattr(call, name)) is not None}
    inputs = {name: tensor.detach().to(device, dtype, copy=True).requires_grad_() for name, tensor in inputs.items()}
    B, C = (tensor.to(device, dtype) for tensor in (call.B, call.C))
    indices = None if call.indices is None else call.indices.to(device)
    call = call._replace(**{"B": B, "C": C, "indices": indices} | inputs)
    y, _ = torch.ops.vision_mamba.cross_selective_scan(*call, backend)
    # A seed that every type holds exactly, different for every element of a token.
    seed = torch.linspace(-1, 1, y.numel()).to(torch.bfloat16).view(y.shape).to(y)
    grads = torch.autograd.grad(y, list(inputs.values()), seed)
    found = {"y": y, **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def relative_rms(result: Tensor, reference: Tensor) -> float:
    """|result - reference| / |reference|, in float64."""
    return float((result.double() - reference.double()).norm() / reference.double().norm())


def compare(backend: str, device: torch.device, dtype: torch.dtype) -> Worst:
    """Run the samples on a backend in a type; returns the worst of all outputs and gradients."""
    found = []
    for low_rank in (False, True):
        call = sample_call(dtype, low_rank)
        expected = results(call, "reference", torch.device("cpu"), torch.float64)
        for name, tensor in results(call, backend, device).items():
            found.append(Worst(name, relative_rms(tensor, expected[name]), BOUNDS[tensor.dtype]))
    # A NaN compares with nothing, so it goes first by hand.
    return max(found, key=lambda worst: (worst.error != worst.error, worst.error / worst.bound))
