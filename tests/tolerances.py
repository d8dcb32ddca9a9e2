"""The one table of bounds: how far a result may lie from the float64 reference, equal on every machine and backend."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.selftest import BOUNDS

#: Relative RMS error of an output or gradient of that type, on the same rounded inputs; as the doctor holds them to.
RELATIVE_RMS = {torch.float64: 1e-10, **BOUNDS}

#: Largest difference of two models' logits, relative to the largest logit, in float32.
LOGITS = 1e-4


def relative_rms(result: Tensor, reference: Tensor) -> float:
    """|result - reference| / |reference|, both taken in float64; NaN and infinity never pass for close."""
    result, reference = result.detach().double().cpu(), reference.detach().double().cpu()
    assert result.shape == reference.shape, f"{tuple(result.shape)} is not {tuple(reference.shape)}"
    scale = reference.norm()
    error = (result - reference).norm()
    return float(error / scale) if scale > 0 else float(error)


def assert_close(name: str, result: Tensor, reference: Tensor) -> None:
    """Fail, naming the tensor, unless it is as close to the reference as its type promises."""
    bound, error = RELATIVE_RMS[result.dtype], relative_rms(result, reference)
    assert error <= bound, f"{name}: relative RMS error {error:.2e} is over {bound:.0e} for {result.dtype}"
