"""Small neighbours of the scans: cases for their kernels, held against the plain function in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.tolerances import assert_close
from vision_mamba.ops import conv, norm
from vision_mamba.ops.backends import rows_cuda
from vision_mamba.ops.fused import Kernels

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Case = tuple[Kernels, Callable[..., Any], list[Tensor | None], dict[str, Any]]


def _normed(
    rows: int, width: int, x: torch.dtype, branch: torch.dtype | None, rms: bool, out: torch.dtype, stream: bool = False
) -> Case:
    tensors = [
        torch.randn(2, rows, width).to(x) + 3,
        None if branch is None else torch.randn(2, rows, width).to(branch),
        torch.rand(width) + 0.5,
        None if rms else torch.randn(width),
    ]
    options = dict(eps=1e-3, rms=rms, out_dtype=out, stream=branch is not None or stream)
    return rows_cuda.NORM, norm.plain_normed, tensors, options


def _shifted(rows: int, width: int, x: torch.dtype, rms: bool, out: torch.dtype) -> Case:
    kernels, plain, tensors, options = _normed(rows, width, x, None, rms, out)
    return kernels, plain, [*tensors, torch.randn(width)], options


def _convolved(batch: int, length: int, channels: int, taps: int, dtype: torch.dtype) -> Case:
    x = torch.randn(batch, length, 2 * channels).to(dtype)[..., :channels]  # one half of a projection
    return (
        rows_cuda.CONV_BOTH_WAYS,
        conv.plain_conv_both_ways,
        [x, torch.randn(2, channels, taps), torch.randn(2, channels)],
        {},
    )


def _along(batch: int, length: int, channels: int, taps: int, before: int, dtype: torch.dtype) -> Case:
    x = torch.randn(batch, length, channels + 12).to(dtype)[..., 6 : 6 + channels]  # columns of a projection
    tensors = [x, torch.randn(channels, 1, taps), torch.randn(channels)]
    return rows_cuda.CONV_ALONG, conv.plain_conv_along, tensors, dict(before=before)


def _mapped(
    batch: int, height: int, width: int, channels: int, dtype: torch.dtype, bias: bool, **options: bool
) -> Case:
    tensors = [
        torch.randn(batch, height, width, channels).to(dtype),
        torch.randn(channels, 1, 3, 3),
        torch.randn(channels) if bias else None,
    ]
    return rows_cuda.CONV_MAP, conv.plain_conv_map, tensors, options


def _gated(batch: int, length: int, channels: int, dtype: torch.dtype, out: torch.dtype | None = None) -> Case:
    z = torch.randn(batch, length, 2 * channels).to(dtype)[..., channels:]
    tensors: list[Tensor | None] = [torch.randn(batch, length, channels).to(dtype), 3 * z]
    return rows_cuda.GATED, conv.plain_gated, tensors, dict(out_dtype=out)


CASES: dict[str, Callable[[], Case]] = {
    "layer_norm": lambda: _normed(5, 24, F32, None, False, F32),
    "layer_norm_wide": lambda: _normed(3, 1022, F32, None, False, F16),
    "layer_norm_of_three": lambda: _normed(1, 3, F32, None, False, F32),
    "add_layer_norm": lambda: _normed(19, 96, F32, F16, False, F16),
    "shifted_layer_norm": lambda: _shifted(7, 50, F32, False, F16),
    "shifted_rms_norm": lambda: _shifted(3, 64, F16, True, F32),
    "rms_norm_beside": lambda: _normed(6, 48, F32, None, True, F16, True),
    "add_rms_norm": lambda: _normed(7, 192, F32, F32, True, F32),
    "rms_norm_half": lambda: _normed(9, 64, F16, None, True, F16),
    "conv": lambda: _convolved(1, 11, 66, 4, F32),
    "conv_three_taps": lambda: _convolved(1, 8, 4, 3, F32),
    "conv_shorter_than_taps": lambda: _convolved(1, 2, 8, 4, F16),
    "conv_half": lambda: _convolved(2, 4, 8, 4, F16),
    "conv_along": lambda: _along(1, 19, 10, 4, 3, F32),
    "conv_along_centred": lambda: _along(2, 9, 8, 4, 2, F32),
    "conv_along_backwards": lambda: _along(1, 8, 6, 3, 0, F32),
    "conv_along_one_tap": lambda: _along(1, 2, 4, 1, 0, F16),
    "map": lambda: _mapped(2, 5, 9, 6, F32, True),
    "map_half": lambda: _mapped(1, 14, 3, 32, F16, False),
    "map_shortcut": lambda: _mapped(2, 4, 7, 6, F32, True, shortcut=True),
    "map_of_one": lambda: _mapped(3, 1, 1, 5, F32, True),
    "gate": lambda: _gated(2, 13, 50, F32),
    "gate_half": lambda: _gated(1, 1, 3, F16),
    "gate_widened": lambda: _gated(1, 3, 10, F16, F32),
}
#: Beside those, sizes of models.
LARGE: dict[str, Callable[[], Case]] = {
    "vmamba_stage1": lambda: _normed(3136, 96, F32, BF16, False, BF16),
    "downsampled": lambda: _shifted(784, 192, BF16, False, F32),
    "vmamba_stage4": lambda: _normed(49, 768, F32, BF16, False, BF16),
    "vim_s": lambda: _normed(197, 384, F32, None, True, BF16),
    "conv_vim_s": lambda: _convolved(3, 197, 768, 4, BF16),
    "conv_vim_s_full": lambda: _convolved(3, 197, 768, 4, F32),
    "conv_along_mamba2": lambda: _along(3, 196, 1024, 4, 3, BF16),
    "conv_along_both": lambda: _along(2, 2048, 768, 4, 2, F16),
    "map_stage1": lambda: _mapped(3, 56, 56, 96, BF16, False),
    "map_stage3": lambda: _mapped(3, 14, 14, 384, BF16, True),
    "map_stage2_shortcut": lambda: _mapped(3, 28, 28, 128, BF16, True, shortcut=True),
    "map_wide": lambda: _mapped(1, 31, 200, 34, F16, True),
    "gate_vim_s": lambda: _gated(3, 197, 768, BF16),
}


def check(case: Case, device: str) -> None:
    """Results and all gradients against plain torch in float64; twice, equal to the last bit."""
    kernels, plain, tensors, options = case
    tensors = [None if t is None else t.to(device) for t in tensors]
    assert not kernels.refuses(tuple(tensors), options)
    results, kept = kernels.forward(tuple(tensors), options, True)
    grads = tuple(torch.randn_like(result) for result in results)
    found = kernels.backward(kept, options, grads)
    again = kernels.backward(kept, options, grads) if device != "cpu" else found

    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    expected = plain(*exact, **options | (dict(out_dtype=None) if "out_dtype" in options else {}))
    expected = expected if isinstance(expected, tuple) else (expected,)
    inputs = [t for t in exact if t is not None]
    expected_grads = iter(torch.autograd.grad(expected, inputs, [grad.double() for grad in grads]))
    for i, (result, reference) in enumerate(zip(results, expected, strict=True)):
        assert_close(f"result {i}", result, reference)
    for i, (gradient, repeated, tensor) in enumerate(zip(found, again, tensors, strict=True)):
        if tensor is None:
            assert gradient is None
            continue
        assert gradient is not None and gradient.dtype == tensor.dtype and torch.equal(gradient, repeated)
        assert_close(f"gradient {i}", gradient, next(expected_grads))
